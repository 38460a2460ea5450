"""Thin feeds round unchanged models of other packages. They read the lists' files and write a score file, and import no JAX."""
