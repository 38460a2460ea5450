"""The event log: every interaction stored once, histories as windows into it.

A training sample is a position in the log. Its history is the user's events with a *strictly earlier* time: any order among
ties would let the model look at the answer.
"""

from typing import Any

import numpy as np

from aif_jax.checks import BLOCK, expect, expect_integers
from aif_jax.encoding.times import FLOOR, LATEST, expect_plausible, in_unit, out_of_order

COLUMNS = {"user": np.int32, "item": np.int32, "action": np.int32, "time": np.int64}
PIECES, PIECE = 32, 1 << 15  # of a long log: evenly spread pieces that `repeated_share` reads, and their events


class EventLog:
    """Interactions sorted by user, then by time; the events of user row u are `offsets[u]:offsets[u + 1]`.

    Events come in any order; ties keep it. Columns that are sorted and have the dtypes below are not copied, so they may be
    memory-mapped, and are checked in bounded memory: a log may be larger than memory.

    Args:
      user: int32 [n] user row, at least 1; row 0 is the unknown user, who has no history.
      item: int32 [n] catalogue row, 0 for an item that the catalogue lacks.
      action: int32 [n] behaviour type or rating bucket, 0 unknown.
      time: int64 [n] seconds, none after the beginning of 2100.
      users: U, rows of the user vocabulary, row 0 included; None: the largest user row plus 1.

    Attributes:
      user, item, action, time: the columns.
      offsets: int64 [U + 1].
      users: U.

    Raises:
      TypeError: no integers.
      ValueError: different lengths, values out of range, times that look like milliseconds; names the position.

    Example:
      >>> log = EventLog(user=[2, 1, 2], item=[5, 6, 7], action=[1, 1, 1], time=[20, 10, 15])
      >>> log.item.tolist(), log.offsets.tolist()
      ([6, 7, 5], [0, 0, 1, 3])
    """

    def __init__(self, user: Any, item: Any, action: Any, time: Any, *, users: int | None = None):
        expect(users is None or users >= 1, "EventLog", "users of at least 1 (row 0 is 'unknown')", users)
        limits = (1, 2**31 if users is None else users), (0, 2**31), (0, 2**31), (FLOOR, LATEST + 1)
        columns = [_column(*of) for of in zip((user, item, action, time), COLUMNS, limits, strict=True)]
        lengths = {name: len(column) for name, column in zip(COLUMNS, columns, strict=True)}
        expect(len({*lengths.values()}) == 1, "EventLog", "columns of one length", lengths)
        # Each block has the first event of the next one.
        blocks = [slice(start, start + BLOCK + 1) for start in range(0, len(columns[0]), BLOCK)]
        if any(out_of_order(columns[0][block], columns[3][block]).any() for block in blocks):
            order = np.lexsort((columns[3], columns[0]))  # stable
            columns = [column[order] for column in columns]
        self.user, self.item, self.action, self.time = columns
        self.users = users or int(self.user.max(initial=0)) + 1
        self.offsets = np.searchsorted(self.user, np.arange(self.users + 1, dtype=np.int32)).astype(np.int64)

    def __repr__(self) -> str:
        """Return sizes and times instead of arrays: a log has millions of entries."""
        if not len(self):
            return f"EventLog(0 events, {self.users - 1} users)"
        lengths, ends = np.diff(self.offsets)[1:], (int(function(self.time)) for function in (np.min, np.max))
        first, last = (str(np.datetime64(at, "s"))[:10] if 10**8 <= at < 2**33 else f"second {at}" for at in ends)
        history = f"events of a user: median {np.median(lengths):g}, at most {lengths.max(initial=0):,}"
        return f"EventLog({len(self):,} events, {self.users - 1:,} users, {first} to {last}; {history})"

    def __len__(self) -> int:
        """Return n, how many events."""
        return len(self.user)

    def history_end(self, positions: Any) -> np.ndarray:
        """Return the end of each history in the log, int64 [B]: the user's first event that is not earlier than the sample.

        Example:
          >>> log = EventLog(user=[1, 1, 1], item=[4, 5, 6], action=[1, 1, 1], time=[10, 20, 20])
          >>> log.history_end([0, 1, 2]).tolist()
          [0, 1, 1]
        """
        at = expect_integers(positions, "positions", size=len(self)).astype(np.int64)
        return self._first_not_earlier(self.offsets[self.user[at]], at, self.time[at])

    def request_end(self, positions: Any) -> np.ndarray:
        """Return where the request of each sample ends, all events of a user at one time: its first later event, int64 [B]."""
        at = expect_integers(positions, "positions", size=len(self)).astype(np.int64)
        return self._first_not_earlier(at, self.offsets[self.user[at] + 1], self.time[at] + 1)

    def history_end_at(self, users: Any, times: Any) -> np.ndarray:
        """Return `history_end` for user rows [B] at integer `times` [B] in seconds; the unknown user 0 has none."""
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
          >>> log = EventLog(user=[1, 1, 1], item=[4, 5, 6], action=[1, 1, 1], time=[10, 20, 30])
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
            low, high = np.where(earlier, middle + 1, low), np.where(earlier, high, middle)
        return low


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


def ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the positions of all ranges, one after the other, int64 [sum of lengths]."""
    return np.arange(lengths.sum()) + np.repeat(start - np.cumsum(lengths) + lengths, lengths)


def _column(given: Any, name: str, limits: tuple[int, int]) -> np.ndarray:
    """Return integers [n] in `limits` with the dtype of their column."""
    array, (low, high) = np.asarray(given), limits
    if array.size == 0:
        array = array.astype(COLUMNS[name])
    expect(array.dtype.kind in "iu", f"EventLog.{name}", "integers", f"dtype {array.dtype.name}", error=TypeError)
    expect(array.ndim == 1, f"EventLog.{name}", "shape [n]", list(array.shape))
    if array.size and (array.min() < low or array.max() >= high):
        if name == "time":
            expect_plausible(array, "EventLog.time", unit="s")
        at = int(np.argmax((array < low) | (array >= high)))
        hint = "; row 0 is the unknown user, who has no events" if name == "user" and array[at] == 0 else ""
        expect(False, f"EventLog.{name}", f"values in [{low}, {high})", f"{array[at]} at position {at}{hint}")
    return np.ascontiguousarray(array, COLUMNS[name])
