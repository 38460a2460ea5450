"""Snapshots of an index on disk: complete or not there, checked leaf by leaf, the same bytes for the same items.

Rows are ordered by id, without free rows, so a file does not depend on the history of updates.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax import checkpoint
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.encoding.vocabulary import Kind
from aif_jax.index.ids import Keys
from aif_jax.index.storage import STORAGES, Storage
from aif_jax.store.folders import local, memory
from aif_jax.store.snapshots import positions_by_partition
from aif_jax.store.trained import Trained
from aif_jax.store.version import VersionMismatch, check_encoding
from aif_jax.trees import differences, listed

FORMAT = "aif_jax.index/2"
PLAIN = ("items", "version", "encoding", "ids", "storage", "batch_size")  # fields of the manifest that are JSON as they are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot on disk says of itself, without its arrays.

    Attributes:
      items: rows.
      version: of params, config and encoder that made them.
      config: with its schema.
      encoding: version of the encoder, "" where it was built without one.
      ids: kind of the raw ids; None for an index that never had any.
      storage: of vectors.
      batch_size: items in one run of the item function.
      positions: in the update stream, by partition: every update up to there is in, none after it.
      library: version of aif_jax that wrote it.
      leaves: dtype and shape of each array by path.
      nbytes: of the arrays.
    """

    items: int
    version: str
    config: Config
    encoding: str
    ids: Kind | None
    storage: Storage
    batch_size: int
    positions: dict[int, int]
    library: str
    leaves: dict[str, str]
    nbytes: int


def write(
    path: str | Path, keys: Keys, columns: Any, plain: dict[str, Any], config: Config, positions: Mapping[int, int]
) -> None:
    """Writes keys [n], the columns of their rows [n] and the record into a new folder, see `ItemIndex.save`."""
    record = plain | {
        "config": json.loads(json.dumps(config.to_json())),
        "positions": {str(partition): at for partition, at in sorted(positions_by_partition(positions).items())},
    }
    checkpoint.write(local(path), {"ids": _id_arrays(keys), "rows": columns}, record, format=FORMAT)


def inspect(path: str | Path) -> Manifest:
    """Reads what a snapshot says of itself.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered, not an index, or written by a newer version.
    """
    leaves, record = checkpoint.inspect(local(path), format=FORMAT)
    arrays = {f"{name}/{leaf_path}": leaf for name, tree in leaves.items() for leaf_path, leaf in tree.items()}
    try:
        manifest = Manifest(
            **{name: record[name] for name in PLAIN},
            config=Config.from_json(record["config"]),
            positions=positions_by_partition({int(name): at for name, at in record["positions"].items()}),
            library=record["aif_jax"],
            leaves={leaf_path: str(leaf) for leaf_path, leaf in arrays.items()},
            nbytes=sum(map(checkpoint.nbytes, arrays.values())),
        )
        columns = [leaf for name, leaf in arrays.items() if name != "ids/count"]
        row = sum(checkpoint.nbytes(leaf) // max(1, leaf.shape[0]) for leaf in columns if leaf.shape)
        good = all(leaf.shape[:1] == (manifest.items,) for leaf in columns) and manifest.storage in STORAGES
        good &= manifest.ids in (None, "integers", "strings") and {"ids", "rows"} <= leaves.keys()
        good &= all(type(number) is int for number in (manifest.items, manifest.batch_size))
        good &= manifest.batch_size >= 1 and manifest.batch_size * max(row, 1) <= memory()  # a batch is filled up with zeros
        expect(good, "fields", "those of an index of that many rows, in batches that fit in memory", reprlib.repr(record))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise checkpoint.CheckpointError(f"{path}: the record cannot be read: {error!r}") from error
    return manifest


def verify(path: str | Path) -> Manifest:
    """Reads every array of a snapshot and compares it with its checksum.

    Raises:
      FileNotFoundError, CheckpointError: as `inspect`, or arrays that are torn or altered.
    """
    manifest = inspect(path)
    trees = checkpoint.read(path, {"ids": np.ndarray, "rows": np.ndarray}, format=FORMAT)
    arrays = {name: leaf for name, leaf in trees["ids"].items() if name != "count"}
    lengths = {len(leaf) for leaf in jax.tree.leaves([arrays, trees["rows"]])}
    if lengths != {manifest.items}:
        raise checkpoint.CheckpointError(f"{path}: expected {manifest.items} rows in every array, got {sorted(lengths)}")
    return manifest


def check_model(path: str | Path, manifest: Any, trained: Trained) -> None:
    """Raises unless a snapshot was made by this model, see `ItemIndex.load`."""
    if manifest.config != trained.config:
        lines = differences(manifest.config.to_json(), trained.config.to_json(), path="config", source="snapshot")
        raise ValueError(f"{path}: config or schema other than the model's:\n{listed(lines)}")
    check_encoding(f"index in {path}", expected=trained.encoding, got=manifest.encoding)
    if manifest.version != trained.version:
        raise VersionMismatch(f"index in {path}", expected=trained.version, got=manifest.version)


def read(path: str | Path, manifest: Manifest, shapes: Any) -> tuple[Keys, Any]:
    """Keys [n] and the columns of their rows [n] as NumPy arrays; `shapes` are those of the columns [any, ...]."""
    count = manifest.items
    # Templates without memory: how much there is to read is checked first.
    columns = jax.tree.map(lambda leaf: np.broadcast_to(np.empty((), leaf.dtype), (count, *leaf.shape[1:])), shapes)
    mark = np.broadcast_to(np.uint32(0), count) if manifest.ids == "strings" else None
    like = {"ids": _id_arrays(Keys(np.broadcast_to(np.int64(0), count), mark)), "rows": columns}
    trees = checkpoint.read(path, like, format=FORMAT)
    return Keys(trees["ids"]["ids"], trees["ids"].get("marks")), trees["rows"]


def _id_arrays(keys: Keys) -> dict[str, np.ndarray]:
    arrays = {"ids": keys.key, "count": np.array(len(keys.key))}  # the count: not all arrays may be empty
    return arrays if keys.mark is None else arrays | {"marks": keys.mark}
