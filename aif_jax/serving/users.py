"""The user side of requests: states from the cache, or computed while retrieval runs."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.checks import check_encoding
from aif_jax.features import history_length
from aif_jax.serving.callables import TimeLimitedCall, described
from aif_jax.serving.config import ServingConfig, batch_sizes
from aif_jax.serving.metrics import Metrics, UnknownCounts, count_unknown
from aif_jax.serving.pending import PendingRequest
from aif_jax.serving.programs import Programs
from aif_jax.serving.requests import DeadlineExceeded, Request, Span
from aif_jax.serving.scoring import RECENT, Batches, UserSide
from aif_jax.serving.versions import Version
from aif_jax.types import UserFeatures

ENTRY_BYTES, LEAF_BYTES = 1100, 1300
"""What an entry and each array on the device take in addition to the array's bytes: Python's and the runtime's objects, as
measured with JAX 0.10 on CPU (a state of one array of 64 bytes takes 2.5 kB, one of ten 15 kB)."""


class StateKey(NamedTuple):
    """What a state depends on.

    Attributes:
      user, version: user id, and version of the model.
      feature_version: version of the features; None if unknown: then the state is valid for a while only.
    """

    user: Hashable
    feature_version: Hashable
    version: str


class StateCache:
    """LRU cache of user states, used from one thread; `limit` in bytes of memory, ages in seconds.

    A state is never read when it is older than `max_age`, one of no known feature version when it is older than
    `unversioned_ttl`. The latest state of a user can be read whatever its feature version, as a stale answer.
    """

    def __init__(
        self, limit: int, *, max_age: float | None = None, unversioned_ttl: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self.limit = limit
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._max_age = float("inf") if max_age is None else max_age
        self._ttl = unversioned_ttl
        self._clock = clock
        self._entries: OrderedDict[StateKey, tuple[Any, int]] = OrderedDict()  # state and bytes
        self._made: dict[StateKey, float] = {}  # when, in the order of `put`
        self._latest: dict[tuple[Hashable, str], StateKey] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def oldest(self) -> float:
        """Seconds since the state that was put first was made; 0.0 without any. Read from any thread."""
        while True:
            with contextlib.suppress(RuntimeError):  # the cache changed in between
                made = next(iter(self._made.values()), None)
                return 0.0 if made is None else self._clock() - made

    def get(self, key: StateKey) -> Any | None:
        """Return the state of that key, or None; counts a hit or a miss."""
        if (state := self._young(key, self._age_limit(key))) is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return state

    def __contains__(self, key: StateKey) -> bool:
        """Return whether `get` would find it, counting nothing."""
        return self._young(key, self._age_limit(key)) is not None

    def stale(self, user: Hashable, version: str) -> Any | None:
        """Return the latest state of a user for that model version, whatever its feature version, or None."""
        key = self._latest.get((user, version))
        return None if key is None else self._young(key, self._max_age)

    def put(self, key: StateKey, state: Any, *, since: float | None = None) -> None:
        """Keep a state, dropping the least recently used ones; `since` is when its features were fetched, None for now."""
        size = ENTRY_BYTES + sum(LEAF_BYTES + getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state))
        since = self._clock() if since is None else since
        if key in self._entries:
            if self._made[key] > since:  # of a computation that took longer
                return
            self._drop(key)
        if size > self.limit:
            return
        self._entries[key], self._made[key] = (state, size), since
        latest = self._latest.get((key.user, key.version))
        if latest is None or self._made[latest] <= since:
            self._latest[key.user, key.version] = key
        self.bytes += size
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))
            self.evictions += 1

    def keep_version(self, version: str) -> None:
        """Drop the states of every other model version, so that their memory is free."""
        for key in [key for key in self._entries if key.version != version]:
            self._drop(key)

    def _age_limit(self, key: StateKey) -> float:
        return self._max_age if key.feature_version is not None else min(self._ttl, self._max_age)

    def _young(self, key: StateKey, limit: float) -> Any | None:
        """Return the state of a key, unless it is older than that; frees one that is older than any may be."""
        if key not in self._entries:
            return None
        state, age = self._entries[key][0], self._clock() - self._made[key]
        if age > self._max_age:
            self._drop(key)
        return state if age <= limit else None

    def _drop(self, key: StateKey) -> None:
        self.bytes -= self._entries.pop(key)[1]
        del self._made[key]
        if self._latest.get((key.user, key.version)) == key:
            del self._latest[key.user, key.version]


@dataclasses.dataclass(eq=False)
class Computation:
    """A running computation and how many wait for it."""

    key: Hashable
    task: asyncio.Task[Any]
    began: float  # by the clock of its event loop
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    waiters: int = 0


class SingleFlight:
    """Computations by key, used from the event loop's thread; `detached_limit` without a waiter may run on."""

    def __init__(self, *, detached_limit: int):
        self._limit = detached_limit
        self._running: dict[Hashable, Computation] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._running

    def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Any]]) -> Computation:
        """Return the computation of that key, started where there is none. Every `join` needs a `leave`."""
        computation, loop = self._running.get(key), asyncio.get_running_loop()
        if computation is None:
            computation = self._running[key] = Computation(key, loop.create_task(start()), loop.time())
            self._tasks.add(computation.task)
            computation.task.add_done_callback(functools.partial(self._ended, computation))
        computation.waiters += 1
        return computation

    def leave(self, computation: Computation, *, keep: bool) -> bool:
        """Take back one `join`; true where it was the last one and cancelled the computation, which `keep` lets run on."""
        computation.waiters -= 1
        if computation.waiters or computation.task.done():
            return False
        if keep and sum(not other.waiters for other in self._running.values()) <= self._limit:
            return False
        computation.task.cancel()
        self.forget(computation.key, computation.task)
        return True

    def get(self, key: Hashable) -> Computation | None:
        """Return the computation of that key, if one runs."""
        return self._running.get(key)

    async def close(self) -> None:
        """Cancel every computation and wait until it is gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, computation: Computation, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self.forget(computation.key, task)
        computation.ended.set()
        if not task.cancelled():
            task.exception()  # seen here too, so that nobody is warned of an error that no request waits for any more

    def forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        """Let the next `join` of that key start another computation."""
        if key in self._running and self._running[key].task is task:
            del self._running[key]


_FOR_STALE_USE = object()  # feature version of states that only a late user side may fall back to


class UserTask(NamedTuple):
    """The features of one user, to become a state."""

    version: Version
    features: UserFeatures


class UserStates:
    """User states of requests, used from the event loop's thread."""

    def __init__(self, programs: Programs, config: ServingConfig, features: TimeLimitedCall, metrics: Metrics):
        self.cache = StateCache(config.cache_bytes, max_age=config.max_stale, unversioned_ttl=config.prepare_ttl)
        self.running = SingleFlight(detached_limit=config.max_pending)
        self.stale_age = 0.0  # of the state in the latest answer from a stale one, in seconds
        self._config = config
        self._features = features
        self._metrics = metrics
        sizes = batch_sizes(config.batch_size)
        self._batches = Batches("aif-user", config.user_threads, sizes, programs.full, prepare=pack_user, run=compute_states)
        self._serving: str | None = None  # version whose states are cached
        self._computed = 1.0  # share of the latest requests whose state was not in the cache

    @property
    def seconds(self) -> float:
        """Seconds that one queued request adds to the wait of a new one, where some have a state in the cache."""
        return self._computed * self._batches.seconds

    def serve(self, version: str) -> None:
        """Cache states of that model version from now on, and frees those of others."""
        self._serving = version
        self.cache.keep_version(version)

    def holds(self, request: Request, version: Version) -> bool:
        """Return whether a state for that user and feature version is there, or on its way."""
        key = StateKey(request.user, request.feature_version, version.name)
        return key in self.cache or key in self.running

    def join(self, job: PendingRequest, *, prepare: bool = False) -> UserSide | Computation:
        """Return the user's state from the cache, or a computation, started if no running one can be shared; needs a `leave`.

        Requests share a state where their feature version is known, or where `prepare` makes or made it.
        """
        request, version = job.request, job.version
        key = StateKey(request.user, request.feature_version, version.name)
        cached = self.cache.get(key)
        self._computed += RECENT * ((cached is None) - self._computed)
        if cached is not None:
            return cached
        keep = key
        if request.feature_version is None and not prepare and key not in self.running:
            key, keep = key._replace(feature_version=job), key._replace(feature_version=_FOR_STALE_USE)  # a key nobody else has
        self._metrics.counters["cache_joins"] += key in self.running
        return self.running.join(key, lambda: self._make(job, version, keep))

    def leave(self, job: PendingRequest, user: UserSide | Computation) -> None:
        """Let a computation that was only late run on, to fill the cache; ends one that nobody waits for."""
        if isinstance(user, Computation):
            self.running.leave(user, keep=job.stand_in is not None)

    async def state_or_fallback(self, job: PendingRequest, user: UserSide | Computation) -> UserSide:
        """Wait for the user's state until scoring needs the time left; then return a stale or an unknown user's, or raise."""
        if isinstance(user, UserSide):
            return self._marked(job, user)
        task, start = user.task, time.perf_counter()
        if not task.done():
            left = None if job.deadline is None else max(job.deadline - self._reserve(job) - start, 0.0)
            before, job.waiting_for = job.waiting_for, "user side"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await user.ended.wait()
            job.waiting_for = before
            job.timeline.add("wait_user", start, time.perf_counter())
        if not task.done() or task.cancelled():
            error: BaseException | None = DeadlineExceeded("user side: not ready within the budget")
            why = "late"
        else:
            error, why = task.exception(), "failed"
        if error is None:
            side, spans = task.result()
            for span in spans:
                job.timeline.add(*span)
            return self._marked(job, side)
        if not self._config.fallback:
            raise error
        stale = self.cache.stale(job.request.user, job.version.name)
        job.stand_in = "unknown user" if stale is None else "stale state"
        job.reason = f"user side {why}: {error if why == 'late' else described(error)}; answered with the {job.stand_in}"
        job.degraded = f"{why}, {job.stand_in}"
        if stale is None:
            return job.version.unknown[0]
        self.stale_age = time.perf_counter() - stale.since
        job.reason += f" of {self.stale_age:.1f} s ago"
        return stale

    async def close(self) -> None:
        """Stop every computation."""
        await self.running.close()
        await asyncio.to_thread(self._batches.close)

    def _marked(self, job: PendingRequest, side: UserSide) -> UserSide:
        """Return the same state; the answer says so where the model knows too little of its history."""
        if warning := side.known.warning(self._config.max_unknown):
            job.reason, job.degraded = warning, "unknown history"
        return side

    def _reserve(self, job: PendingRequest) -> float:
        """Return seconds to keep for scoring: the config's, or what recent requests needed where that is more."""
        assert job.budget is not None
        return min(max(self._config.reserve, 1.5 * self._metrics.scoring), job.budget / 2)

    async def _make(self, job: PendingRequest, version: Version, key: StateKey) -> tuple[UserSide, list[Span]]:
        """Fetch features, run the user function, cache the state."""
        start = time.perf_counter()
        features = await self._features(job.request.of_version(version.name))
        fetched, length = time.perf_counter(), history_length(features)
        try:
            task = UserTask(version, features)
            state, known, span = await self._batches.submit((id(version), length), task)
        except Exception as error:
            self._features.note(error)  # features that do not fit the model
            raise
        self._metrics.observe_unknown(known)
        side = UserSide(state, length, start, known)
        if version.name == self._serving:
            self.cache.put(key, side, since=start)
        return side, [Span("features", start, fetched), span]


def pack_user(task: UserTask) -> tuple[np.ndarray, UnknownCounts]:
    """Return the features of a user as words int32 [n], and counts of unknown ids.

    Raises EncodingMismatch, or as `check_user_features`.
    """
    version, features = task
    check_encoding("UserFeatures", expected=version.encoding, got=getattr(features, "encoding", ""))
    return version.packer(features), count_unknown(features)


def compute_states(
    tasks: list[UserTask], packed: list[tuple[np.ndarray, UnknownCounts]]
) -> list[tuple[Any, UnknownCounts, Span]]:
    """Return the states on the device of users of one version and length of history, in a thread, which waits for the device.

    Waiting here keeps a backlog in our queue, where requests can be cancelled, not ahead of interactions on the device.
    """
    began = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.user"):
        version, length = tasks[0].version, history_length(tasks[0].features)
        states = version.states([words for words, _ in packed], length)
        jax.block_until_ready(states[0])  # all come from one program
    span = Span("user", began, time.perf_counter())
    return [(state, known, span) for state, (_, known) in zip(states, packed, strict=True)]
