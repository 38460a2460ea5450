"""Hot loops, each with a plain reference in the same file."""
