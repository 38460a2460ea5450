"""An event log written as a stream: sorted chunks in, memory-mapped files out, in memory that does not grow with the log."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from aif_jax.checks import expect
from aif_jax.data.events import COLUMNS, EventLog, check_ranges, checked_columns, out_of_order
from aif_jax.folders import new_folder


def write_log(folder: str | os.PathLike[str], chunks: Iterable[Mapping[str, Any]], *, users: int | None = None) -> EventLog:
    """Writes sorted chunks and opens the log, memory-mapped; holds a chunk and 8 bytes for each user row.

    Args:
      folder: must not exist yet.
      chunks: mappings with integers [n] under "user", "item", "action" and "time" as `EventLog.from_arrays` takes them, sorted
        by user and time, as `ORDER BY user, time` of a database gives them.
      users: U, rows of the user vocabulary, row 0 included; None: the largest user row plus 1.

    Raises:
      FileExistsError: something is in `folder`.
      TypeError, ValueError: as `EventLog.from_arrays`, or events out of order; names the position in the log. Nothing is left.

    Example:
      >>> import tempfile
      >>> chunks = [{"user": [u, u], "item": [1, 2], "action": [1, 1], "time": [10, 20]} for u in (1, 2)]
      >>> len(write_log(tempfile.mkdtemp() + "/log", chunks))
      4
    """
    expect(users is None or users >= 1, "users", "at least 1 (row 0 is 'unknown')", users)
    counts, last, size = np.zeros(users or 1, np.int64), (0, 0), 0  # events by user row; user and time of the last event
    with new_folder(folder) as partial, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(partial / f"{name}.npy", "wb")) for name in COLUMNS}
        _write_headers(files, 0)
        for chunk in chunks:
            columns = checked_columns(chunk)
            user, time = columns["user"], columns["time"]
            if not len(user):
                continue
            check_ranges(columns, users=2**31 - 1 if users is None else users, start=size)
            wrong = np.append((int(user[0]), int(time[0])) < last, out_of_order(user, time))
            at = f"event {size + int(np.argmax(wrong))} out of order; sort the source first, or use EventLog.from_arrays"
            expect(not wrong.any(), "write_log", "events sorted by user, then by time", at)
            if user[-1] >= len(counts):
                counts = np.append(counts, np.zeros(max(int(user[-1]) + 1, 2 * len(counts)) - len(counts), np.int64))
            counts[user[0] : user[-1] + 1] += np.bincount(user - user[0])
            for name, column in columns.items():
                files[name].write(column.data)
            last, size = (int(user[-1]), int(time[-1])), size + len(user)
        _write_headers(files, size)
        offsets = np.append(0, np.cumsum(counts[: users or last[0] + 1]))
        np.save(partial / "offsets.npy", offsets)
    return EventLog.load(folder)


def _write_headers(files: Mapping[str, BinaryIO], size: int) -> None:
    """Headers of `.npy` files; NumPy leaves room for the largest size, so that they can be written again in place."""
    for name, file in files.items():
        file.seek(0)
        description = np.lib.format.dtype_to_descr(np.dtype(COLUMNS[name]))
        np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": (size,)})
