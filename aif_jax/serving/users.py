"""The user side of requests: states from the cache, or computed while retrieval runs."""

import asyncio
import dataclasses
import functools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, NamedTuple

import jax

from aif_jax.checks import check_encoding
from aif_jax.serving.callables import TimeLimitedCall
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.metrics import UNKNOWN, Metrics, UnknownCounts, count_unknown
from aif_jax.serving.requests import DeadlineExceeded, Span
from aif_jax.serving.scoring import RECENT, Batches, PendingRequest, UserSide, Version
from aif_jax.types import UserFeatures

ENTRY_BYTES, LEAF_BYTES = 1100, 1300
"""What an entry and each array on the device take in addition to the array's bytes: Python's and the runtime's objects, as
measured with JAX 0.10 on CPU (a state of one array of 64 bytes takes 2.5 kB, one of ten 15 kB)."""


class StateKey(NamedTuple):
    """What a state depends on."""

    user: Hashable
    feature_version: Hashable  # of the request, or `_FOR_STALE_USE`; None if unknown: the state is valid for a while only
    version: str  # of the model


class StateCache:
    """LRU cache of user states, used from one thread; `limit` in bytes of memory, ages in seconds.

    No state older than `max_age` is read. `get` reads one without feature version for `unversioned_ttl` only, `stale` any.
    """

    def __init__(self, limit: int, *, max_age: float | None = None, unversioned_ttl: float = 5.0):
        self.limit, self.bytes, self.evictions = limit, 0, 0
        self._max_age = math.inf if max_age is None else max_age
        self._ttl = min(unversioned_ttl, self._max_age)
        self._entries: OrderedDict[StateKey, tuple[UserSide, int]] = OrderedDict()  # with bytes
        self._latest: dict[tuple[Hashable, str], StateKey] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: StateKey) -> UserSide | None:
        """Return the state of that key, or None."""
        return self._read(key, self._max_age if key.feature_version is not None else self._ttl)

    def stale(self, user: Hashable, version: str) -> UserSide | None:
        """Return the latest state of a user for that model version, whatever its feature version; None once that is dropped."""
        key = self._latest.get((user, version))
        return None if key is None else self._read(key, self._max_age)

    def put(self, key: StateKey, side: UserSide) -> None:
        """Keep a state, unless a newer one of that key is there; drops those that were not used for longest."""
        size = ENTRY_BYTES + sum(LEAF_BYTES + getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(side.state))
        if key in self._entries:
            if self._entries[key][0].since > side.since:  # of a computation that took longer
                return
            self._drop(key)
        if size > self.limit:
            return
        self._entries[key] = side, size
        latest = self._latest.get((key.user, key.version))
        if latest is None or self._entries[latest][0].since <= side.since:
            self._latest[key.user, key.version] = key
        self.bytes += size
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))
            self.evictions += 1

    def clear(self) -> None:
        """Drop every state, so that their memory is free."""
        self._entries.clear()
        self._latest.clear()
        self.bytes = 0

    def _read(self, key: StateKey, limit: float) -> UserSide | None:
        """Return the state of that key, unless it is older than that; frees one that is older than any may be."""
        if (entry := self._entries.get(key)) is None:
            return None
        side, _ = entry
        age = time.perf_counter() - side.since
        if age > self._max_age:
            self._drop(key)
        elif age <= limit:
            self._entries.move_to_end(key)
            return side
        return None

    def _drop(self, key: StateKey) -> None:
        self.bytes -= self._entries.pop(key)[1]
        if self._latest.get((key.user, key.version)) == key:
            del self._latest[key.user, key.version]


@dataclasses.dataclass(eq=False)
class Computation:
    """A running computation and how many wait for it."""

    key: Hashable
    task: asyncio.Task[Any]
    began: float  # by the clock of its event loop
    waiters: int = 0
    kept: bool = False  # one that left lets it run on


