"""`python -m aif_jax`, the same as the command `aif-jax`."""

import sys

from aif_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
