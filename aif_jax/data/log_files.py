"""An event log written as a stream: sorted chunks in, memory-mapped files out, in memory that does not grow with the log.

`EventLog.load` reads what is written here. The source must be sorted by user and time, as `ORDER BY user, time` of a database or
a sorted Parquet file is; the order is checked here, across the borders of chunks too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aif_jax.data.events import COLUMNS, EventLog, check_ranges, checked_column
from aif_jax.folders import new_folder


class EventLogWriter:
    """Writes a log chunk by chunk inside a `with` block; the folder appears when the block ends well.

    Memory: the chunk at hand, and 8 bytes for each user row.

    Args:
      folder: must not exist yet; checked when the block begins.
      users: U, rows of the user vocabulary, row 0 included; None: the largest user row plus 1.

    Raises:
      ValueError: fewer than one user row.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/log"
      >>> with EventLogWriter(folder) as writer:
      ...     writer.append(user=[1, 1], item=[5, 6], action=[1, 1], time=[10, 20])
      ...     writer.append(user=[1, 2], item=[7, 5], action=[1, 1], time=[20, 15])
      >>> EventLog.load(folder).offsets.tolist()
      [0, 0, 3, 4]
    """

    def __init__(self, folder: str | os.PathLike[str], *, users: int | None = None):
        if users is not None and users < 1:
            raise ValueError(f"users: expected at least 1 (row 0 is 'unknown'), got {users}")
        self._target, self._users, self._size = folder, users, 0
        self._counts = np.zeros(users or 1, np.int64)  # events of each user row
        self._last: tuple[int, int] | None = None  # user and time of the last event
        self._stack = contextlib.ExitStack()
        self._partial = Path()
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> EventLogWriter:
        self._partial = self._stack.enter_context(new_folder(self._target))
        for name, dtype in COLUMNS.items():
            self._files[name] = self._stack.enter_context(open(self._partial / f"{name}.npy", "wb"))
            _write_header(self._files[name], dtype, 0)
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            if error[0] is None:
                self._complete()
            else:
                self._stack.__exit__(*error)

    def __len__(self) -> int:
        """Events so far."""
        return self._size

    def append(self, *, user: Any, item: Any, action: Any, time: Any) -> None:
        """Adds events that come after all events so far; a chunk that is refused leaves the log as it was.

        Args:
          user: [n] integer user rows, at least 1.
          item: [n] integer catalogue rows, 0 unknown.
          action: [n] integer behaviour types, 0 unknown.
          time: [n] integer seconds.

        Raises:
          TypeError: a column that is not of integers.
          ValueError: columns of different lengths, values out of range, or events out of order: names the event by its
            position in the log.
        """
        given = {"user": user, "item": item, "action": action, "time": time}
        columns = {name: checked_column(value, name, COLUMNS[name]) for name, value in given.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"EventLogWriter: expected columns of one length, got {lengths}")
        if not lengths["user"]:
            return
        check_ranges(columns, users=self._users if self._users is not None else 2**31 - 1, start=self._size)
        self._check_order(columns["user"], columns["time"])
        counts = np.bincount(columns["user"] - columns["user"][0])
        first = int(columns["user"][0])
        if first + len(counts) > len(self._counts):
            grown = np.zeros(max(first + len(counts), 2 * len(self._counts)), np.int64)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self._counts[first : first + len(counts)] += counts
        for name, column in columns.items():
            self._files[name].write(column.data)
        self._last = int(columns["user"][-1]), int(columns["time"][-1])
        self._size += lengths["user"]

    def _complete(self) -> None:
        """Completes the headers and writes the offsets."""
        for name, file in self._files.items():
            file.seek(0)
            _write_header(file, COLUMNS[name], self._size)
        users = self._users if self._users is not None else (self._last[0] if self._last is not None else 0) + 1
        offsets = np.zeros(users + 1, np.int64)
        np.cumsum(self._counts[:users], out=offsets[1:])
        np.save(self._partial / "offsets.npy", offsets)

    def _check_order(self, user: np.ndarray, time: np.ndarray) -> None:
        wrong = (user[1:] < user[:-1]) | ((user[1:] == user[:-1]) & (time[1:] < time[:-1]))
        at = self._size + 1 + int(np.argmax(wrong)) if wrong.any() else None
        if self._last is not None and (int(user[0]), int(time[0])) < self._last:
            at = self._size
        if at is not None:
            raise ValueError(
                f"EventLogWriter: expected events sorted by user, then by time, got event {at} out of order;"
                " sort the source first, or use EventLog.from_arrays for a log that fits into memory"
            )


def write_log(folder: str | os.PathLike[str], chunks: Iterable[Mapping[str, Any]], *, users: int | None = None) -> EventLog:
    """Writes sorted chunks and opens the log, memory-mapped.

    Args:
      folder: must not exist yet.
      chunks: mappings with "user", "item", "action", "time", as `EventLogWriter.append` takes them.
      users: U, rows of the user vocabulary; None: the largest user row plus 1.

    Raises:
      FileExistsError, TypeError, ValueError: as `EventLogWriter`; nothing is left behind.

    Example:
      >>> import tempfile
      >>> chunks = [{"user": [u, u], "item": [1, 2], "action": [1, 1], "time": [10, 20]} for u in (1, 2)]
      >>> len(write_log(tempfile.mkdtemp() + "/log", chunks))
      4
    """
    with EventLogWriter(folder, users=users) as writer:
        for chunk in chunks:
            writer.append(user=chunk["user"], item=chunk["item"], action=chunk["action"], time=chunk["time"])
    return EventLog.load(folder)


def _write_header(file: BinaryIO, dtype: Any, size: int) -> None:
    """The header of a `.npy` file; NumPy leaves room in it for the largest size, so that it can be written again in place."""
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": (size,)})
