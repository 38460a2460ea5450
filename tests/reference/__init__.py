"""Plain, slow NumPy written from the formulas; tests compare the library with it."""
