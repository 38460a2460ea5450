"""The event log: every interaction stored once, histories as windows into it.

A training sample is a position in the log. Its history is the user's events with a *strictly earlier* time: any order among
ties would let the model look at the answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from aif_jax.checks import BLOCK, expect, expect_array, expect_integers
from aif_jax.encoding.times import FLOOR, LATEST, expect_plausible, in_unit, out_of_order
from aif_jax.store.folders import local, new_folder

COLUMNS = {"user": np.int32, "item": np.int32, "action": np.int32, "time": np.int64}
PIECES, PIECE = 32, 1 << 15  # of a long log: evenly spread pieces that `repeated_share` reads, and their events


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EventLog:
    """Interactions sorted by user, then by time; the events of user row u are `offsets[u]:offsets[u + 1]`.

    The arrays may be memory-mapped: nothing here copies the log.

    Attributes:
      user: int32 [n] user row, at least 1; row 0 is the unknown user, who has no history.
      item: int32 [n] catalogue row, 0 for an item that the catalogue lacks.
      action: int32 [n] behaviour type or rating bucket, 0 unknown.
      time: int64 [n] seconds.
      offsets: int64 [U + 1].

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong lengths, values out of range, or events that are not sorted by user and time.

    Example:
      >>> log = EventLog.from_arrays(user=[2, 1, 2], item=[5, 6, 7], action=[1, 1, 1], time=[20, 10, 15])
      >>> log.item.tolist(), log.offsets.tolist()
      ([6, 7, 5], [0, 0, 1, 3])
    """

    user: np.ndarray
    item: np.ndarray
    action: np.ndarray
    time: np.ndarray
    offsets: np.ndarray

    def __post_init__(self):
        size = len(self.user)
        for field, dtype in COLUMNS.items():
            expect_array(getattr(self, field), f"EventLog.{field}", dtype=dtype, shape=(size,))
        offsets = expect_array(self.offsets, "EventLog.offsets", dtype=np.int64, shape=(None,))
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != size or np.any(np.diff(offsets) < 0):
            got = f"{len(offsets)} from {offsets[:3]} to {offsets[-3:]}"
            raise ValueError(f"EventLog.offsets: expected ascending values from 0 to {size} for a user row or more, got {got}")
        last = (0, 0)
        for start in range(0, size, BLOCK):
            columns = {field: getattr(self, field)[start : start + BLOCK] for field in COLUMNS}
            last = _check_block(columns, users=self.users, start=start, last=last)
        first = np.array_equal(np.searchsorted(self.user, np.arange(len(offsets), dtype=np.int32)), offsets)
        expect(first, "EventLog.offsets", "the first event of each user row", "others; use EventLog.from_arrays")

    @classmethod
    def from_arrays(cls, user: Any, item: Any, action: Any, time: Any, *, users: int | None = None) -> EventLog:
        """Sort events by (user, time), keeping the given order among ties.

        Args:
          user: [n] integer user rows, at least 1.
          item: [n] integer catalogue rows, 0 unknown.
          action: [n] integer behaviour types, 0 unknown.
          time: [n] integer seconds, before the year 2100.
          users: U, rows of the user vocabulary, row 0 included; default: the largest user row plus 1.

        Raises:
          TypeError, ValueError: no integers, different lengths, values out of range, times that look like milliseconds.
        """
        columns = _columns({"user": user, "item": item, "action": action, "time": time})
        user, time = columns["user"], columns["time"]
        rows = users if users is not None else int(user.max(initial=0)) + 1
        expect(rows >= 1, "EventLog", "users of at least 1 (row 0 is 'unknown')", users)
        _check_ranges(columns, users=rows, start=0)  # before sorting, so that the message names the caller's position
        if out_of_order(user, time).any():
            order = np.lexsort((time, user))  # stable
            columns = {name: column[order] for name, column in columns.items()}
        offsets = np.searchsorted(columns["user"], np.arange(rows + 1, dtype=np.int32)).astype(np.int64)
        return cls(offsets=offsets, **columns)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EventLog:
        """Return the log that `write_log` wrote, memory-mapped.

        Raises:
          FileNotFoundError, ValueError: a file is missing, truncated or malformed; the message names it.
        """
        arrays = {}
        for name in (*COLUMNS, "offsets"):
            file = local(folder) / f"{name}.npy"
            try:
                arrays[name] = np.asarray(np.load(file, mmap_mode="r"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{file}: expected an array of write_log, got no file; write it again") from None
            except (ValueError, EOFError) as error:
                raise ValueError(f"{file}: expected a complete .npy file, got one that NumPy cannot map: {error}") from error
        return cls(**arrays)

    def __repr__(self) -> str:
        """Return sizes and times instead of arrays: a log has millions of entries."""
        if not len(self):
            return f"EventLog(0 events, {self.users - 1} users)"
        lengths = np.diff(self.offsets)[1:]
        ends = (int(function(self.time)) for function in (np.min, np.max))
        first, last = (str(np.datetime64(at, "s"))[:10] if 10**8 <= at < 2**33 else f"second {at}" for at in ends)
        history = f"events of a user: median {np.median(lengths):g}, at most {lengths.max(initial=0):,}"
        return f"EventLog({len(self):,} events, {self.users - 1:,} users, {first} to {last}; {history})"

    def __len__(self) -> int:
        """Return n, how many events."""
        return len(self.user)

    @property
    def users(self) -> int:
        """U, rows of the user vocabulary, the unknown row 0 included."""
        return len(self.offsets) - 1

    def history_end(self, positions: Any) -> np.ndarray:
        """Return the end of each history in the log, int64 [B]: the user's first event that is not earlier than the sample.

        Example:
          >>> log = EventLog.from_arrays(user=[1, 1, 1], item=[4, 5, 6], action=[1, 1, 1], time=[10, 20, 20])
          >>> log.history_end([0, 1, 2]).tolist()
          [0, 1, 1]
        """
        at = expect_integers(positions, "positions", size=len(self)).astype(np.int64)
        return self._first_not_earlier(self.offsets[self.user[at]], at, self.time[at])

    def request_end(self, positions: Any) -> np.ndarray:
        """Return where the request of each sample ends, all events of a user at one time: its first later event, int64 [B]."""
        at = expect_integers(positions, "positions", size=len(self)).astype(np.int64)
        row = np.clip(self.user[at], 0, self.users - 1).astype(np.int64)  # a damaged one is reported with the user's features
        return self._first_not_earlier(at, np.maximum(at, self.offsets[row + 1]), self.time[at] + 1)

    def history_end_at(self, users: Any, times: Any) -> np.ndarray:
        """Return the same for user rows [B] at integer `times` [B] in seconds before 2100; the unknown user 0 has none."""
        rows = expect_integers(users, "users", size=self.users).astype(np.int64)
        expect(np.shape(times) == rows.shape, "times", f"shape {list(rows.shape)} like users", list(np.shape(times)))
        times = in_unit(times, "times")
        return self._first_not_earlier(self.offsets[rows], self.offsets[rows + 1], times)

    def request_start(self, users: Any, times: Any) -> np.ndarray:
        """Return the first event of each user row [B] at integer `times` [B] in seconds, int64; -1 where there is none."""
        first = self.history_end_at(users, times)
        there = first < self.offsets[np.asarray(users) + 1]
        there[there] = self.time[first[there]] == np.asarray(times)[there]
        return np.where(there, first, -1)

    def windows(self, start: Any, end: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the last `length` events of each range `start:end` int64 [B], most recent first.

        Returns:
          index int64 [B, length], positions in the log, 0 where there is no event; mask bool [B, length].

        Example:
          >>> log = EventLog.from_arrays(user=[1, 1, 1], item=[4, 5, 6], action=[1, 1, 1], time=[10, 20, 30])
          >>> index, mask = log.windows([0], [2], 3)
          >>> index.tolist(), mask.tolist()
          ([[1, 0, 0]], [[True, True, False]])
        """
        expect(length >= 1, "windows", "a length of at least 1", length)
        start, end = np.asarray(start, np.int64), np.asarray(end, np.int64)
        index = end[:, None] - np.arange(1, length + 1)
        mask = index >= start[:, None]
        index *= mask  # padding points at event 0, which always can be read
        return index, mask

    def _first_not_earlier(self, low: np.ndarray, high: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return first position in [low, high) whose time is not before `times`, else high: one search for all samples."""
        if not len(self):
            return low
        low, high = low.copy(), high.copy()
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) >> 1
            earlier = (low < high) & (self.time[np.minimum(middle, len(self) - 1)] < times)
            low = np.where(earlier, middle + 1, low)
            high = np.where(earlier, high, middle)
        return low


def write_log(folder: str | os.PathLike[str], chunks: Iterable[Mapping[str, Any]], *, users: int | None = None) -> EventLog:
    """Write a log that comes in sorted chunks and map it; holds a chunk and 8 bytes for each user row in memory.

    Args:
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

        def write_headers() -> None:  # NumPy leaves room for the largest size, so that a header can be written again in place
            for name, dtype in COLUMNS.items():
                files[name].seek(0)
                header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(files[name], header)

        write_headers()
        for chunk in chunks:
            columns = _columns(chunk)
            user = columns["user"]
            if not len(user):
                continue
            last = _check_block(columns, users=2**31 - 1 if users is None else users, start=size, last=last)
            if last[0] >= len(counts):
                counts = np.append(counts, np.zeros(max(last[0] + 1, 2 * len(counts)) - len(counts), np.int64))
            counts[user[0] : last[0] + 1] += np.bincount(user - user[0])
            for name, column in columns.items():
                files[name].write(column.data)
            size += len(user)
        write_headers()
        np.save(partial / "offsets.npy", np.append(0, np.cumsum(counts[: users or last[0] + 1])))
    return EventLog.load(folder)


def repeated_share(log: EventLog) -> float:
    """Return share of the events of known items whose user has met the item strictly before; 0 without such events.

    Of a log of more than a million events `PIECES` evenly spread pieces are read, each from the first event of a user on, so
    one on disk is not read as a whole.
    """
    starts, size = [0], len(log)
    if len(log) > PIECES * PIECE:
        places = np.linspace(0, len(log) - PIECE, PIECES).astype(np.int64)
        starts, size = sorted(set(log.offsets[log.user[places]].tolist())), PIECE
    events = repeated = 0
    for start in starts:
        user, item, time = (getattr(log, name)[start : start + size] for name in ("user", "item", "time"))
        pairs = ((user.astype(np.int64) << 32) | item)[item > 0]
        order = np.argsort(pairs, kind="stable")  # of a pair the earliest event first, as in the log
        pairs, time = pairs[order], time[item > 0][order]
        first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)])
        events += len(pairs)
        repeated += int(np.count_nonzero(time > np.repeat(time[first], np.diff(np.append(first, len(pairs))))))
    return repeated / events if events else 0.0


