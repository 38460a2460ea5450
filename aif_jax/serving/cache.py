"""User states kept for later requests, bounded in bytes, least recently used first out."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax


class StateKey(NamedTuple):
    """What a state depends on."""

    user: Hashable
    feature_version: Hashable  # None: of no known version, valid for a while only
    version: str  # of the model


class Entry(NamedTuple):
    """A state on the device."""

    state: Any
    bytes: int
    made: float  # seconds, by the cache's clock


class StateCache:
    """LRU cache of user states, used from one thread.

    A state of no known feature version is read only for `unversioned_ttl` seconds. The latest state of each user can also be
    read whatever its feature version: the stale answer for a user side that is late.

    Args:
      limit: bytes held at most; a state larger than that is not kept.
      unversioned_ttl: seconds.
      clock: seconds; tests set it.
    """

    def __init__(self, limit: int, *, unversioned_ttl: float = 5.0, clock: Callable[[], float] = time.monotonic):
        self.limit = limit
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._ttl = unversioned_ttl
        self._clock = clock
        self._entries: OrderedDict[StateKey, Entry] = OrderedDict()
        self._latest: dict[tuple[Hashable, str], StateKey] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: StateKey) -> Any | None:
        """The state of that key, or None; counts a hit or a miss."""
        entry = self._entries.get(key)
        if entry is not None and key.feature_version is None and self._clock() - entry.made > self._ttl:
            entry = None
        if entry is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return entry.state

    def stale(self, user: Hashable, version: str) -> Any | None:
        """The latest state of a user for that model version, whatever its feature version and age, or None."""
        key = self._latest.get((user, version))
        return self._entries[key].state if key is not None else None

    def put(self, key: StateKey, state: Any) -> None:
        """Keeps a state, dropping the least recently used ones where the limit asks for it."""
        size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state))
        if key in self._entries:
            self._drop(key)
        if size > self.limit:
            return
        self._entries[key] = Entry(state, size, self._clock())
        self._latest[key.user, key.version] = key
        self.bytes += size
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))
            self.evictions += 1

    def keep_version(self, version: str) -> None:
        """Drops the states of every other model version, so that their memory is free."""
        for key in [key for key in self._entries if key.version != version]:
            self._drop(key)

    def _drop(self, key: StateKey) -> None:
        self.bytes -= self._entries.pop(key).bytes
        if self._latest.get((key.user, key.version)) == key:
            del self._latest[key.user, key.version]
