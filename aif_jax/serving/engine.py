"""The asynchronous engine: user side and retrieval at once, interaction when the candidates are there.

    request --+-- features --> user function --> state (stays on the device) --+
              |                                                                +--> interaction, top-k --> answer
              +-- retrieval -----------------------------------> candidates ---+

Source: the online asynchronous inference of AIF (arXiv 2511.12934).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.scores import Order
from aif_jax.serving.admission import Admission, PendingRequest
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.metrics import Metrics
from aif_jax.serving.programs import Orders, Programs, orders_of
from aif_jax.serving.requests import EngineClosed, Ranking, Request, Scores
from aif_jax.serving.scoring import Scorer, ranking, scores
from aif_jax.serving.threads import TimeLimitedCall
from aif_jax.serving.users import Computation, UserStates
from aif_jax.serving.versions import UserSide, Version, build_version, check_version, next_snapshot
from aif_jax.store.trained import Trained


class AsyncPreRanker:
    """Serves one model: `async with AsyncPreRanker(...) as engine: await engine.rank(request, k)`.

    An engine belongs to one event loop. Nothing it does blocks that loop: device work and callables that are not async run in
    threads. A failing call of `features` or `retrieval` affects its request alone: an answer leaves at its deadline even if the
    call never returns, and nothing that it raises ends the loop or another request.

    Args:
      index: `ItemIndex` of the same version.
      features: `features(request) -> UserFeatures`, async or not.
      retrieval: `retrieval(request) ->` item ids [C], or `Candidates`, or an async iterator of either (mini-batches, each
        scored while the next is on its way); async or not. Ids of one request are all integers or all strings. None for engines
        whose callers bring the candidates.
      compiled_from: an engine of an equal model config and serving config, whose compiled functions this one uses again.

    Example:
      >>> import jax, aif_jax as aif
      >>> from aif_jax.serving import AsyncPreRanker
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), catalogue))
      >>> AsyncPreRanker(trained, None, features=lambda request: aif.empty_user(schema, length=256))
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
        compiled_from: AsyncPreRanker | None = None,
    ):
        self.config = config = config or ServingConfig()
        self.model = model = trained.model
        self._first: tuple[Trained, Any] | None = (trained, index)
        self._current: Version | None = None
        self._versions: weakref.WeakSet[Version] = weakref.WeakSet()
        self._publishing = asyncio.Lock()
        self._features = TimeLimitedCall("features", features, config)
        self._retrieval = TimeLimitedCall("retrieval", retrieval, config)
        self._given = TimeLimitedCall("candidates", None, config)  # reads those that callers give as an async iterator
        self._can_rank = retrieval is not None
        self._metrics = Metrics()
        self._admission = Admission(config, self._metrics)
        if compiled_from is not None:
            for name, mine, theirs in (
                ("model config", model.config, compiled_from.model.config), ("serving config", config, compiled_from.config),
            ):  # fmt: skip
                expect(mine == theirs, "AsyncPreRanker compiled_from", f"an engine of the same {name} {mine}", theirs)
        fresh = compiled_from is None
        self._programs = Programs(model, max_k=config.max_k, bid=config.bid) if fresh else compiled_from._programs
        self._orders = self._orders_of(config.orders)
        self._orders.expect(config.order, given=True)
        self._users = UserStates(self._programs, config, self._features, self._metrics)
        self._scorer = Scorer(self._programs, self._users, config, self._metrics)
        self._admission.queues = (self._users, self._scorer)

    def __repr__(self) -> str:
        version = self._current.name[:12] if self._current else "not started"
        return (
            f"AsyncPreRanker(version={version}, pending={len(self._admission)}/{self.config.max_pending}, "
            f"buckets={self.config.buckets}, cached_states={len(self._users.cache)})"
        )

    # life

    async def __aenter__(self) -> AsyncPreRanker:
        """Compiles every bucket ahead of time, warms up, and opens.

        Raises:
          VersionMismatch: model and index do not belong together.
          ValueError, NonFiniteScores: NaN or infinite parameters or scores.
          EngineClosed: the engine was started before.
        """
        if self._first is None:
            raise EngineClosed("an engine starts once: make a new one")
        (trained, index), self._first = self._first, None
        self._serve(await self._built(trained, index, self._orders))
        self._metrics.observe_scoring(self._programs.warm_seconds)  # until requests tell
        self._admission.open = True
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drains: refuses new requests, waits for those in flight, cancels what is left after `drain_timeout` seconds.

        Calls of `features` and `retrieval` that never return are left behind; they keep neither `close` nor the process.
        """
        self._first = None
        await self._admission.drain()
        await self._users.close()
        await asyncio.to_thread(self._scorer.close)
        self._features.close()
        self._retrieval.close()

    async def publish(self, trained: Trained, index: Any, *, orders: Mapping[str, Order] | None = None) -> str:
        """Serves a new model version from now on; returns its name.

        What is not compiled yet is compiled while traffic continues, and probe users are scored. In-flight requests finish on
        their version, which is freed when the last one completes.

        Args:
          orders: functions by name in place of those so far, see `ServingConfig.orders`; the model may stay the same.

        Raises:
          VersionMismatch, NonFiniteScores: as at the start; the old version stays.
          ValueError: as at the start, or a model of another config, for which a new engine is needed.
        """
        self._admission.require_open()
        same = trained.config.to_json() == self.model.config.to_json()
        expect(same, "publish", f"a model of the engine's config {self.model.config!r}", repr(trained.config))
        async with self._publishing:
            known = self._orders if orders is None else self._orders_of(orders)
            known.expect(self.config.order, given=True)
            version = await self._built(trained, index, known)
            self._orders = known
            self._serve(version)
            self._metrics.counters["publishes"] += 1
            return version.name

    async def update_index(self, index: Any) -> None:
        """Reads another snapshot of the index, of the version that serves, from now on: after `upsert` or `delete`.

        A request pins the snapshot when its first candidates are there. A larger capacity is compiled while traffic continues.
        Raises VersionMismatch for an index of other params; the old snapshot stays.
        """
        self._admission.require_open()
        async with self._publishing:
            assert (version := self._current) is not None
            check_version(index, version.name)
            version.snapshot = await asyncio.to_thread(next_snapshot, self._programs, version, index, self.config)
            self._metrics.counters["index_updates"] += 1

    async def _built(self, trained: Trained, index: Any, orders: Orders) -> Version:
        return await asyncio.to_thread(build_version, self._programs, trained, index, self.config, orders)

    def _orders_of(self, given: Mapping[str, Order]) -> Orders:
        return orders_of(self.model.config, self.config.bid, given)

    def _serve(self, version: Version) -> None:
        self._versions.add(version)
        self._current = version
        self._users.serve(version.name)

    # requests

    async def rank(self, request: Any, k: int, *, candidates: Any = None, budget: float | None = None) -> Ranking:
        """The best k of the candidates that retrieval finds, or that the caller has.

        Feature fetch and retrieval start at once. Where the user side is late or fails, the answer comes from the user's last
        known state or from the unknown user, and says so (`degraded`, `reason`).

        Args:
          request: a `Request`, or a bare user id.
          k: at most `config.max_k`.
          candidates: those to rank, as `score` takes them, in place of retrieval's; None calls `retrieval`.
          budget: seconds from now to the answer, in place of the request's or the engine's.

        Raises:
          Overloaded: the engine holds `max_pending` requests, or more work than the budget leaves time for.
          DeadlineExceeded: retrieval or scoring did not end within the budget.
          EngineClosed: not started, draining or closed.
          CallableError: retrieval raised what would end or cancel others, or has too many calls that never returned.
          NonFiniteScores: no known candidate has a finite score.
          TypeError: ids of a wrong kind, or of both kinds.
          ValueError: k or budget out of range; an order that the engine lacks, or one of bids without them.
          Exception: whatever retrieval raised.
        """
        good = isinstance(k, int | np.integer) and 1 <= k <= self.config.max_k
        expect(good, "rank k", f"1 to max_k={self.config.max_k}", repr(k))
        able = candidates is not None or self._can_rank
        expect(able, "rank", "an engine with a retrieval callable", "none; pass candidates=")
        stage = "retrieval" if candidates is None else "candidates"
        admitted = self._admission.admit(request, budget, self._current, waiting_for=stage)
        with admitted as job, self._users.joined(job) as user:
            return await job.within_budget(self._rank(job, user, int(k), candidates))

    async def score(self, request: Any, candidates: Any, *, budget: float | None = None) -> Scores:
        """Logits of candidates that the caller has, all of them, in their order.

        Args:
          candidates: item ids [C], or `Candidates`, or an async iterator of either; the user function runs once.

        Raises what `rank` raises.
        """
        admitted = self._admission.admit(request, budget, self._current, waiting_for="candidates")
        with admitted as job, self._users.joined(job) as user:
            return await job.within_budget(self._score(job, user, candidates))

    async def prepare(self, request: Any) -> None:
        """Computes a user's state ahead of a request that is known to come, and caches it; raises as `rank`.

        With a feature version, requests of the same version use it; without, all requests of the next `prepare_ttl` seconds.
        """
        admitted = self._admission.admit(request, None, self._current, waiting_for="user side")
        with admitted as job, self._users.joined(job, prepare=True) as user:
            if isinstance(user, Computation):
                await job.within_budget(_finished(user.task))

    def holds_state(self, request: Request) -> bool:
        """Whether a request sent now would use a state that an earlier one computed or computes: its features are not read."""
        return self._current is not None and self._users.holds(request, self._current)

    async def _rank(self, job: PendingRequest, user: UserSide | Computation, k: int, candidates: Any) -> Ranking:
        reader = self._given
        if candidates is None:
            reader, candidates = self._retrieval, await self._retrieval(job.request)
        found = await self._scorer.score(job, user, candidates, reader, whole=False)
        return ranking(job, found, k)

    async def _score(self, job: PendingRequest, user: UserSide | Computation, candidates: Any) -> Scores:
        return scores(job, await self._scorer.score(job, user, candidates, self._given, whole=True))

    # what an operator sees

    def metrics(self) -> dict[str, Any]:
        """Plain counters, gauges and latencies; `prometheus_text(engine.metrics())` writes them for a scraper.

        `callable_errors` counts failed calls of `features` and `retrieval` by their type: {"features KeyError": 3}.
        """
        calls = {"features": self._features, "retrieval": self._retrieval, "candidates": self._given}
        cache, values = self._users.cache, self._metrics.values()
        values["counters"] |= {
            "cache_hits": cache.hits,
            "cache_misses": cache.misses,
            "cache_evictions": cache.evictions,
            **{f"compiled_{kind}_functions": count for kind, count in dict(self._programs.compiles).items()},
            **{f"transfers_{kind}": count for kind, count in dict(self._programs.transfers).items()},
        }
        values["gauges"] = {
            "pending": len(self._admission),
            "user_sides_running": len(self._users.running),
            "hung_calls": sum(call.hung for call in calls.values()),
            "cached_states": len(cache),
            "cached_bytes": cache.bytes,
            "oldest_state_seconds": cache.oldest,
            "stale_answer_seconds": self._users.stale_age,
            "versions_in_memory": len(self._versions),
        }
        values["callable_errors"] = {
            f"{name} {kind}": count for name, call in calls.items() for kind, count in dict(call.errors).items()
        }
        values["version"] = self._current.name if self._current else None
        return values


async def _finished(task: asyncio.Task[Any]) -> None:
    await asyncio.wait({task})
    task.result()
