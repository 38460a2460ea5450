"""The asynchronous engine: user side beside retrieval, interaction when the candidates are there.

    request --+-- features --> user function --> state (stays on the device) --+
              |                                                                +--> interaction, top-k --> answer
              +-- retrieval -----------------------------------> candidates ---+

Source: the online asynchronous inference of AIF (arXiv 2511.12934); cache, deadlines, overload and versions are ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from aif_jax.model import PreRanker
from aif_jax.serving.buckets import split
from aif_jax.serving.cache import StateCache, StateKey
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import DeadlineExceeded, EngineClosed, Overloaded
from aif_jax.serving.flights import Flight, Flights
from aif_jax.serving.observability import Metrics
from aif_jax.serving.programs import Programs, best_of, prepare_features
from aif_jax.serving.requests import Candidates, Ranking, Request, Scores
from aif_jax.serving.scoring import Item, Scored, Scorer
from aif_jax.serving.timeline import Timeline
from aif_jax.serving.versions import Snapshot, UserSide, Version, build_version, check_version, next_snapshot
from aif_jax.types import Params, UserFeatures

_FOR_STALE_USE = object()  # feature version of states that only a late user side may fall back to


class AsyncPreRanker:
    """Serves one model: `async with AsyncPreRanker(...) as engine: await engine.rank(request, k)`.

    An engine belongs to one event loop. Nothing it does blocks that loop: device work and callables that are not async run in
    threads. A callable that is not async cannot be interrupted; it keeps its thread until it returns.

    Args:
      model: pure functions, from `build`.
      params: of the model.
      index: `ItemIndex` made from the same params.
      features: `features(request) -> UserFeatures`, async or not.
      retrieval: `retrieval(request) ->` item ids [C], or `Candidates`, or an async iterator of either (mini-batches, each
        scored while the next is on its way); async or not. None for engines that only `score`.
      config: of the engine.

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.serving import AsyncPreRanker, empty_features
      >>> model = aif.build(aif.tiny())
      >>> AsyncPreRanker(model, {}, None, features=lambda request: empty_features(model.config))
      AsyncPreRanker(version=not started, pending=0/64, buckets=(128, 256, 512, 1024, 2048, 4096, 8192, 16384), cached_states=0)
    """

    def __init__(
        self,
        model: PreRanker,
        params: Params,
        index: Any,
        *,
        features: Callable[[Request], Any],
        retrieval: Callable[[Request], Any] | None = None,
        config: ServingConfig | None = None,
    ):
        self.config = config or ServingConfig()
        self.model = model
        self._features = features
        self._retrieval = retrieval
        self._first: tuple[Params, Any] | None = (params, index)
        self._programs = Programs(model, max_k=self.config.max_k, bid=self.config.bid)
        self._metrics = Metrics()
        self._cache = StateCache(self.config.cache_bytes, unversioned_ttl=self.config.prepare_ttl)
        self._versions: weakref.WeakSet[Version] = weakref.WeakSet()
        self._current: Version | None = None
        self._open = False
        self._scoring = 0.0  # seconds that scoring took lately
        self._pending: dict[_Job, asyncio.Task[Any]] = {}

    def __repr__(self) -> str:
        version = self._current.name[:12] if self._current else "not started"
        return (
            f"AsyncPreRanker(version={version}, pending={len(self._pending)}/{self.config.max_pending}, "
            f"buckets={self.config.buckets}, cached_states={len(self._cache)})"
        )

    # life

    async def __aenter__(self) -> AsyncPreRanker:
        """Compiles every bucket ahead of time, warms up, and opens.

        Raises:
          VersionMismatch: params and index do not belong together.
          EngineClosed: the engine was started before.
        """
        if self._first is None:
            raise EngineClosed("an engine starts once: make a new one")
        self._scorer = Scorer(self._programs, self.config)
        self._user_pool = ThreadPoolExecutor(self.config.user_threads, thread_name_prefix="aif-user")
        self._callables = ThreadPoolExecutor(self.config.callable_threads, thread_name_prefix="aif-callable")
        self._publishing = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()
        self._flights = Flights(detached_limit=self.config.max_pending)
        first, self._first = self._first, None
        self._current = await asyncio.to_thread(build_version, self._programs, *first, self.config)
        self._versions.add(self._current)
        self._scoring = self._programs.warm_seconds  # until requests tell
        self._open = True
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drains: refuses new requests, waits for those in flight, cancels what is left after `drain_timeout` seconds."""
        if self._first is not None or not hasattr(self, "_empty"):
            self._first = None
            return
        self._open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_timeout):
                await self._empty.wait()
        late = list(self._pending.values())
        for task in late:
            task.cancel()
        if late:
            await self._empty.wait()
        await self._flights.close()
        self._scorer.close()
        for pool in (self._user_pool, self._callables):
            pool.shutdown(wait=False, cancel_futures=True)

    async def publish(self, params: Params, index: Any) -> str:
        """Serves a new model version from now on; returns its name.

        Whatever is not compiled yet is compiled beside the traffic. Requests that are under way end on the version they
        started with, which holds its memory until the last of them is answered.

        Args:
          params: of the same model config.
          index: made from these params.

        Raises:
          VersionMismatch: params and index do not belong together; the old version serves on.
        """
        self._require_open()
        async with self._publishing:
            version = await asyncio.to_thread(build_version, self._programs, params, index, self.config)
            self._versions.add(version)
            self._current = version
            self._cache.keep_version(version.name)
            self._metrics.counters["publishes"] += 1
            return version.name

    async def update_index(self, index: Any) -> None:
        """Reads another snapshot of the index from now on, of the version that serves: after `upsert` or `delete`.

        A request pins the snapshot when its first candidates are there. A larger capacity is compiled beside the traffic.

        Raises:
          VersionMismatch: the index was made from other params; the old snapshot serves on.
        """
        self._require_open()
        async with self._publishing:
            version = self._version()
            check_version(index, version.name)
            version.snapshot = await asyncio.to_thread(next_snapshot, self._programs, version, index, self.config)
            self._metrics.counters["index_updates"] += 1

    # requests

    async def rank(self, request: Any, k: int, *, budget: float | None = None) -> Ranking:
        """The best k of the candidates that retrieval finds.

        Feature fetch and retrieval start at once. Where the user side is late or fails, the answer comes from the user's last
        known state or from the unknown user, and says so (`degraded`, `reason`).

        Args:
          request: a `Request`, or a bare user id.
          k: at most `config.max_k`.
          budget: seconds from now to the answer, in place of the request's and the engine's own.

        Raises:
          Overloaded: the engine holds `max_pending` requests.
          DeadlineExceeded: retrieval or scoring did not end within the budget.
          EngineClosed: not started, draining or closed.
          ValueError: k out of range; candidates of a wrong kind; order "bid" without bids.
          Exception: whatever retrieval raised.
        """
        if not 1 <= k <= self.config.max_k:
            raise ValueError(f"rank k: expected 1 to max_k={self.config.max_k}, got {k}")
        if self._retrieval is None:
            raise ValueError("rank: expected an engine with a retrieval callable, got none; use score")
        with self._admit(request, budget) as job:
            return await self._within_budget(job, self._rank(job, k))

    async def score(self, request: Any, candidates: Any, *, budget: float | None = None) -> Scores:
        """Logits of the caller's own candidates, all of them, in their order.

        Args:
          request: a `Request`, or a bare user id.
          candidates: item ids [C], or `Candidates`, or an async iterator of either; the user function runs once.
          budget: as in `rank`.

        Raises what `rank` raises.
        """
        with self._admit(request, budget) as job:
            return await self._within_budget(job, self._score(job, candidates))

    async def prepare(self, request: Any) -> None:
        """Computes a user's state ahead of a request that is known to come, and caches it.

        With a feature version, requests of the same version use it; without, all requests of the next `prepare_ttl` seconds.

        Args:
          request: a `Request`, or a bare user id.

        Raises:
          Overloaded, EngineClosed: as `rank`.
          Exception: whatever the features callable raised.
        """
        with self._admit(request, None) as job:
            user = self._join_user(job, prepare=True)
            try:
                if isinstance(user, Flight):
                    await self._within_budget(job, _wait_for(user))
            finally:
                if isinstance(user, Flight):
                    self._flights.leave(user, keep=False)

    # what an operator sees

    def snapshot(self) -> dict[str, Any]:
        """Plain counters, gauges and latencies; `prometheus_text(engine.snapshot())` writes them for a scraper."""
        snapshot = self._metrics.snapshot()
        cache = self._cache
        snapshot["counters"] |= {
            "cache_hits": cache.hits,
            "cache_misses": cache.misses,
            "cache_evictions": cache.evictions,
            **{f"compiled_{kind}_functions": count for kind, count in self._programs.compiles.items()},
            **{f"transfers_{kind}": count for kind, count in self._programs.transfers.items()},
        }
        snapshot["gauges"] = {
            "pending": len(self._pending),
            "user_sides_in_flight": len(self._flights) if hasattr(self, "_flights") else 0,
            "cached_states": len(cache),
            "cached_bytes": cache.bytes,
            "versions_in_memory": len(self._versions),
        }
        snapshot["version"] = self._current.name if self._current else None
        return snapshot

    # one request

    async def _rank(self, job: _Job, k: int) -> Ranking:
        user = self._join_user(job)
        try:
            assert self._retrieval is not None
            found = await self._call(self._retrieval, job.request)
            parts, candidates = await self._score_all(job, user, found, whole=False)
        finally:
            self._leave_user(job, user)
        sizes = [len(batch.ids) for batch in candidates]
        best = best_of([scored.part for scored in parts if scored.part], np.cumsum([0, *sizes]).tolist()[: len(sizes)], k)
        mask = best.scores > -np.inf
        ids = _joined([batch.ids for batch in candidates])
        chosen = np.zeros(k, ids.dtype)
        chosen[mask] = ids[best.positions[mask]]
        return Ranking(
            ids=chosen,
            scores=best.scores,
            logits=np.where(mask, best.logits, np.float32(-np.inf)),
            mask=mask,
            candidates=len(ids),
            unknown=len(ids) - sum(int(np.count_nonzero(scored.known)) for scored in parts),
            **job.finish(),
        )

    async def _score(self, job: _Job, given: Any) -> Scores:
        user = self._join_user(job)
        try:
            parts, _ = await self._score_all(job, user, given, whole=True)
        finally:
            self._leave_user(job, user)
        logits = [scored.logits for scored in parts if scored.logits is not None]
        known = [scored.known for scored in parts]
        return Scores(
            logits=np.concatenate(logits or [np.zeros(0, np.float32)]),
            mask=np.concatenate(known or [np.zeros(0, bool)]),
            **job.finish(),
        )

    async def _score_all(
        self, job: _Job, user: UserSide | Flight, given: Any, *, whole: bool
    ) -> tuple[list[Scored], list[Candidates]]:
        """Scores candidates, all at once or batch by batch as they come, with one user state and one index snapshot."""
        running: list[tuple[Candidates, asyncio.Future[Scored]]] = []
        start = job.timeline.arrival
        try:
            if not hasattr(given, "__aiter__"):
                job.note_candidates(start, of_retrieval=not whole)
                running += await self._submit(job, user, Candidates.of(given), whole)
            else:
                async with _closing(given) as stream:
                    async for batch in stream:
                        job.note_candidates(start, of_retrieval=not whole)
                        running += await self._submit(job, user, Candidates.of(batch), whole)
                        start = time.perf_counter()
            job.waiting_for = "scoring"
            scored = [await future for _, future in running]
        except BaseException:
            for _, future in running:
                future.cancel()
            await asyncio.gather(*[future for _, future in running], return_exceptions=True)
            raise
        if scored:
            took = time.perf_counter() - job.submitted
            self._scoring = max(took, 0.95 * self._scoring + 0.05 * took)  # up at once, down slowly
        for result in scored:
            for span in result.spans:
                job.timeline.add(*span)
        return scored, [candidates for candidates, _ in running]

    async def _submit(
        self, job: _Job, user: UserSide | Flight, batch: Candidates, whole: bool
    ) -> list[tuple[Candidates, asyncio.Future[Scored]]]:
        """Hands one batch of candidates to the scorer, in pieces where it is larger than the largest bucket."""
        if job.order == "bid" and batch.bids is None and self.config.bid not in self.model.config.schema.side:
            raise ValueError(
                f"order 'bid': expected bids with the candidates or {self.config.bid!r} in schema.side, got neither"
            )
        if job.state is None:
            job.state = await self._user_state(job, user)
            job.snapshot = job.version.snapshot
        assert job.snapshot is not None
        pieces = []
        job.submitted = time.perf_counter()
        for piece in split(len(batch.ids), self.config.buckets):
            part = Candidates(batch.ids[piece], None if batch.bids is None else batch.bids[piece])
            item = Item(job.version, job.snapshot, job.state, part, job.order, whole, job.submitted, job.deadline)
            pieces.append((part, self._scorer.submit(item)))
        return pieces

    async def _user_state(self, job: _Job, user: UserSide | Flight) -> UserSide:
        """The user's own state if it comes in time, else the stand-in that the config allows."""
        if isinstance(user, UserSide):
            return user
        task, start = user.task, time.perf_counter()
        if not task.done():
            left = None if job.deadline is None else max(job.deadline - self._reserve(job) - start, 0.0)
            await asyncio.wait({task}, timeout=left)
            job.timeline.add("wait_user", start, time.perf_counter())
        if task.done() and not task.cancelled() and task.exception() is None:
            state, spans = task.result()
            for span in spans:
                job.timeline.add(*span)
            return state
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is None:
            what, error = "late", DeadlineExceeded("user side: not ready within the budget")
        else:
            what = "failed"
        if not self.config.fallback:
            raise error
        stale = self._cache.stale(job.request.user, job.version.name)
        stand_in = "stale state" if stale is not None else "unknown user"
        job.reason = f"user side {what}: {error}; answered with the {stand_in}"
        job.degraded = f"{what}, {stand_in}"
        return stale if stale is not None else job.version.fallback

    def _reserve(self, job: _Job) -> float:
        """Seconds to keep for scoring: the config's, or what recent requests needed where that is more."""
        assert job.budget is not None
        return min(max(self.config.reserve, 1.5 * self._scoring), job.budget / 2)

    def _join_user(self, job: _Job, *, prepare: bool = False) -> UserSide | Flight:
        """The user's state from the cache, or the flight that computes it, started where it must be."""
        request, version = job.request, job.version
        key = StateKey(request.user, request.feature_version, version.name)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        flight, running = self._flights.join(key, lambda: self._make_user(request, version, key))
        flight.prepared |= prepare
        self._metrics.counters["cache_joins"] += running
        return flight

    def _leave_user(self, job: _Job, user: UserSide | Flight) -> None:
        if isinstance(user, Flight):
            # A user side that was only late still fills the cache; one that nobody wants any more is stopped.
            self._flights.leave(user, keep=job.reason is not None)

    async def _make_user(self, request: Request, version: Version, key: StateKey) -> tuple[UserSide, list]:
        """Fetches features, runs the user function, caches the state."""
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        async with asyncio.timeout(self.config.feature_timeout):
            features = await self._call(self._features, request)
        fetched = time.perf_counter()
        state, computed, ready = await loop.run_in_executor(self._user_pool, self._run_user, version, features)
        if self._current is version or (self._current is not None and self._current.name == version.name):
            flight = self._flights.get(key)
            kept = key
            if key.feature_version is None and not (flight is not None and flight.prepared):
                kept = key._replace(feature_version=_FOR_STALE_USE)
            self._cache.put(kept, state)
        return state, [("features", start, fetched), ("user", computed, ready)]

    def _run_user(self, version: Version, features: UserFeatures) -> tuple[UserSide, float, float]:
        """In a worker thread: dispatches the user function, and waits there so that a backlog forms here, where requests can
        be cancelled, and not in the device's queue before the interactions of others."""
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.user"):
            features = prepare_features(self.model.config, features)
            shape = (len(features.short.mask), len(features.long.mask))
            if shape not in version.user:
                raise ValueError(f"user features: expected history lengths (S, L) among {list(version.user)}, got {shape}")
            state = version.user[shape](version.params, self._programs.upload_features(features))
            jax.block_until_ready(state)
        return UserSide(state, shape), start, time.perf_counter()

    async def _call(self, function: Callable[[Request], Any], request: Request) -> Any:
        """The user's callable, async or in a thread."""
        if _is_async(function):
            result = function(request)
        else:
            result = await asyncio.get_running_loop().run_in_executor(self._callables, function, request)
        return await result if inspect.isawaitable(result) else result

    # admission, deadlines, accounts

    def _require_open(self) -> None:
        if not self._open:
            raise EngineClosed("the engine is not serving: not started, draining, or closed")

    def _version(self) -> Version:
        assert self._current is not None
        return self._current

    @contextlib.contextmanager
    def _admit(self, request: Any, budget: float | None) -> Iterator[_Job]:
        """Counts a request in and out, or refuses it at once."""
        self._require_open()
        request = request if isinstance(request, Request) else Request(user=request)
        counters, failed = self._metrics.counters, self._metrics.failed
        counters["requests"] += 1
        if len(self._pending) >= self.config.max_pending:
            counters["refused"] += 1
            raise Overloaded(f"{self.config.max_pending} requests are under way, as many as max_pending allows")
        limit = budget if budget is not None else request.budget if request.budget is not None else self.config.budget
        job = _Job(request, self._version(), limit)
        task = asyncio.current_task()
        assert task is not None
        self._pending[job] = task
        self._empty.clear()
        try:
            yield job
            counters["answered"] += 1
            if job.degraded is not None:
                counters["degraded"] += 1
                self._metrics.degraded[job.degraded] += 1
        except asyncio.CancelledError:
            counters["cancelled"] += 1
            raise
        except Exception as error:
            failed[type(error).__name__] += 1
            raise
        finally:
            del self._pending[job]
            self._metrics.observe(job.timeline.stages())
            if not self._pending:
                self._empty.set()

    async def _within_budget(self, job: _Job, answer: Any) -> Any:
        """Awaits an answer, at most until the request's deadline."""
        left = None if job.deadline is None else job.deadline - time.perf_counter()
        limit = asyncio.timeout(left)
        try:
            async with limit:
                return await answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"{job.waiting_for}: no answer within the budget of {job.budget} s") from error


