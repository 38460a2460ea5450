"""Commands on exported folders: `aif-jax export` and `aif-jax verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from aif_jax import export
from aif_jax.cli.indexes import expect_new
from aif_jax.cli.options import FINE, UsageError, add_checkpoint, add_command, load_model
from aif_jax.export.writer import PLATFORMS
from aif_jax.index import ItemIndex
from aif_jax.model import build


def add_commands(commands: Any) -> None:
    """Adds `export` and `verify`."""
    one = add_command(
        commands, "export", run_export, "Writes a model as one folder that runs without the package's model code."
    )
    source = one.add_mutually_exclusive_group(required=True)
    add_checkpoint(source)
    source.add_argument("--rebuild", type=Path, metavar="FOLDER", help="exported folder whose functions are written anew")
    one.add_argument("--index", type=Path, help="folder of an index of the same model, to go along")
    one.add_argument("--out", type=Path, required=True, help="folder of the export; must not exist")
    one.add_argument("--platforms", nargs="+", default=list(PLATFORMS), help=f"to compile for (default: {' '.join(PLATFORMS)})")
    one.add_argument("--no-stablehlo", action="store_true", help="without texts of the functions (.mlir)")

    one = add_command(commands, "verify", run_verify, "Checks the checksums of an exported folder and replays its golden case.")
    one.add_argument("folder", type=Path)
    one.add_argument("--tolerance", type=float, default=1e-4, help="of a golden output (default: %(default)s)")
    one.add_argument("--sha256", help="digest of the manifest, as export printed it")


def run_export(options: argparse.Namespace) -> int:
    """`export`."""
    expect_new(options.out)
    if options.rebuild is not None:
        if options.index is not None:
            raise UsageError("export: --rebuild takes the index along; expected no --index")
        print(json.dumps({"sha256": export.rebuild(options.rebuild, options.out)}))
        return FINE
    trained = load_model(options.checkpoint)
    model, index = build(trained.config), None
    if options.index is not None:
        index = ItemIndex.load(options.index, model, trained.params, encoder=trained.encoder, version=trained.version)
    digest = export.save(
        options.out, model, trained.params, index,
        encoder=trained.encoder, platforms=options.platforms, stablehlo=not options.no_stablehlo,
    )  # fmt: skip
    print(json.dumps({"sha256": digest, "version": trained.version}))
    return FINE


def run_verify(options: argparse.Namespace) -> int:
    """`verify`."""
    if not options.folder.is_dir():
        raise FileNotFoundError(f"{options.folder}: expected an exported folder, got none")
    print(json.dumps(export.verify(options.folder, tolerance=options.tolerance, sha256=options.sha256)))
    return FINE
