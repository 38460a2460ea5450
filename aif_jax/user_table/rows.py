"""Where rows of users are kept: the interface to a store, and the one in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from aif_jax.checks import expect
from aif_jax.snapshots import integer

UserId: TypeAlias = int | str
"""A raw user id."""
NONE = int(np.iinfo(np.int64).min)  # position of a user without a row, or of a row without a stream


class Stored(NamedTuple):
    """Rows of n users, each with how far in the stream it is. A user's events come by one partition."""

    words: np.ndarray  # uint32 [n, W], see `index.storage.Packed`
    position: np.ndarray  # int64 [n] of the last event in the row, `NONE` where there is no row
    partition: np.ndarray  # int32 [n]

    def take(self, at: np.ndarray) -> Stored:
        """Some of the rows."""
        return Stored(*(leaf[at] for leaf in self))


class Rows(Protocol):
    """A store of rows. A put of one row is atomic; rows of one call may be written one after another."""

    def get(self, users: Sequence[UserId]) -> Stored:
        """The rows of some users; words of zeros and position `NONE` where a user has none."""
        ...

    def put(self, users: Sequence[UserId], rows: Stored, *, expected: np.ndarray) -> np.ndarray:
        """Writes each row whose user is still at the position `expected` int64 [n]; says which were written, bool [n]."""
        ...


class MemoryRows:
    """Rows in this process: one array that grows, and a dict of users. One thread at a time writes; any may read."""

    def __init__(self, width: int, *, capacity: int = 1024):
        self.width = width
        self.of: dict[UserId, int] = {}
        self._stored = _empty(max(1, capacity), width)

    def __len__(self) -> int:
        return len(self.of)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are used."""
        return sum(leaf[:1].nbytes for leaf in self._stored) * len(self.of)

    def get(self, users: Sequence[UserId]) -> Stored:
        """As `Rows.get`; the arrays are copies."""
        of, stored = self.of, self._stored
        at = np.fromiter((of.get(user, -1) for user in users), np.int64, len(users))
        found = stored.take(at)  # a copy
        unknown = at < 0
        found.words[unknown], found.position[unknown], found.partition[unknown] = 0, NONE, 0
        return found

    def put(self, users: Sequence[UserId], rows: Stored, *, expected: np.ndarray) -> np.ndarray:
        """As `Rows.put`."""
        of = self.of
        known = np.fromiter((of.get(user, -1) for user in users), np.int64, len(users))
        good = np.where(known >= 0, self._stored.position[known], NONE) == expected
        new = [user for user, at, ok in zip(users, known, good, strict=True) if ok and at < 0]
        self._grow(len(of) + len(new))
        first = len(of)
        places = dict(zip(new, range(first, first + len(new)), strict=True))
        known = np.array([places.get(user, at) for user, at in zip(users, known.tolist(), strict=True)], np.int64)
        for mine, given in zip(self._stored, rows, strict=True):
            mine[known[good]] = given[good]
        of |= places  # last, so that a reader finds whole rows
        return good

    def copy(self) -> MemoryRows:
        """A copy of the rows."""
        made = MemoryRows(self.width, capacity=0)
        made.of, made._stored = dict(self.of), Stored(*(leaf[: max(1, len(self.of))].copy() for leaf in self._stored))
        return made

    def batches(self, size: int) -> Iterator[tuple[list[UserId], Stored]]:
        """All users and their rows, some at a time, in the order in which they came."""
        users = list(self.of)
        for start in range(0, len(users), size):
            yield users[start : start + size], self._stored.take(np.arange(start, min(start + size, len(users))))

    def _grow(self, least: int) -> None:
        if least > len(self._stored.position):
            more = max(1024, least, len(self._stored.position) * 5 // 4) - len(self._stored.position)
            self._stored = Stored(*map(np.concatenate, zip(self._stored, _empty(more, self.width), strict=True)))


def positions_of(position: Any, count: int) -> np.ndarray:
    """int64 [count]: the position in the stream of each of `count` events; `NONE` for events that are not from a stream.

    Args:
      position: one for all, one for each in rising order, or None.
      count: of the events.

    Raises:
      TypeError: what is no integer.
      ValueError: positions that fall, not one for each event, or as low as `NONE`.
    """
    if position is None:
        return np.full(count, NONE)
    if np.ndim(position) == 0:
        at = np.full(count, integer(position, "position"), np.int64)
    else:
        at = np.asarray(position)
        if at.dtype.kind not in "iu":
            raise TypeError(f"position: expected integers, got {at.dtype}")
        expect(
            at.shape == (count,), "position", f"one, or one for each of {count} events", f"an array of shape {list(at.shape)}"
        )
        at = at.astype(np.int64)
        expect((np.diff(at) >= 0).all(), "position", "positions of events in the order of the stream", "some that fall")
    expect((at > NONE).all(), "position", f"above {NONE}", NONE)
    return at


def _empty(count: int, width: int) -> Stored:
    return Stored(np.zeros((count, width), np.uint32), np.full(count, NONE, np.int64), np.zeros(count, np.int32))
