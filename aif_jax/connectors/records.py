"""What a feature store keeps of a user, the protocol of a source of it, and the source in memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.packing import EventLayout
from aif_jax.encoding.raw import column_of, plain
from aif_jax.encoding.vocabulary import as_ids
from aif_jax.user_table.rows import NONE, UserId, positions_of


class Record(NamedTuple):
    """One user as a feature store keeps them: raw values, never rows of a vocabulary."""

    attributes: Mapping[str, Any] | None = None  # by column of the users file; None where the store has none
    events: Any = None  # the last raw events by column of the events file, in any order; None for none
    version: Hashable = None  # changes with every event, for `Request.feature_version`; None where none is known


class FeatureSource(Protocol):
    """Where raw users come from."""

    async def get(self, user: UserId) -> Record | None:
        """The record of a user; None for an unknown one. Raises ValueError for one that is torn or foreign, and what its client
        raises."""
        ...


class EventSink(Protocol):
    """Where raw events go: the write path of a feature store."""

    def update(self, events: Any, *, position: int | np.ndarray | None = None, partition: int = 0) -> int:
        """Appends events of some users; returns how many were new.

        Args:
          events: raw values by column of the events file, the user's id among them.
          position: in the stream, one for all events or one for each [n], in rising order; events whose user has that position
            or a later one are left out. None appends in any case.
          partition: of the stream; always the same for one user.
        """
        ...


class MemoryFeatures:
    """A feature source, and its write path, in this process: for one replica, tests, and where no server is at hand.

    Args:
      layout: of the events.
      user: column of the user's id.
      length: events kept of a user, the last that came.

    Example:
      >>> import asyncio
      >>> source = MemoryFeatures(EventLayout(action=None), length=2)
      >>> source.update({"user": [7, 7, 7], "item": [1, 2, 3], "time": [1_600_000_000] * 3})
      3
      >>> source.put_user(7, {"city": "Oslo"})
      >>> record = asyncio.run(source.get(7))
      >>> record.attributes, record.events["item"].tolist(), record.version
      ({'city': 'Oslo'}, [2, 3], 3)
    """

    def __init__(self, layout: EventLayout, *, user: str = "user", length: int = 4096):
        expect(length >= 1, "length", "at least 1", length)
        self.layout, self.length, self._user = layout, length, user
        self._attributes: dict[UserId, Mapping[str, Any]] = {}
        self._events: dict[UserId, tuple[np.ndarray, int, int, int]] = {}  # packed, count, position, partition

    async def get(self, user: UserId) -> Record | None:
        """As `FeatureSource.get`."""
        attributes, events = self._attributes.get(user), self._events.get(user)
        if events is None:
            return None if attributes is None else Record(attributes)
        return Record(attributes, self.layout.columns_of(events[0]), events[1])

    def put_user(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keeps raw values of a user by column of the users file."""
        self._attributes[user] = dict(attributes)

    def update(self, events: Any, *, position: int | np.ndarray | None = None, partition: int = 0) -> int:
        """As `EventSink.update`; ValueError for a user whose events came by another partition."""
        parts = list(by_user(events, self._user, self.layout, position))
        for user, at, _ in parts:
            check_partition(user, self._events.get(user, (None, 0, NONE, partition))[2:], at, partition)
        new = 0
        for user, at, packed in parts:
            before, count, last, where = self._events.get(user, (packed[:0], 0, NONE, partition))
            if NONE < at <= last:
                continue
            kept = np.concatenate([before, packed])[-self.length :]
            place = (last, where) if at == NONE else (at, partition)
            self._events[user] = (kept, count + len(packed), *place)  # at once, so that a reader finds whole records
            new += len(packed)
        return new


def by_user(events: Any, column: str, layout: EventLayout, position: Any = None) -> Iterator[tuple[UserId, int, np.ndarray]]:
    """The packed events of each user and position, in the order in which they came; position `NONE` where they have none."""
    packed = layout.pack(events)
    ids = as_ids(plain(column_of(events, column)), column)
    names: Sequence[UserId] = ids.tolist() if isinstance(ids, np.ndarray) else ids
    expect(len(names) == len(packed), "events", "a user for each event", f"{len(names)} for {len(packed)} events")
    numbers: dict[tuple[UserId, int], int] = {}
    keys = zip(names, positions_of(position, len(packed)).tolist(), strict=True)
    owner = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(names))
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(numbers)))
    for (name, at), start, end in zip(numbers, [0, *ends], ends, strict=False):
        yield name, at, packed[order[start:end]]


def check_partition(user: UserId, last: tuple[int, int], position: int, partition: int) -> None:
    """Raises ValueError for a user whose events came by another partition: positions of two cannot be compared."""
    if position != NONE and last[0] != NONE and last[1] != partition:
        expected = f"events of user {user!r} by partition {last[1]}, as before"
        raise ValueError(f"update: expected {expected}, got partition {partition}")
