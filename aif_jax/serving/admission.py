"""Admission: which requests are accepted, their deadlines, and how each ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Iterator
from typing import Any, TypeVar

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.metrics import Metrics
from aif_jax.serving.requests import DeadlineExceeded, EngineClosed, Overloaded, Request, Timeline, expect_budget
from aif_jax.serving.versions import Snapshot, UserSide, Version

T = TypeVar("T")
ADMITTED = 0.75
"""Share of a request's budget that work before it may take: the rest is for retrieval, its own work and what was misjudged."""


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """One accepted request, and what is known of it so far."""

    request: Request
    version: Version  # of the model, for the whole request
    budget: float | None  # seconds from arrival to answer; None for no limit
    waiting_for: str  # the stage that a missed deadline is reported as
    timeline: Timeline = dataclasses.field(default_factory=Timeline)
    user: UserSide | None = None  # whose state scores
    snapshot: Snapshot | None = None  # of the index, pinned with the state
    candidates_there: float | None = None  # when the latest candidates came
    submitted: float = 0.0  # when the latest were handed to the scorer
    reason: str | None = None  # why the answer is degraded, in words
    degraded: str | None = None  # the same, as a counter's name
    stand_in: str | None = None  # whose state scores in place of the user's own
    non_finite: int = 0  # known candidates without a finite score
    candidates: int = 0  # that were scored
    unknown: int = 0  # of these, candidates that the index does not hold
    excluded: int = 0  # of these, candidates that the request excludes

    @property
    def deadline(self) -> float | None:
        """By `time.perf_counter`; None for no limit."""
        return None if self.budget is None else self.timeline.arrival + self.budget

    async def within_budget(self, answer: Awaitable[T]) -> T:
        """Awaits an answer, at most until the deadline; DeadlineExceeded names the stage that was waited for."""
        if self.deadline is None:
            return await answer
        limit = asyncio.timeout(self.deadline - time.perf_counter())
        try:
            async with limit:
                return await answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"{self.waiting_for}: no answer within the budget of {self.budget} s") from error

    def finish(self) -> dict[str, Any]:
        """The fields that every answer carries."""
        now = time.perf_counter()
        if self.candidates_there is not None:
            self.timeline.add("critical", self.candidates_there, now)
        self.timeline.add("total", self.timeline.arrival, now)
        since = None if self.user is None else self.user.since
        return {
            "version": self.version.name,
            "non_finite": self.non_finite,
            "degraded": self.reason is not None,
            "reason": self.reason,
            "stand_in": self.stand_in,
            "state_age": None if since is None else now - since,
            "stages": self.timeline.stages(),
            "timeline": self.timeline,
        }


class Admission:
    """Requests in flight, used from the event loop's thread; `metrics` counts how every request ended."""

    def __init__(self, config: ServingConfig, metrics: Metrics):
        self.open = False
        self.queues: tuple[Any, ...] = ()  # that every request goes through; `seconds` is what one more adds to the wait
        self._config = config
        self._metrics = metrics
        self._pending: dict[PendingRequest, asyncio.Task[Any]] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._pending)

    def require_open(self) -> None:
        """Raises EngineClosed before the start and from the beginning of the shutdown on."""
        if not self.open:
            raise EngineClosed("the engine is not serving: not started, draining, or closed")

    @contextlib.contextmanager
    def admit(
        self, request: Any, budget: float | None, version: Version | None, *, waiting_for: str
    ) -> Iterator[PendingRequest]:
        """Counts a request in and out, or refuses it at once; raises as `AsyncPreRanker.rank`."""
        self.require_open()
        assert version is not None
        expect_budget(budget, "budget")
        request = request if isinstance(request, Request) else Request(user=request)
        limit = budget if budget is not None else request.budget if request.budget is not None else self._config.budget
        counters = self._metrics.counters
        counters["requests"] += 1
        if refusal := self._refusal(limit):
            counters["refused"] += 1
            raise Overloaded(refusal)
        job = PendingRequest(request, version, limit, waiting_for)
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
            self._metrics.failed[type(error).__name__] += 1
            raise
        finally:
            counters["non_finite_scores"] += job.non_finite
            counters["candidates"] += job.candidates
            counters["unknown_candidates"] += job.unknown
            counters["excluded_candidates"] += job.excluded
            del self._pending[job]
            self._metrics.observe(job.timeline.stages())
            if not self._pending:
                self._empty.set()

    def _refusal(self, budget: float | None) -> str | None:
        """Why one more request must be refused: too many in flight, or more work than its budget leaves time for."""
        count = len(self._pending)
        if count >= self._config.max_pending:
            text = f"{count} requests are in flight, as many as max_pending allows"
            return f"{text}; retry later, raise max_pending, or add replicas"
        wait = count * max((queue.seconds for queue in self.queues), default=0.0)
        if budget is not None and wait > ADMITTED * budget:
            return f"{count} requests are in flight, about {wait:.3f} s of work, too much for an answer within {budget} s"
        return None

    async def drain(self) -> None:
        """Refuses new requests and returns when none is in flight; cancels the rest after `drain_timeout` seconds."""
        self.open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout):
                await self._empty.wait()
        for task in self._pending.values():
            task.cancel()
        await self._empty.wait()
