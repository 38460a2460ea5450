"""Features from Parquet files: the events and users files that training read, for replays and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.records import Record
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.raw import column_of
from aif_jax.readers.sources import pyarrow
from aif_jax.store.folders import local
from aif_jax.user_table.rows import UserId


class ParquetFeatures:
    """A `FeatureSource` over an events file or folder and, where there is one, a users file; held in memory as Arrow.

    A user's record has all their events, whenever they were. A replay leaves out what came later: `Fetch(past_only=True)`.

    Args:
      events: Parquet file or folder with the columns that training read.
      users: the same for users; None for none.
      columns: which column is what.

    Raises:
      ImportError: pyarrow is missing.
      FileNotFoundError: no such file.
      ValueError: a column is missing, or a user is listed twice.
    """

    def __init__(self, events: str | Path, *, users: str | Path | None = None, columns: Columns):
        parquet = pyarrow("pyarrow.parquet")
        self._events, self._places = _grouped(parquet, events, columns.of("events"), columns.user)
        self._users, self._records = None, {}
        if users is not None:
            self._users, places = _grouped(parquet, users, columns.of("users"), columns.user_record_id)
            twice = [user for user, (start, end) in places.items() if end - start > 1]
            expect(not twice, str(users), "each user once", f"{twice[:3]} more often")
            self._records = {user: start for user, (start, _) in places.items()}

    def __len__(self) -> int:
        """Users with events."""
        return len(self._places)

    async def get(self, user: UserId) -> Record | None:
        """As `FeatureSource.get`."""
        start, end = self._places.get(user, (0, 0))
        row = self._records.get(user)
        if row is None and end == start:
            return None
        attributes = None if row is None or self._users is None else self._users.slice(row, 1).to_pylist()[0]
        return Record(attributes, self._events.slice(start, end - start) if end > start else None, end - start)


def _grouped(parquet: Any, path: str | Path, wanted: Any, user: str) -> tuple[Any, dict[UserId, tuple[int, int]]]:
    """The columns of a file with the rows of a user next to each other, and where those of each user are."""
    file = local(path, "file")
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a Parquet file or folder, got no such file")
    table = parquet.read_table(str(file))
    missing = [name for name in wanted if name not in table.schema.names]
    expect(not missing, str(file), f"columns {list(wanted)}", f"none of {missing}")
    table = table.select(list(wanted)).combine_chunks()
    coded = column_of(table, user).dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary))).tolist()
    places = zip([0, *ends], ends, strict=False)
    return table.take(order).combine_chunks(), dict(zip(coded.dictionary.to_pylist(), places, strict=True))
