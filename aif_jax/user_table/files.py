"""Snapshots of a user table on disk: complete or not there, checked array by array, the same bytes for the same rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import checkpoint
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.index.files import check_model
from aif_jax.index.parts import Part, column
from aif_jax.index.storage import STORAGES, Layout, Storage
from aif_jax.store.folders import local
from aif_jax.store.snapshots import positions_by_partition
from aif_jax.user_table.rows import NONE, MemoryRows, Rows, Stored, UserId

FORMAT = "aif_jax.user_table/1"
CHUNK = 1 << 13  # rows that are copied at once
PLAIN = ("users", "version", "encoding", "storage", "batch_size", "layout")
__all__ = ["Manifest", "write", "inspect", "read", "check_model", "check_layout", "add", "describe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot says of itself: users, version and encoding of the model, layout of a row, positions by partition."""

    users: int
    version: str
    encoding: str
    storage: Storage
    batch_size: int
    layout: list[list[Any]]
    config: Config
    positions: dict[int, int]


def write(path: str | Path, rows: MemoryRows, plain: dict[str, Any], config: Config, positions: Mapping[int, int]) -> None:
    """Writes rows, ordered by user, and the record into a new folder, see `UserTable.save`."""
    users = Vocabulary(list(rows.of))
    stored = rows.get(users.raw.tolist())
    record = plain | {
        "users": len(rows),
        "config": json.loads(json.dumps(config.to_json())),
        "positions": {str(partition): at for partition, at in sorted(positions_by_partition(positions).items())},
    }
    trees = {"users": users.to_arrays() | {"count": np.array(len(rows))}, "rows": stored._asdict()}
    checkpoint.write(local(path), trees, record, format=FORMAT)


def inspect(path: str | Path) -> Manifest:
    """Reads what a snapshot says of itself. Raises FileNotFoundError, CheckpointError."""
    _, record = checkpoint.inspect(local(path), format=FORMAT)
    try:
        manifest = Manifest(
            **{name: record[name] for name in PLAIN},
            config=Config.from_json(record["config"]),
            positions=positions_by_partition({int(name): at for name, at in record["positions"].items()}),
        )
        numbers = (manifest.users, manifest.batch_size)
        good = manifest.storage in STORAGES and all(type(n) is int for n in numbers) and manifest.users >= 0
        expect(good and 1 <= manifest.batch_size <= 1 << 20, "fields", "those of a user table", record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise checkpoint.CheckpointError(f"{path}: the record cannot be read: {error!r}") from error
    return manifest


def check_layout(path: str | Path, manifest: Manifest, layout: Layout) -> None:
    """Raises CheckpointError where rows are laid out in another way than this version of the package does."""
    if manifest.layout != describe(layout):
        raise checkpoint.CheckpointError(
            f"{path}: rows of another layout than this version's; build the table anew from the log"
        )


def read(path: str | Path, manifest: Manifest, *, width: int) -> MemoryRows:
    """The rows of a snapshot. Raises CheckpointError for arrays that are torn, altered, or do not fit together."""
    trees = checkpoint.read(path, {"users": np.ndarray, "rows": np.ndarray}, format=FORMAT)
    arrays = {name: leaf for name, leaf in trees["users"].items() if name != "count"}
    try:
        users = Vocabulary.from_arrays(arrays).raw.tolist() if manifest.users else []
        stored = Stored(**trees["rows"])
        shapes = [leaf.shape for leaf in stored]
        good = len(users) == manifest.users and shapes == [(manifest.users, width), (manifest.users,), (manifest.users,)]
        expect(good, "arrays", f"rows [{manifest.users}, {width}] of as many users", f"{shapes} of {len(users)}")
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: the arrays do not fit together: {error}") from error
    rows = MemoryRows(width, capacity=manifest.users)
    for start in range(0, len(users), CHUNK):
        some = slice(start, start + CHUNK)
        rows.put(users[some], stored.take(some), expected=np.full(len(users[some]), NONE))
    return rows


def add(rows: Rows, part: Part, users: list[UserId], words: np.ndarray) -> None:
    """Puts the rows of a part, of users without one. Raises ValueError for a user that comes twice, or has a row already."""
    before, seen = rows.get(users), set()
    known = set(np.flatnonzero(before.words.any(axis=1)).tolist())
    for at, user in enumerate(users):
        if user in seen or at in known:
            which = "is in this part" if user in seen else "has a row"
            raise ValueError(f"{part.place(at)}: expected each user once, got user {user!r}, who {which} already")
        seen.add(user)
    stored = Stored(words, column(part, "position", np.int64), column(part, "partition", np.int32))
    written = rows.put(users, stored, expected=before.position)
    expect(
        written.all(), part.name, "nobody else to write rows meanwhile", f"{np.count_nonzero(~written)} rows of another writer"
    )


def describe(layout: Layout) -> list[list[Any]]:
    """The columns of a row as plain JSON."""
    return [[list(column.shape), column.dtype, column.words] for column in layout.columns]
