"""The asynchronous engine: user side and retrieval at once, interaction when the candidates are there.

    request --+-- features --> user function --> state (stays on the device) --+
              |                                                                +--> interaction, top-k --> answer
              +-- retrieval -----------------------------------> candidates ---+

Source: the online asynchronous inference of AIF (arXiv 2511.12934).
"""

import asyncio
import bisect
import contextlib
import dataclasses
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar

import numpy as np

from aif_jax.checks import expect
from aif_jax.scores import Order
from aif_jax.serving.callables import TimeLimitedCall, described
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.metrics import Metrics
from aif_jax.serving.programs import LOGIT, Orders, Programs, orders_of
from aif_jax.serving.requests import (
    Candidates,
    DeadlineExceeded,
    EngineClosed,
    NonFiniteScores,
    Overloaded,
    Ranking,
    Request,
    Scores,
    Span,
    Timeline,
    expect_budget,
)
from aif_jax.serving.scoring import Batches, PendingRequest, Version, score
from aif_jax.serving.users import StateKey, UserStates
from aif_jax.serving.versions import build_version, check_version, compile_updated
from aif_jax.store.trained import Trained

T = TypeVar("T")
KINDS = {"i": "integers", "U": "strings", "T": "strings"}  # what item ids are, by the kind of their dtype
CLOSED = 0.0  # when() of a request that `close` ended: in the past by the loop's clock, as no budget's end is
ADMITTED = 0.75  # share of a budget that queued work of earlier requests may use: the rest is for the request's own


