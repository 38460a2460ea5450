"""User states kept for later requests, bounded in bytes and age, least recently used first out."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

ENTRY_BYTES, LEAF_BYTES = 1100, 1300
"""What an entry and each array on the device take in addition to the array's bytes: Python's and the runtime's objects, as
measured with JAX 0.10 on CPU (a state of one array of 64 bytes takes 2.5 kB, one of ten 15 kB)."""


class StateKey(NamedTuple):
    """What a state depends on."""

    user: Hashable
    feature_version: Hashable  # None: of no known version, valid for a while only
    version: str  # of the model


class Entry(NamedTuple):
    """A state on the device."""

    state: Any
    bytes: int
    since: float  # seconds, by the cache's clock


class StateCache:
    """LRU cache of user states, used from one thread; `limit` in bytes of memory, ages in seconds.

    A state is never read when it is older than `max_age`, one of no known feature version when it is older than
    `unversioned_ttl`. The latest state of a user can be read whatever its feature version, as a stale answer.
    """

    def __init__(
        self,
        limit: int,
        *,
        max_age: float | None = None,
        unversioned_ttl: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.limit = limit
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._max_age = float("inf") if max_age is None else max_age
        self._ttl = unversioned_ttl
        self._clock = clock
        self._entries: OrderedDict[StateKey, Entry] = OrderedDict()
        self._latest: dict[tuple[Hashable, str], StateKey] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def oldest(self) -> float:
        """Seconds since the oldest state was made; 0.0 without any. Costs a pass over the cache."""
        return self._clock() - min((entry.since for entry in self._entries.values()), default=self._clock())

    def get(self, key: StateKey) -> Any | None:
        """The state of that key, or None; counts a hit or a miss."""
        entry = self._young(key, self._limit(key))
        if entry is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return entry.state

    def __contains__(self, key: StateKey) -> bool:
        """Whether `get` would find it, counting nothing."""
        return self._young(key, self._limit(key)) is not None

    def stale(self, user: Hashable, version: str) -> Any | None:
        """The latest state of a user for that model version, whatever its feature version, or None."""
        key = self._latest.get((user, version))
        entry = None if key is None else self._young(key, self._max_age)
        return None if entry is None else entry.state

    def put(self, key: StateKey, state: Any, *, since: float | None = None) -> None:
        """Keeps a state, dropping the least recently used ones; `since` is when its features were fetched, None for now."""
        size = ENTRY_BYTES + sum(LEAF_BYTES + getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state))
        if key in self._entries:
            self._drop(key)
        if size > self.limit:
            return
        self._entries[key] = Entry(state, size, self._clock() if since is None else since)
        self._latest[key.user, key.version] = key
        self.bytes += size
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))
            self.evictions += 1

    def keep_version(self, version: str) -> None:
        """Drops the states of every other model version, so that their memory is free."""
        for key in [key for key in self._entries if key.version != version]:
            self._drop(key)

    def _limit(self, key: StateKey) -> float:
        return self._max_age if key.feature_version is not None else min(self._ttl, self._max_age)

    def _young(self, key: StateKey, limit: float) -> Entry | None:
        """The entry of a key, unless it is older than that or than any state may be, in which case its memory is freed."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        age = self._clock() - entry.since
        if age > self._max_age:
            self._drop(key)
        return entry if age <= limit else None

    def _drop(self, key: StateKey) -> None:
        self.bytes -= self._entries.pop(key).bytes
        if self._latest.get((key.user, key.version)) == key:
            del self._latest[key.user, key.version]