class SingleFlight:
    """Computations by key, used from the event loop's thread; `detached_limit` without a waiter may run on."""

    def __init__(self, *, detached_limit: int):
        self._limit = detached_limit
        self.by_key: dict[Hashable, Computation] = {}  # those that run

    def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Any]]) -> Computation:
        """Return the computation of that key, started where there is none. Every `join` needs a `leave`."""
        if (computation := self.by_key.get(key)) is None:
            loop = asyncio.get_running_loop()
            computation = self.by_key[key] = Computation(key, loop.create_task(start()), loop.time())
            computation.task.add_done_callback(functools.partial(self._ended, computation))
        computation.waiters += 1
        return computation

    def leave(self, computation: Computation, *, keep: bool) -> bool:
        """Take back one `join`; return true where that cancelled the computation, as the last one without a `keep` does.

        A `keep` of any that left lets it run on, unless it was forgotten or too many run without a waiter.
        """
        computation.waiters -= 1
        computation.kept |= keep
        if computation.waiters or computation.task.done():
            return False
        detached, forgotten = sum(not each.waiters for each in self.by_key.values()), computation not in self.by_key.values()
        if computation.kept and not forgotten and detached <= self._limit:
            return False
        self.forget(computation)
        return True

    def forget(self, computation: Computation) -> None:
        """Let the next `join` of that key start another computation, and end this one if nobody waits for it."""
        if self.by_key.get(computation.key) is computation:
            del self.by_key[computation.key]
        if not computation.waiters:
            computation.task.cancel()

    async def close(self) -> None:
        """Cancel every computation and wait until it is gone."""
        tasks = [computation.task for computation in self.by_key.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, computation: Computation, task: asyncio.Task[Any]) -> None:
        self.forget(computation)
        if not task.cancelled():
            task.exception()  # seen here too, so that nobody is warned of an error that no request waits for any more


_FOR_STALE_USE = object()  # feature version of states that are read only where a later one is late or fails


