"""Snapshots of an index on disk: complete or not there, checked leaf by leaf, the same bytes for the same items.

Rows lie by ascending id, without free rows, so what a file holds does not depend on the history of updates. Beside the arrays
stands a record: count, storage, version, config with schema, and the position in the update stream. Source: ours, on Orbax.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax import checkpoint
from aif_jax.config import Config
from aif_jax.index.encoder import Encoder
from aif_jax.index.item_index import ItemIndex, capacity_for, empty_features
from aif_jax.index.storage import unpack
from aif_jax.index.store import Store
from aif_jax.model import PreRanker
from aif_jax.trees import differences, listed
from aif_jax.types import Params
from aif_jax.version import VersionMismatch, fingerprint

FORMAT = "aif_jax.index/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot on disk says of itself, without its arrays.

    Attributes:
      items: rows.
      version: of model, params, config and schema that made them.
      config: with its schema.
      storage: of vectors.
      batch_size: items in one run of the item function.
      position: in the update stream: every update up to it is in, none after it.
      library: version of aif_jax that wrote it.
      leaves: dtype and shape of each array by path.
      nbytes: of the arrays.
    """

    items: int
    version: str
    config: Config
    storage: str
    batch_size: int
    position: int
    library: str
    leaves: dict[str, str]
    nbytes: int


def save(index: ItemIndex, path: str | Path, *, position: int = 0) -> None:
    """Writes a snapshot into a new folder: complete, or not there at all.

    Reads the rows in blocks, so updates may go on meanwhile; needs room for the stored rows on the host.

    Args:
      index: the snapshot.
      path: a folder that does not exist yet.
      position: how far in the update stream the snapshot is.

    Raises:
      FileExistsError: something is there already; nothing is ever overwritten.
    """
    ids, rows = index.stored()
    record = {
        "items": len(index),
        "version": index.version,
        "config": json.loads(json.dumps(index.config.to_json())),
        "storage": index.storage,
        "batch_size": index.batch_size,
        "position": int(position),
    }
    tables = {"ids": {"ids": ids, "count": np.array(len(ids))}, "rows": rows}  # the count: not all arrays may be empty
    checkpoint.write(path, tables, record, format=FORMAT)


def inspect(path: str | Path) -> Manifest:
    """Reads what a snapshot says of itself.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered, not an index, or written by a newer version.
    """
    leaves, record = checkpoint.inspect(path, format=FORMAT)
    try:
        return Manifest(
            items=record["items"],
            version=record["version"],
            config=Config.from_json(record["config"]),
            storage=record["storage"],
            batch_size=record["batch_size"],
            position=record["position"],
            library=record["aif_jax"],
            leaves={f"{name}/{p}": str(leaf) for name, table in leaves.items() for p, leaf in table.items()},
            nbytes=sum(
                int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for table in leaves.values() for leaf in table.values()
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: the record cannot be read: {error!r}") from error


def verify(path: str | Path) -> Manifest:
    """Reads every array of a snapshot and compares it with its checksum.

    Raises:
      FileNotFoundError, CheckpointError: as `inspect`, or arrays that are torn or altered.
    """
    manifest = inspect(path)
    held = checkpoint.read(path, {"ids": None, "rows": None}, format=FORMAT)
    lengths = {len(leaf) for leaf in jax.tree.leaves([held["ids"]["ids"], held["rows"]])}
    if lengths != {manifest.items}:
        raise checkpoint.CheckpointError(f"{path}: expected {manifest.items} rows in every array, got {sorted(lengths)}")
    return manifest


def load(
    path: str | Path,
    model: PreRanker,
    params: Params,
    *,
    version: str | None = None,
    capacity: int | None = None,
    mesh: Any = None,
) -> ItemIndex:
    """Reads a snapshot and checks that it belongs to a model.

    Args:
      path: what `save` wrote.
      model: whose item function makes the rows of later updates.
      params: of the model; must be those that made the rows.
      version: of model and params; None computes `aif_jax.version.fingerprint`.
      capacity: rows of the table; None leaves an eighth free.
      mesh: to spread the table over.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn or altered, not an index, or written by a newer version.
      ValueError: another config or schema; names the fields.
      VersionMismatch: other parameters; names both versions.
    """
    manifest = inspect(path)
    if manifest.config != model.config:
        lines = differences(manifest.config.to_json(), model.config.to_json(), path="config", source="index")
        raise ValueError(f"{path}: config or schema other than the model's:\n{listed(lines)}")
    expected = fingerprint(params, model.config) if version is None else version
    if manifest.version != expected:
        raise VersionMismatch(f"index in {path}", expected=expected, got=manifest.version)
    encoder = Encoder(model, params, storage=manifest.storage, batch_size=manifest.batch_size, mesh=mesh)  # type: ignore[arg-type]
    shapes = encoder.shapes(empty_features(model.config))
    columns = jax.eval_shape(unpack, shapes)
    template = jax.tree.map(lambda leaf: np.empty((manifest.items, *leaf.shape[1:]), leaf.dtype), columns)
    ids = {"ids": np.empty(manifest.items, np.int64), "count": np.array(0)}
    held = checkpoint.read(path, {"ids": ids, "rows": template}, format=FORMAT)
    wanted = capacity_for(manifest.items, mesh) if capacity is None else capacity
    if wanted < manifest.items:
        raise ValueError(f"capacity: expected at least {manifest.items}, got {wanted}")
    store = Store(encoder, version=manifest.version, capacity=wanted, shapes=shapes)
    store.fill(held["rows"], manifest.items)
    return ItemIndex.first(store, held["ids"]["ids"])
