"""Commands on item indexes: `aif-jax index build|update|inspect|verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from aif_jax.cli.options import FINE, UsageError, add_checkpoint, add_command, encoder_of, load_model
from aif_jax.index import STORAGES, ItemIndex, inspect, verify
from aif_jax.index.build import BATCH
from aif_jax.model import build
from aif_jax.readers import load_columns, read_items


def add_commands(commands: Any) -> None:
    """Adds `index` with its commands."""
    text = "Builds, updates, inspects and verifies item indexes on disk."
    inner = commands.add_parser("index", help=text, description=text).add_subparsers(
        required=True, metavar="build|update|inspect|verify"
    )

    one = add_command(inner, "build", run_build, "Runs the item function of a checkpoint over a raw items file.")
    add_checkpoint(one, required=True)
    one.add_argument("--items", required=True, help="Parquet, CSV or TSV file or folder with the columns that training read")
    one.add_argument("--storage", choices=STORAGES, default="float32", help="of vectors (default: %(default)s)")
    one.add_argument("--batch-size", type=int, default=BATCH, help="items in one run (default: %(default)s)")
    add_output(one)

    one = add_command(inner, "update", run_update, "Applies changed and deleted items to an index; the old one stays as it is.")
    one.add_argument("--index", required=True, help="folder of the index to start from")
    add_checkpoint(one, required=True)
    one.add_argument("--items", help="raw items file or folder: new and changed items")
    one.add_argument("--deleted", help="file or folder with the id column: items to delete, after the changes")
    add_output(one)

    one = add_command(inner, "inspect", run_inspect, "Prints the record of an index as JSON; reads no arrays.")
    one.add_argument("folder")
    one = add_command(inner, "verify", run_verify, "Reads every array of an index and compares it with its checksum.")
    one.add_argument("folder")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that write an index."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the new index; must not exist")
    parser.add_argument(
        "--position", action="append", type=position, default=[], metavar="[PARTITION=]NUMBER",
        help="in the update stream, recorded in the index; once for each partition (default: partition 0, or as before)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check and compute everything, write nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def position(text: str) -> tuple[int, int]:
    """(partition, position) of an option."""
    partition, _, number = text.rpartition("=")
    return int(partition or 0), int(number)


def run_build(options: argparse.Namespace) -> int:
    """`index build`."""
    expect_new(options.out)
    trained = load_model(options.checkpoint)
    index = ItemIndex.build(
        build(trained.config),
        trained.params,
        options.items,
        encoder=encoder_of(options.checkpoint, trained),
        version=trained.version,
        storage=options.storage,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    summary = f"{len(index)} items, {len(index) * index.bytes_per_row:.0f} bytes, version {index.version}"
    return save(index, dict(options.position), summary, options)


def run_update(options: argparse.Namespace) -> int:
    """`index update`."""
    if options.items is None and options.deleted is None:
        raise UsageError("index update: expected --items or --deleted")
    expect_new(options.out)
    trained = load_model(options.checkpoint)
    encoder = encoder_of(options.checkpoint, trained)
    index = ItemIndex.load(options.index, build(trained.config), trained.params, encoder=encoder, version=trained.version)
    positions = inspect(options.index).positions | dict(options.position)
    before = len(index)
    changed, deleted = 0, []
    if options.items is not None:
        for ids, features in read_items(options.items, encoder):
            index, changed = index.upsert(ids, features), changed + len(ids)
    if options.deleted is not None:
        deleted = load_columns(options.deleted, {encoder.columns.item_id: "id"}, columns=encoder.columns)[
            encoder.columns.item_id
        ]
        index = index.delete(deleted)
    summary = f"{changed} changed, {len(deleted)} deleted, {before} -> {len(index)} items, version {index.version}"
    return save(index, positions, summary, options)


def save(index: ItemIndex, positions: dict[int, int], summary: str, options: argparse.Namespace) -> int:
    """Writes an index, except in a dry run."""
    if not options.dry_run:
        index.save(options.out, positions=positions)
    print(f"{'dry run' if options.dry_run else options.out}: {summary}")
    return FINE


def run_inspect(options: argparse.Namespace) -> int:
    """`index inspect`."""
    manifest = inspect(options.folder)
    print(json.dumps({**vars(manifest), "config": manifest.config.to_json()}, indent=2))
    return FINE


def run_verify(options: argparse.Namespace) -> int:
    """`index verify`."""
    manifest = verify(options.folder)
    print(f"{options.folder}: intact, {manifest.items} items, {manifest.nbytes} bytes, version {manifest.version}")
    return FINE


def expect_new(path: Path) -> None:
    """Raises FileExistsError before work whose result could not be written."""
    if path.exists():
        raise FileExistsError(f"{path}: expected a new folder, but something is there; it stays as it is")
