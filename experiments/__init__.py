"""Scripts that show what the package does: each has a claim, a command and a figure. See README.md in this folder."""