@dataclasses.dataclass(eq=False)
class _Job:
    """One request under way."""

    request: Request
    version: Version
    budget: float | None
    timeline: Timeline = dataclasses.field(default_factory=Timeline)
    state: UserSide | None = None
    snapshot: Snapshot | None = None
    candidates_there: float | None = None
    submitted: float = 0.0
    reason: str | None = None  # why the answer is degraded, in words
    degraded: str | None = None  # the same, as a counter's name
    waiting_for: str = "retrieval"

    @property
    def order(self) -> str:
        return self.request.order

    @property
    def deadline(self) -> float | None:
        return None if self.budget is None else self.timeline.arrival + self.budget

    def note_candidates(self, start: float, *, of_retrieval: bool) -> None:
        """Notes that candidates came now, after retrieval where it was the engine's."""
        self.candidates_there = time.perf_counter()
        if of_retrieval:
            self.timeline.add("retrieval", start, self.candidates_there)

    def finish(self) -> dict[str, Any]:
        """The fields that every answer carries."""
        now = time.perf_counter()
        if self.candidates_there is not None:
            self.timeline.add("critical", self.candidates_there, now)
        self.timeline.add("total", self.timeline.arrival, now)
        return {
            "version": self.version.name,
            "degraded": self.reason is not None,
            "reason": self.reason,
            "stages": self.timeline.stages(),
            "timeline": self.timeline,
        }


def _joined(ids: list[np.ndarray]) -> np.ndarray:
    return ids[0] if len(ids) == 1 else np.concatenate(ids or [np.zeros(0, np.int64)])


def _closing(stream: Any) -> Any:
    """A caller's generator is closed with the request, also where the request ends early."""
    return contextlib.aclosing(stream) if hasattr(stream, "aclose") else contextlib.nullcontext(stream)


async def _wait_for(flight: Flight) -> None:
    await asyncio.wait({flight.task})
    flight.task.result()


def _is_async(function: Any) -> bool:
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call))