class AsyncPreRanker:
    """Serves one model: `async with AsyncPreRanker(...) as engine: await engine.rank(request, k)`.

    An engine belongs to one event loop. Nothing it does blocks that loop: device work and callables that are not async run in
    threads. A failing call of `features` or `retrieval` affects only the requests that wait for it: an answer leaves at its
    deadline even if the call never returns, and nothing that it raises ends the loop or another request.

    Args:
      index: `ItemIndex` of the same version.
      features: `features(request) -> UserFeatures`, async or not.
      retrieval: `retrieval(request) ->` item ids [C], or `Candidates`; async or not. Ids of one request are all integers or
        all strings. None for engines whose callers bring the candidates.
      describe: words for an error of the user side in the `reason` of a degraded answer; by default its type and text.
      compiled_from: an engine of an equal model config and serving config, whose compiled functions this one uses again.

    Example:
      >>> import jax, aif_jax as aif
      >>> from aif_jax.serving import AsyncPreRanker
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), catalogue))
      >>> AsyncPreRanker(trained, None, features=lambda request: aif.empty_user(schema, length=256))  # needs an index to start
      AsyncPreRanker(version=not started, pending=0/64, buckets=(128, 256, ..., 8192, 10240, 16384), cached_states=0)
    """

    def __init__(
        self,
        trained: Trained,
        index: Any,
        *,
        features: Callable[[Request], Any],
        retrieval: Callable[[Request], Any] | None = None,
        config: ServingConfig | None = None,
        describe: Callable[[Exception], str] = described,
        compiled_from: "AsyncPreRanker | None" = None,
    ):
        self.config = config = config or ServingConfig()
        self.model = model = trained.model
        self._current: Version | None = None
        self._versions: weakref.WeakSet[Version] = weakref.WeakSet()
        self._publishing = asyncio.Lock()
        self._open: bool | None = None  # not yet
        self._pending: set[asyncio.Timeout] = set()  # of requests that wait for an answer
        self._empty = asyncio.Event()  # none is pending
        self._empty.set()
        self._features = TimeLimitedCall("features", features, config)
        self._retrieval = None if retrieval is None else TimeLimitedCall("retrieval", retrieval, config)
        self._metrics = Metrics()
        if compiled_from is not None:
            mine, theirs = (model.config, config), (compiled_from.model.config, compiled_from.config)
            expect(mine == theirs, "AsyncPreRanker compiled_from", f"an engine of the same model and config {mine}", theirs)
        self._programs = Programs(model, max_k=config.max_k) if compiled_from is None else compiled_from._programs
        self._first: tuple[Trained, Any, Orders] | None = (trained, index, orders_of(model.config, config))
        self._users = UserStates(config, self._features, self._metrics, describe)
        self._scoring = Batches("aif-score", config.score_threads, config.batch_size, score)

    def __repr__(self) -> str:
        version = self._current.name[:12] if self._current else "not started"
        pending = f"{len(self._pending)}/{self.config.max_pending}, buckets={self.config.buckets}"
        return f"AsyncPreRanker(version={version}, pending={pending}, cached_states={len(self._users.cache)})"

    async def __aenter__(self) -> Self:
        """Compile every bucket ahead of time, warm up, and open.

        Raises:
          VersionMismatch: model and index do not belong together.
          ValueError, NonFiniteScores: NaN or infinite parameters or scores.
          EngineClosed: the engine was started before, or closed meanwhile.
        """
        if self._first is None:
            raise EngineClosed("an engine starts once: make a new one")
        first, self._first = self._first, None
        await self._serve(*first)
        if self._open is False:
            raise EngineClosed("the engine was closed while it started: make a new one")
        self._metrics.scorings.append(self._programs.warm_seconds)  # until requests tell
        self._scoring.start()
        self._users.batches.start()
        self._open = True
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drain: refuses new requests, waits for those in flight, ends with EngineClosed what `drain_timeout` seconds leave.

        Calls of `features` and `retrieval` that never return are left behind; they keep neither `close` nor the process.
        """
        self._first, self._open = None, False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_timeout):
                await self._empty.wait()
        for limit in self._pending:
            if not limit.expired():
                limit.reschedule(CLOSED)
        await self._empty.wait()
        await self._users.close()
        await asyncio.to_thread(self._scoring.close)

    async def publish(self, trained: Trained, index: Any, *, orders: Mapping[str, Order] | None = None) -> str:
        """Serve a new model version from now on; returns its name.

        What is not compiled yet is compiled while traffic continues, and probe users are scored. In-flight requests finish on
        their version, which is freed when the last one completes.

        Args:
          orders: functions by name in place of those so far, see `ServingConfig.orders`; the model may stay the same.

        Raises:
          VersionMismatch, NonFiniteScores: as at the start; the old version stays.
          ValueError: as at the start, or a model of another config, for which a new engine is needed.
          EngineClosed: not started, draining or closed.
        """
        self._require_open()
        same = trained.config.to_json() == self.model.config.to_json()
        expect(same, "publish", f"a model of the engine's config {self.model.config!r}", repr(trained.config))
        async with self._publishing:
            known = self._require_open().compiled.orders
            if orders is not None:
                known = orders_of(self.model.config, dataclasses.replace(self.config, orders=orders))
            version = await self._serve(trained, index, known)
            self._metrics.counters["publishes"] += 1
            return version.name

    async def update_index(self, index: Any) -> None:
        """Read another snapshot of the index, of the version that serves, from now on: after `upsert` or `delete`.

        A request takes the snapshot that is current when it goes to scoring. A larger capacity is compiled under traffic.
        Raises VersionMismatch for an index of other params, and the old snapshot stays; EngineClosed as `publish`.
        """
        self._require_open()
        async with self._publishing:
            version = self._require_open()
            check_version(index, version.name)
            version.compiled = await asyncio.to_thread(compile_updated, self._programs, version, index, self.config)
            self._metrics.counters["index_updates"] += 1

    async def _serve(self, trained: Trained, index: Any, orders: Orders) -> Version:
        version = await asyncio.to_thread(build_version, self._programs, trained, index, self.config, orders)
        self._versions.add(version)
        self._current = version
        self._users.serve(version.name)
        return version

    async def rank(self, request: Any, k: int, *, candidates: Any = None, budget: float | None = None) -> Ranking:
        """Return the best k of the candidates that retrieval finds, or that the caller has.

        Feature fetch and retrieval start at once. With `fallback`, where the user side is late or fails, the answer comes from
        the user's last known state or the unknown user, and says so (`degraded`, `reason`).

        Args:
          request: a `Request`, or a bare user id.
          k: at most `config.max_k`.
          candidates: those to rank, as `score` takes them, in place of retrieval's; None calls `retrieval`.
          budget: seconds from now to the answer, in place of the request's or the engine's.

        Raises:
          Overloaded: the engine holds `max_pending` requests, or more work than the budget leaves time for.
          DeadlineExceeded: a stage did not end within the budget, or retrieval within `callable_timeout`.
          EngineClosed: not started, draining or closed, or closed before the answer was there.
          CallableError: retrieval raised what would end or cancel others, or has too many calls that never returned.
          NonFiniteScores: there are known candidates, and the scores of all of them are NaN or infinite.
          TypeError: ids of a wrong kind, or of both kinds.
          ValueError: k, budget or number of candidates out of range; candidates that `Candidates` refuses, or none without
            retrieval; an order that the engine lacks, or one of bids without them.
          Exception: whatever retrieval raised and, where `fallback` is false, `features`.
        """
        if not (isinstance(k, int | np.integer) and 1 <= k <= self.config.max_k):
            expect(False, "rank k", f"1 to max_k={self.config.max_k}", repr(k))
        if candidates is None and self._retrieval is None:
            expect(False, "rank", "an engine with a retrieval callable", "none; pass candidates=")
        return await self._answered(request, budget, lambda job: self._ranking(job, candidates, int(k)))

    async def score(self, request: Any, candidates: Any, *, budget: float | None = None) -> Scores:
        """Return logits of candidates that the caller has, all of them, in their order.

        Args:
          candidates: item ids [C], or `Candidates`.

        Raises what `rank` raises, but for the order, which it does not read.
        """
        return await self._answered(request, budget, lambda job: self._scores(job, candidates))

    async def prepare(self, request: Any) -> None:
        """Compute a user's state ahead of a request that is known to come, and cache it; raises as `rank` without `fallback`.

        Requests of the same feature version use it. Without one, it serves the user's requests without one for `prepare_ttl`
        seconds, or until another such `prepare`, which computes it again.
        """
        await self._answered(request, None, self._users.prepare)

    def holds_state(self, request: Request) -> bool:
        """Return whether a request sent now would use the state of an earlier one, so that its features are not read."""
        key = StateKey(request.user, request.feature_version, self._current.name if self._current else "")
        return self._users.cache.get(key) is not None or key in self._users.running.by_key

    def _require_open(self) -> Version:
        """Return the version that serves. Raises EngineClosed unless the engine runs."""
        if not self._open or self._current is None:
            raise EngineClosed("the engine is not serving: not started, draining, or closed")
        return self._current

    async def _answered(self, request: Any, budget: float | None, work: Callable[[PendingRequest], Awaitable[T]]) -> T:
        """Return what comes of a request in time, or refuse it at once, and count what became of it; raises as `rank`."""
        version, counters, timeline = self._require_open(), self._metrics.counters, Timeline()
        expect_budget(budget, "budget")
        request = request if isinstance(request, Request) else Request(user=request)
        # of Python, since the clock plus a float32 is one
        budget = next((float(given) for given in (budget, request.budget, self.config.budget) if given is not None), None)
        counters["requests"] += 1
        if refusal := self._refusal(budget):
            counters["refused"] += 1
            raise Overloaded(refusal)
        deadline = None if budget is None else timeline.arrival + budget
        job = PendingRequest(request, version, timeline, budget, deadline)
        limit = asyncio.timeout(None if deadline is None else deadline - time.perf_counter())
        self._pending.add(limit)
        self._empty.clear()
        try:
            async with limit:
                answer = await work(job)
        except asyncio.CancelledError:
            counters["cancelled"] += 1
            raise
        except Exception as error:
            if not (limit.expired() and isinstance(error, TimeoutError)):
                self._metrics.failed[type(error).__name__] += 1
                raise
            closed, late = limit.when() == CLOSED, f"{job.waiting_for}: no answer"
            self._metrics.failed["EngineClosed" if closed else "DeadlineExceeded"] += 1
            if closed:
                raise EngineClosed(f"{late} before the engine closed") from error
            raise DeadlineExceeded(f"{late} within the budget of {budget} s") from error
        finally:
            for stage, seconds in timeline.stages().items():
                if stage not in ("features", "user"):  # `UserStates` counts these, once for all that share a state
                    self._metrics.stages[stage].observe(seconds)
            self._pending.remove(limit)
            if not self._pending:
                self._empty.set()
        counters["answered"] += 1
        if job.degraded is not None:
            self._metrics.degraded[job.degraded] += 1
        return answer

    def _refusal(self, budget: float | None) -> str | None:
        """Return why one more request must be refused: too many in flight, or more work than its budget leaves time for."""
        count = len(self._pending)
        if count >= self.config.max_pending:
            text = f"{count} requests are in flight, as many as max_pending allows"
            return f"{text}; retry later, raise max_pending, or add replicas"
        wait = count * max(self._users.seconds, self._scoring.seconds)
        if budget is not None and wait > ADMITTED * budget:
            return f"{count} requests are in flight, about {wait:.3f} s of work, too much for an answer within {budget} s"
        return None

    async def _scored(self, job: PendingRequest, candidates: Any) -> Any:
        """Return `TopCandidates` of a request, or logits where all come back, by one user state and one index."""
        user = self._users.join(job)  # the cached state, or its computation, which runs while retrieval does
        try:
            if candidates is None and not job.whole and self._retrieval is not None:  # without it `rank` has refused None
                job.waiting_for = "retrieval"
                candidates = await self._retrieval(job.request)
                job.timeline.clocked.append(Span("retrieval", job.timeline.arrival, time.perf_counter()))
            job.candidates_there = time.perf_counter()
            self._take_candidates(job, candidates)
            job.user = await self._users.state_or_fallback(job, user)
        finally:
            self._users.leave(job, user)
        job.waiting_for, job.submitted, job.compiled = "scoring", time.perf_counter(), job.version.compiled
        for name, ids in (("candidates", job.candidates.ids), ("Request.exclude", job.request.exclude)):
            if ids is not None and len(ids) and job.compiled.index.kind not in (None, KINDS[ids.dtype.kind]):
                expect(False, name, f"{job.compiled.index.kind} as the index has", KINDS[ids.dtype.kind], error=TypeError)
        try:
            return await self._scoring.submit((id(job.compiled), job.bucket, job.order, job.whole), job)
        finally:  # late requests count too: otherwise the reserve would never grow
            self._metrics.scorings.append(time.perf_counter() - job.submitted)

    def _take_candidates(self, job: PendingRequest, found: Any) -> None:
        """Give a request its candidates, their bucket and the order that ranks them; raises as `rank`."""
        job.candidates = found if isinstance(found, Candidates) else Candidates(found)
        ids, buckets = job.candidates.ids, self.config.buckets
        if len(ids) > buckets[-1]:
            expect(False, "candidates", f"at most {buckets[-1]}, the last of ServingConfig.buckets", len(ids))
        job.bucket = buckets[bisect.bisect_left(buckets, len(ids))]
        job.order = LOGIT if job.whole else self.config.order if job.request.order is None else job.request.order
        if job.order != LOGIT:
            job.version.compiled.orders.expect(job.order, given=job.candidates.bids is not None)

    async def _ranking(self, job: PendingRequest, candidates: Any, k: int) -> Ranking:
        """Return the best k candidates; NonFiniteScores where the scores of all known ones are NaN or infinite."""
        best = await self._scored(job, candidates)
        ids, (scores, logits, positions) = job.candidates.ids, (field[:k].copy() for field in best[:3])
        full = len(scores) == k and scores[-1] > -np.inf
        if full:  # as scores descend
            mask, chosen = np.ones(k, bool), ids[positions]
        else:
            scores, logits = padded(scores, k), padded(logits, k)
            mask, kind = scores > -np.inf, KINDS[ids.dtype.kind] if len(ids) else job.compiled.index.kind
            chosen = np.full(k, "" if kind == "strings" else -1, ids.dtype if len(ids) else None)
            chosen[mask] = ids[positions[: np.count_nonzero(mask)]]
            logits[~mask] = -np.inf
        self._count(job, best.non_finite, some=full or bool(mask.any()))
        return Ranking(
            ids=chosen, scores=scores, logits=logits, mask=mask, candidates=len(ids), unknown=job.unknown,
            excluded=job.excluded, **_about(job, best.non_finite),
        )  # fmt: skip

    async def _scores(self, job: PendingRequest, candidates: Any) -> Scores:
        """Return every logit, in order; NonFiniteScores where those of all known candidates are NaN or infinite."""
        job.whole = True
        logits, known = (await self._scored(job, candidates))[: len(job.rows)], job.rows >= 0
        mask = known & ((logits if logits.ndim == 1 else logits[:, 0]) > -np.inf)
        self._count(job, non_finite := int(np.count_nonzero(known & ~mask)), some=bool(mask.any()))
        return Scores(logits=logits, mask=mask, **_about(job, non_finite))

    def _count(self, job: PendingRequest, non_finite: int, *, some: bool) -> None:
        """Count the candidates of a request, `some` with a finite score; NonFiniteScores where no known one has one."""
        counters = self._metrics.counters
        counters["candidates"] += len(job.rows)
        counters["unknown_candidates"] += job.unknown
        counters["excluded_candidates"] += job.excluded
        counters["non_finite_scores"] += non_finite
        if non_finite and not some:
            raise NonFiniteScores(f"scores: expected finite ones, got NaN or infinity for all {non_finite} known candidates")

    def metrics(self) -> dict[str, Any]:
        """Return plain counters, gauges and latencies; `prometheus_text(engine.metrics())` writes them for a scraper.

        `callable_errors` counts failed calls of `features` and `retrieval` by their type: {"features KeyError": 3}.
        """
        calls = {call.name: call for call in (self._features, self._retrieval) if call is not None}
        cache, values = self._users.cache, self._metrics.values()
        values["counters"] |= {
            "cache_evictions": cache.evictions,
            **{f"compiled_{kind}_functions": count for kind, count in dict(self._programs.compiles).items()},
            **{f"transfers_{kind}": count for kind, count in dict(self._programs.transfers).items()},
        }
        values["gauges"] = {
            "pending": len(self._pending),
            "user_sides_running": len(self._users.running.by_key),
            "hung_calls": sum(call.hung for call in calls.values()),
            "cached_states": len(cache),
            "cached_bytes": cache.bytes,
            "versions_in_memory": len(self._versions),
        }
        values["callable_errors"] = {
            f"{name} {kind}": count for name, call in calls.items() for kind, count in dict(call.errors).items()
        }
        return values


def _about(job: PendingRequest, non_finite: int) -> dict[str, Any]:
    """Return the fields that every answer carries."""
    now, timeline = time.perf_counter(), job.timeline
    timeline.clocked += Span("critical", job.candidates_there, now), Span("total", timeline.arrival, now)
    return {
        "version": job.version.name,
        "non_finite": non_finite,
        "degraded": job.reason is not None,
        "reason": job.reason,
        "stand_in": job.stand_in,
        "state_age": None if job.user is job.version.unknown_user else now - job.user.since,
        "timeline": timeline,
        "_probabilities": job.version.probabilities,
    }


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """Return a new array [size, ...] that starts with `values` [n, ...], then -inf."""
    array = np.full((size, *values.shape[1:]), -np.inf, values.dtype)
    array[: len(values)] = values
    return array