class UserStates:
    """User states of requests, used from the event loop's thread."""

    def __init__(self, config: ServingConfig, features: TimeLimitedCall, metrics: Metrics, describe: Callable[..., str]):
        self.cache = StateCache(config.cache_bytes, max_age=config.max_stale, unversioned_ttl=config.prepare_ttl)
        self.running = SingleFlight(detached_limit=config.max_pending)  # by `StateKey`, or by job: not shared
        self._config = config
        self._features = features
        self._metrics, self._describe = metrics, describe
        self.batches = Batches("aif-user", config.user_threads, config.batch_size, compute_states)
        self._serving: str | None = None  # version whose states are cached
        self._computed = 1.0  # share of the latest requests whose state was not in the cache

    @property
    def seconds(self) -> float:
        """Seconds by which a pending request delays a new one: those of a computation, times the share that needs one."""
        return self._computed * self.batches.seconds

    def serve(self, version: str) -> None:
        """Cache states of that model version from now on, and free all so far."""
        self._serving = version
        self.cache.clear()

    def join(self, job: PendingRequest, *, prepare: bool = False) -> UserSide | Computation:
        """Return the user's state from the cache, or a computation, started if no running one can be shared; needs a `leave`.

        | feature version | computation | cached for |
        |---|---|---|
        | known | shared by key | requests of that key |
        | None, of `prepare` | a new one, in place of one that runs | the user's requests without one |
        | None, of a request | that of a `prepare` that runs, else its own | as `prepare`'s; its own only as a stand-in |
        """
        request, version = job.request, job.version
        key = StateKey(request.user, request.feature_version, version.name)
        newest = prepare and request.feature_version is None  # knows more than one before
        if newest and (before := self.running.by_key.get(key)):
            self.running.forget(before)  # those that wait for it keep it, the last of them ends it
        running = key in self.running.by_key  # then what is cached is older
        cached = None if newest or running else self.cache.get(key)
        self._computed += RECENT * ((cached is None) - self._computed)
        self._metrics.counters["cache_misses" if cached is None else "cache_hits"] += 1
        if cached is not None:
            return cached
        self._metrics.counters["cache_joins"] += running
        if running or prepare or request.feature_version is not None:  # shared, and read again by this key
            return self.running.join(key, lambda: self._make(job, version, key))
        own = key._replace(feature_version=_FOR_STALE_USE)  # not shared (keyed by the job), cached as a stand-in only
        return self.running.join(job, lambda: self._make(job, version, own))

    def leave(self, job: PendingRequest, user: UserSide | Computation) -> None:
        """Let a late computation run on, to fill the cache, where a stand-in answers; end it otherwise, unless others wait."""
        if isinstance(user, Computation):
            self.running.leave(user, keep=job.stand_in is not None)

    async def prepare(self, job: PendingRequest) -> None:
        """Compute and cache the user's state, unless that of its feature version is there; raises what that raises."""
        if isinstance(user := self.join(job, prepare=True), Computation):
            try:
                await asyncio.shield(user.task)
            finally:
                self.running.leave(user, keep=False)

    async def state_or_fallback(self, job: PendingRequest, user: UserSide | Computation) -> UserSide:
        """Wait for the user's state until scoring needs the time left; then return a stale or an unknown user's, or raise."""
        if isinstance(user, UserSide):
            return self._marked(job, user)
        task, start, left = user.task, time.perf_counter(), None
        if not task.done():
            if job.deadline is not None and job.budget is not None:
                reserve = max(self._config.reserve, 1.5 * self._metrics.scoring)
                left = max(job.deadline - min(reserve, job.budget / 2) - start, 0.0)
            job.waiting_for = "user side"
            await asyncio.wait([task], timeout=left)
            job.timeline.clocked.append(Span("wait_user", start, time.perf_counter()))
        late = not task.done() or task.cancelled()  # cancelled: never, while somebody waits for it
        error = DeadlineExceeded("user side: not ready within the budget") if late else task.exception()
        if error is None:
            side, spans = task.result()
            job.timeline.clocked += spans
            return self._marked(job, side)
        if not self._config.fallback:
            raise error
        stale = self.cache.stale(job.request.user, job.version.name)
        job.stand_in = "unknown user" if stale is None else "stale state"
        why, told = ("late", error) if late else ("failed", self._describe(error))
        job.reason = f"user side {why}: {told}; answered with the {job.stand_in}"
        job.degraded = f"{why}, {job.stand_in}"
        if stale is None:
            return job.version.unknown_user
        job.reason += f" of {time.perf_counter() - stale.since:.1f} s ago"
        return stale

    async def close(self) -> None:
        """Stop every computation."""
        await self.running.close()
        await asyncio.to_thread(self.batches.close)

    def _marked(self, job: PendingRequest, side: UserSide) -> UserSide:
        """Return the same state; the answer says so where the model knows too little of its history."""
        if warning := side.counts.warning(self._config.max_unknown):
            job.reason, job.degraded = warning, "unknown history"
        return side

    async def _make(self, job: PendingRequest, version: Version, cache_key: StateKey) -> tuple[UserSide, list[Span]]:
        """Fetch features, run the user function, cache the state."""
        start, stages = time.perf_counter(), self._metrics.stages
        try:
            features = await self._features(job.request)
        finally:  # a call that fails or is given up counts too
            fetch = Span("features", start, time.perf_counter())
            stages["features"].observe(fetch.end - fetch.start)
        try:
            state, unknown, span = await self.batches.submit(id(version), (version, features))
        except Exception as error:
            self._features.note(error)  # mostly features that do not fit the model
            raise
        stages["user"].observe(span.end - span.start)
        self._metrics.counters.update(dict(zip(UNKNOWN, unknown, strict=True)))
        side = UserSide(state, start, unknown)
        if version.name == self._serving:
            self.cache.put(cache_key, side)
        return side, [fetch, span]


def compute_states(tasks: list[tuple[Version, UserFeatures]]) -> list[tuple[Any, UnknownCounts, Span]]:
    """Return the states on the device of users of one version, in a thread, which waits for the device.

    Waiting here keeps a backlog in our queue, where requests can be cancelled, not ahead of interactions on the device.
    Raises EncodingMismatch, or as `check_user_features`.
    """
    version, packed = tasks[0][0], []
    for _, features in tasks:
        check_encoding("UserFeatures", expected=version.encoding, got=getattr(features, "encoding", ""))
        packed.append(version.packer(features))
    began, states = time.perf_counter(), version.states(packed)
    jax.block_until_ready(states[0])  # all come from one program
    span = Span("user", began, time.perf_counter())
    return [(state, count_unknown(features), span) for state, (_, features) in zip(states, tasks, strict=True)]