def _columns(given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return integer columns [n] with their dtypes; raises for other types, values that do not fit, different lengths."""
    columns = {}
    for name, dtype in COLUMNS.items():
        array, limits = np.asarray(given[name]), np.iinfo(dtype)
        if array.size == 0:
            array = array.astype(dtype)
        expect(array.dtype.kind in "iu", f"EventLog.{name}", "integers", f"dtype {array.dtype.name}", error=TypeError)
        expect(array.ndim == 1, f"EventLog.{name}", "shape [n]", list(array.shape))
        low, high = int(array.min(initial=0)), int(array.max(initial=0))
        fits = limits.min <= low and high <= limits.max
        expect(fits, f"EventLog.{name}", f"values that fit {np.dtype(dtype).name}", f"{low} to {high}")
        columns[name] = np.ascontiguousarray(array, dtype)
    lengths = {name: len(column) for name, column in columns.items()}
    expect(len(set(lengths.values())) == 1, "EventLog", "columns of one length", lengths)
    return columns


def _check_block(columns: dict[str, np.ndarray], *, users: int, start: int, last: tuple[int, int]) -> tuple[int, int]:
    """Raise for values out of range or events out of order; takes and returns user and time of the last event so far."""
    _check_ranges(columns, users=users, start=start)
    user, time = columns["user"], columns["time"]
    wrong = np.append((int(user[0]), int(time[0])) < last, out_of_order(user, time))
    at = f"event {start + int(np.argmax(wrong))} out of order; sort first, or use EventLog.from_arrays"
    expect(not wrong.any(), "EventLog", "events sorted by user, then by time", at)
    return int(user[-1]), int(time[-1])


def _check_ranges(columns: dict[str, np.ndarray], *, users: int, start: int) -> None:
    """Raise for a value out of range; `start` is the position of the columns' first event."""
    limits = {"user": (1, users), "item": (0, 2**31), "action": (0, 2**31), "time": (FLOOR, LATEST + 1)}
    for name, column in columns.items():
        low, high = limits[name]
        if column.size and (column.min() < low or column.max() >= high):
            if name == "time":
                expect_plausible(column, "EventLog.time", unit="s", start=start)
            at = int(np.flatnonzero((column < low) | (column >= high))[0])
            hint = "; row 0 is the unknown user, who has no events" if name == "user" and column[at] == 0 else ""
            expected, got = f"values in [{low}, {high})", f"{column[at]} at position {start + at}{hint}"
            raise ValueError(f"EventLog.{name}: expected {expected}, got {got}")
