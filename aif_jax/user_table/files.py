"""Snapshots of a user table on disk: complete or not there, checked array by array, the same bytes for the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.index.parts import Part, column
from aif_jax.store import snapshots
from aif_jax.store.codec import Layout
from aif_jax.store.folders import CheckpointError
from aif_jax.user_table.rows import NONE, MemoryRows, Rows, Stored, UserId

CHUNK = 1 << 13  # rows that are copied at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(snapshots.Manifest):
    """The manifest of a user table on disk, without its arrays.

    Attributes:
      users: rows.
      layout: of a row, see `describe`.
    """

    NOUN = "user table"
    FORMAT = "aif_jax.user_table/2"
    REBUILD = "build the table again from the log: UserTable.build or aif-jax users build"

    users: int
    layout: list[list[Any]]

    def fits(self, arrays: Mapping[str, Any]) -> bool:
        """As `snapshots.Manifest.fits`."""
        rows = [leaf["shape"] for name, leaf in arrays.items() if name.startswith("rows/")]
        good = type(self.users) is int and all(shape[:1] == [self.users] for shape in rows) and self.batch_size <= 1 << 20
        return good and self.fits_memory(self.users)

    def check_layout(self, path: str | Path, layout: Layout) -> None:
        """Raises CheckpointError where rows are laid out in another way than this version of the package does."""
        if self.layout != describe(layout):
            raise CheckpointError(f"{path}: rows of another layout than this version's; {self.REBUILD}")


inspect = Manifest.inspect


def write(path: str | Path, rows: MemoryRows, plain: dict[str, Any], config: Config, positions: Any) -> None:
    """Writes rows, ordered by user, and the record into a new folder, see `UserTable.save`."""
    users = Vocabulary(list(rows.of))
    trees = {"users": users.to_arrays(), "rows": rows.get(users.raw.tolist())._asdict()}
    Manifest.write(path, trees, plain | {"users": len(rows)}, config, positions)


def read(path: str | Path, manifest: Manifest, *, width: int) -> MemoryRows:
    """The rows of a snapshot. Raises CheckpointError for arrays that are torn, altered, or do not fit together."""
    trees = Manifest.read(path)
    try:
        users = Vocabulary.from_arrays(trees["users"]).raw.tolist() if manifest.users else []
        stored = Stored(**trees["rows"])
        shapes = [leaf.shape for leaf in stored]
        good = len(users) == manifest.users and shapes == [(manifest.users, width), (manifest.users,), (manifest.users,)]
        expect(good, "arrays", f"rows [{manifest.users}, {width}] of as many users", f"{shapes} of {len(users)}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the arrays do not fit together: {error}; {manifest.REBUILD}") from error
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
