"""`python -m aif_jax doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from aif_jax import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m aif_jax")
    commands = parser.add_subparsers(dest="command", required=True)
    examine = commands.add_parser("doctor", help="versions, devices, threads, and whether checkpoints and exports work here")
    examine.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    return doctor.main(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
