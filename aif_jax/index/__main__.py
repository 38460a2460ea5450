"""`python -m aif_jax.index`: builds, updates, inspects and verifies index snapshots on disk.

Exit codes: 0 done, 1 data or snapshot refused (torn, altered, not as the schema says, output exists), 2 wrong usage, 3 parts of
different versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import checkpoint
from aif_jax.index.arrow import ID_COLUMN, from_arrow, parquet_batches, record_batches
from aif_jax.index.encoder import Encoder
from aif_jax.index.files import inspect, verify
from aif_jax.index.item_index import BATCH, ItemIndex, capacity_for, checked, empty_features
from aif_jax.index.storage import STORAGES
from aif_jax.types import ItemFeatures
from aif_jax.version import VersionMismatch

DONE, REFUSED, OTHER_VERSION = 0, 1, 3
DELETED_COLUMN = "deleted"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(argv)
    try:
        for line in options.run(options):
            print(line)
        return DONE
    except VersionMismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return OTHER_VERSION
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(prog="python -m aif_jax.index", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="build|update|inspect|verify")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    build = command("build", run_build, "Runs the item function of a checkpoint over a Parquet catalogue.")
    build.add_argument("--checkpoint", required=True, help="folder that aif_jax.checkpoint.save wrote")
    build.add_argument(
        "--catalogue", required=True, help="Parquet file or directory, see aif_jax/index/arrow.py for its columns"
    )
    build.add_argument("--output", required=True, help="new folder for the snapshot")
    build.add_argument("--storage", choices=STORAGES, default="float32", help="of vectors (default: %(default)s)")
    build.add_argument("--batch-size", type=int, default=BATCH, help="items in one run (default: %(default)s)")

    update = command(
        "update", run_update, "Applies a Parquet file of changes to a snapshot; the last change of an item counts."
    )
    update.add_argument("--index", required=True, help="snapshot to start from; it stays as it is")
    update.add_argument("--checkpoint", required=True, help="the checkpoint that the snapshot was built from")
    update.add_argument(
        "--changes", required=True, help=f"Parquet file or directory; rows with a true {DELETED_COLUMN!r} column are deletions"
    )
    update.add_argument("--output", required=True, help="new folder for the new snapshot")

    for one in (build, update):
        one.add_argument(
            "--id-column", default=ID_COLUMN, help="column of item ids, integers or strings (default: %(default)s)"
        )
        one.add_argument("--position", type=int, help="in the update stream, recorded in the snapshot")
        one.add_argument("--dry-run", action="store_true", help="check everything, compute and write nothing")
        one.add_argument("--quiet", action="store_true", help="no progress bar")

    for name, run, text in (
        ("inspect", run_inspect, "Prints what a snapshot says of itself, as JSON; reads no arrays."),
        ("verify", run_verify, "Reads every array of a snapshot and compares it with its checksum."),
    ):
        command(name, run, text).add_argument("index", help="snapshot folder")
    return whole


def run_build(options: argparse.Namespace) -> Iterator[str]:
    """`build`."""
    _expect_new(options.output)
    held = checkpoint.load(options.checkpoint)
    model = aif.build(held.config)
    batches = parquet_batches(options.catalogue, held.config.schema, id_column=options.id_column)
    if options.dry_run:
        ids = np.concatenate([np.zeros(0, np.int64), *(checked(held.config, pair)[0] for pair in batches)])
        if len(np.unique(ids)) < len(ids):
            raise ValueError(f"ids: expected distinct ids, got {len(ids) - len(np.unique(ids))} repeated")
        encoder = Encoder(model, held.params, storage=options.storage, batch_size=options.batch_size)
        rows = jax.tree.leaves(encoder.shapes(empty_features(held.config)))
        size = sum(int(np.prod(leaf.shape[1:])) * leaf.dtype.itemsize for leaf in rows) * capacity_for(len(ids))
        yield f"dry run: {len(ids)} items, table of {capacity_for(len(ids))} rows, {size} bytes, version {held.version}"
        return
    index = ItemIndex.build(
        model,
        held.params,
        batches,
        version=held.version,
        storage=options.storage,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    index.save(options.output, position=options.position or 0)
    yield f"{options.output}: {len(index)} items, version {index.version}"


def run_update(options: argparse.Namespace) -> Iterator[str]:
    """`update`."""
    _expect_new(options.output)
    held = checkpoint.load(options.checkpoint)
    index = ItemIndex.load(options.index, aif.build(held.config), held.params, version=held.version)
    position = inspect(options.index).position if options.position is None else options.position
    before, upserts, deletes = len(index), 0, 0
    for batch in record_batches(options.changes):
        deleted = batch.column(DELETED_COLUMN).to_numpy(zero_copy_only=False) if DELETED_COLUMN in batch.schema.names else None
        ids, features = checked(held.config, from_arrow(batch, held.config.schema, id_column=options.id_column))
        removed, kept, features = _last_changes(ids, deleted, features)
        upserts, deletes = upserts + len(kept), deletes + len(removed)
        if not options.dry_run:
            index = index.delete(removed).upsert(kept, features)
    counts = f"{upserts} upserts, {deletes} deletes"
    if options.dry_run:
        yield f"dry run: {counts} for an index of {before} items, version {index.version}"
        return
    index.save(options.output, position=position)
    yield f"{options.output}: {counts}, {before} -> {len(index)} items, version {index.version}"


def run_inspect(options: argparse.Namespace) -> Iterator[str]:
    """`inspect`."""
    yield json.dumps(dataclasses.asdict(inspect(options.index)), indent=2)


def run_verify(options: argparse.Namespace) -> Iterator[str]:
    """`verify`."""
    manifest = verify(options.index)
    yield f"{options.index}: intact, {manifest.items} items, {manifest.nbytes} bytes, version {manifest.version}"


def _last_changes(
    ids: np.ndarray, deleted: np.ndarray | None, features: ItemFeatures
) -> tuple[np.ndarray, np.ndarray, ItemFeatures]:
    """Ids to delete, ids to upsert and their features, of which each id stands in one place alone."""
    last = np.sort(len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1])
    gone = np.zeros(len(ids), bool) if deleted is None else deleted.astype(bool)
    kept = last[~gone[last]]
    return ids[last[gone[last]]], ids[kept], jax.tree.map(lambda leaf: leaf[kept], features)


def _expect_new(path: str) -> None:
    if Path(path).exists():
        raise FileExistsError(f"{path}: expected a new folder, but something is there; it stays as it is")


if __name__ == "__main__":
    sys.exit(main())
