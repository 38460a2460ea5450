"""The user side of requests: features, user function, state, from the cache or computed while retrieval runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from aif_jax.features import pack
from aif_jax.serving.admission import Job
from aif_jax.serving.cache import StateCache, StateKey
from aif_jax.serving.callables import Guarded, described
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import DeadlineExceeded
from aif_jax.serving.metrics import Metrics
from aif_jax.serving.programs import Form, Programs
from aif_jax.serving.requests import Request
from aif_jax.serving.shared import StateStore, from_bytes, to_bytes
from aif_jax.serving.single_flight import Computation, SingleFlight
from aif_jax.serving.together import RECENT, Together
from aif_jax.serving.unknown import Known, known_of
from aif_jax.serving.versions import UserSide, Version, batch_sizes
from aif_jax.types import UserFeatures

_FOR_STALE_USE = object()  # feature version of states that only a late user side may fall back to


Span: TypeAlias = tuple[str, float, float]


class UserTask(NamedTuple):
    """The features of one user, to become a state."""

    version: Version
    features: UserFeatures
    future: asyncio.Future[Any]

    @property
    def form(self) -> Form:
        """What its history comes as."""
        return Form.of(self.features)

    @property
    def key(self) -> tuple[int, Form]:
        """Tasks of one key run the same compiled function with the same parameters."""
        return id(self.version), self.form


class UserSides:
    """User states of requests, used from the event loop's thread."""

    def __init__(
        self,
        programs: Programs,
        config: ServingConfig,
        features: Guarded,
        metrics: Metrics,
        store: StateStore | None = None,
    ):
        self.cache = StateCache(config.cache_bytes, max_age=config.max_stale, unversioned_ttl=config.prepare_ttl)
        self.running = SingleFlight(detached_limit=config.max_pending)
        self.stale_age = 0.0  # of the state in the latest answer from a stale one, in seconds
        self._programs = programs
        self._config = config
        self._features = features
        self._metrics = metrics
        sizes = batch_sizes(config.batch_size)
        self._tasks = Together("aif-user", config.user_threads, sizes, full=programs.full, prepare=self._pack, run=self._run)
        self._store = store
        self._putting: set[asyncio.Task[None]] = set()
        self._serving: str | None = None  # version whose states are cached
        self._computed = 1.0  # share of the latest requests whose state was not in the cache

    def serve(self, version: str) -> None:
        """Caches states of that model version from now on, and frees those of others."""
        self._serving = version
        self.cache.keep_version(version)

    @property
    def seconds(self) -> float:
        """Time that one more request in the queue adds to its wait, where some have a state in the cache."""
        return self._computed * self._tasks.seconds

    def holds(self, request: Request, version: Version) -> bool:
        """Whether a state for that user and feature version is there, or on its way."""
        key = StateKey(request.user, request.feature_version, version.name)
        return key in self.cache or key in self.running

    @contextlib.contextmanager
    def joined(self, job: Job, *, prepare: bool = False) -> Iterator[UserSide | Computation]:
        """The user's state from the cache, or the computation of it, started where none may be shared.

        Requests share a state where their feature version is known, or where `prepare` makes or made it. At the end of the
        block, a computation that was only late runs on to fill the cache; one that nobody waits for is cancelled.
        """
        request, version = job.request, job.version
        key = StateKey(request.user, request.feature_version, version.name)
        cached = self.cache.get(key)
        self._computed += RECENT * ((cached is None) - self._computed)
        if cached is not None:
            yield cached
            return
        keep = key
        if request.feature_version is None and not prepare and key not in self.running:
            key, keep = key._replace(feature_version=job), key._replace(feature_version=_FOR_STALE_USE)
        self._metrics.counters["cache_joins"] += key in self.running
        computation = self.running.join(key, lambda: self._make(job, version, keep))
        try:
            yield computation
        finally:
            self.running.leave(computation, keep=job.reason is not None)

    async def ready(self, job: Job, user: UserSide | Computation) -> UserSide:
        """The user's own state if it comes in time, else the stand-in that the config allows, or what went wrong is raised."""
        if isinstance(user, UserSide):
            return self._marked(job, user)
        task, start = user.task, time.perf_counter()
        if not task.done():
            left = None if job.deadline is None else max(job.deadline - self._reserve(job) - start, 0.0)
            before, job.waiting_for = job.waiting_for, "user side"
            await asyncio.wait({task}, timeout=left)
            job.waiting_for = before
            job.timeline.add("wait_user", start, time.perf_counter())
        ended = task.done() and not task.cancelled()
        error = task.exception() if ended else None
        if ended and error is None:
            side, spans = task.result()
            for span in spans:
                job.timeline.add(*span)
            return self._marked(job, side)
        what = "late" if error is None else "failed"
        error = error or DeadlineExceeded("user side: not ready within the budget")
        if not self._config.fallback:
            raise error
        stale = self.cache.stale(job.request.user, job.version.name)
        stand_in = "unknown user" if stale is None else "stale state"
        job.reason = f"user side {what}: {error if what == 'late' else described(error)}; answered with the {stand_in}"
        job.degraded = f"{what}, {stand_in}"
        if stale is None:
            return job.version.unknown[0]
        self.stale_age = time.perf_counter() - stale.since
        job.reason += f" of {self.stale_age:.1f} s ago"
        return stale

    async def close(self) -> None:
        """Stops every computation; states on their way to the shared store are left."""
        await self.running.close()
        for task in self._putting:
            task.cancel()
        await asyncio.to_thread(self._tasks.close)

    def _marked(self, job: Job, side: UserSide) -> UserSide:
        """The same state; the answer says so where the model knows too little of its history."""
        if warning := side.known.warning(self._config.max_unknown):
            job.reason, job.degraded = warning, "unknown history"
        return side

    def _reserve(self, job: Job) -> float:
        """Seconds to keep for scoring: the config's, or what recent requests needed where that is more."""
        assert job.budget is not None
        return min(max(self._config.reserve, 1.5 * self._metrics.scoring), job.budget / 2)

    async def _make(self, job: Job, version: Version, key: StateKey) -> tuple[UserSide, list[Span]]:
        """Fetches features, runs the user function, caches the state; or takes it from the shared store."""
        start = time.perf_counter()
        shared = self._store is not None and job.request.feature_version is not None
        if shared and (side := await self._shared(version, key)) is not None:
            return side, [("shared", start, time.perf_counter())]
        features = await self._features(dataclasses.replace(job.request, version=version.name))
        fetched = time.perf_counter()
        task = UserTask(version, features, asyncio.get_running_loop().create_future())
        self._tasks.submit(task)
        outcome = await task.future
        if isinstance(outcome, Exception):
            raise self._features.noted(outcome)  # features that do not fit the model
        state, span, known = outcome
        self._metrics.observe_known(known)
        side = UserSide(state, task.form, start, known)
        if version.name == self._serving:
            self.cache.put(key, side, since=start)
        if shared and len(self._putting) < self._config.max_pending:
            task = asyncio.get_running_loop().create_task(self._share(key, side))
            self._putting.add(task)
            task.add_done_callback(self._putting.discard)
        return side, [("features", start, fetched), span]

    async def _shared(self, version: Version, key: StateKey) -> UserSide | None:
        """The state that another replica computed, where there is one that may be used."""
        assert self._store is not None
        try:
            data = await self._store.get(key)
        except Exception:  # whatever a store raises: the state is computed here
            self._metrics.counters["shared_failed"] += 1
            return None
        empty = {side.form: side.state for side in version.unknown}
        found = None if data is None else from_bytes(data, empty)
        if found is None or found.age > (self._config.max_stale or float("inf")):
            self._metrics.counters["shared_misses"] += 1
            return None
        self._metrics.counters["shared_hits"] += 1
        state = self._programs.upload_state(empty[found.form], found.words)
        side = UserSide(state, found.form, time.perf_counter() - found.age, found.known)
        if version.name == self._serving:
            self.cache.put(key, side, since=side.since)
        return side

    async def _share(self, key: StateKey, side: UserSide) -> None:
        """Hands a state to the shared store."""
        assert self._store is not None and side.since is not None
        words = await asyncio.to_thread(self._programs.download, side.state.words)
        try:
            age = time.perf_counter() - side.since
            await self._store.put(key, to_bytes(words, side.state.layout, side.form, age=age, known=side.known))
        except Exception:  # as above
            self._metrics.counters["shared_failed"] += 1

    def _pack(self, task: UserTask) -> tuple[np.ndarray, Known]:
        """Checked features as words int32 [n], and how much of them the model knows."""
        features = self._programs.plain(task.features, version=task.version.name, encoding=task.version.encoding)
        if task.form not in (forms := task.version.forms):
            raise ValueError(f"UserFeatures.history: expected one of {', '.join(map(str, forms))}, got {task.form}")
        return pack(features), known_of(self._programs.model.config.schema, features)

    def _run(
        self, tasks: list[UserTask], packed: list[tuple[np.ndarray, Known]], started: float
    ) -> list[tuple[Any, Span, Known]]:
        """States of users of one version and form of history.

        Waits for the device here, so that a backlog forms where requests can be cancelled, and not in the device's queue before
        the interactions of others.
        """
        words = [each for each, _ in packed]
        words += words[:1] * (self._tasks.size_for(len(words)) - len(words))
        with jax.profiler.TraceAnnotation("aif.user"):
            states = tasks[0].version.states(self._programs, words, tasks[0].form)
            jax.block_until_ready(states)
        span = ("user", started, time.perf_counter())
        return [(state, span, known) for state, (_, known) in zip(states, packed, strict=False)]
