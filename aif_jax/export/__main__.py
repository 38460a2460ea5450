"""Commands on exported folders: `python -m aif_jax.export verify DIR`, `rebuild DIR NEW`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from aif_jax import export


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, 1 with the reason on stderr where a folder is refused."""
    parser = argparse.ArgumentParser(prog="python -m aif_jax.export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check the checksums and replay the golden inputs")
    verify.add_argument("folder")
    verify.add_argument("--tolerance", type=float, default=1e-4)
    verify.add_argument("--sha256", help="digest of the manifest, as `save` returned it")
    rebuild = commands.add_parser("rebuild", help="write the functions anew with the JAX that is here")
    rebuild.add_argument("folder")
    rebuild.add_argument("new")
    given = parser.parse_args(argv)
    try:
        if given.command == "verify":
            print(json.dumps(export.verify(given.folder, tolerance=given.tolerance, sha256=given.sha256)))
        else:
            print(json.dumps({"sha256": export.rebuild(given.folder, given.new)}))
    except (export.ExportError, export.CoverageError, OSError) as error:
        print(f"{given.folder}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
