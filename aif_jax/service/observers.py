"""Observers of answered calls: shadow traffic and OpenTelemetry spans. The request log is another, in `log`."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.service.core import Observed
from aif_jax.service.features import Context
from aif_jax.service.models import Served
from aif_jax.serving import Ranking, Request

logger = logging.getLogger(__name__)


class Shadow:
    """Observes a service: `Service(models, observers=(Shadow(lambda: models.named("next")),))`.

    A version without users, share=0 in `current`, is loaded for it. Where one of the two answers is degraded, which may be that
    of another user state, they are not compared; `counters["shadow_degraded"]` counts them.

    Args:
      version: finds the second version, at each call.
      share: share of the calls, 0 to 1,.
      limit: calls that may be scored at once; others are dropped.
    """

    def __init__(self, version: Callable[[], Served], *, share: float = 0.1, limit: int = 2):
        expect(0 <= share <= 1, "shadow share", "0 to 1", share)
        names = ("calls", "dropped", "failed", "degraded", "top", "top_same")
        self.counters = {f"shadow_{name}": 0 for name in names}
        self._version, self._share, self._limit = version, share, limit
        self._running: set[asyncio.Task[None]] = set()

    def observe(self, seen: Observed) -> None:
        """Starts the second scoring, or drops it."""
        if random.random() >= self._share:
            return
        if len(self._running) >= self._limit:
            self.counters["shadow_dropped"] += 1
            return
        task = asyncio.get_running_loop().create_task(self._score(seen))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Waits for what runs."""
        await asyncio.gather(*self._running)

    async def _score(self, seen: Observed) -> None:
        try:
            served = self._version()
            if served is seen.served:
                return
            context = Context(served.users.of(seen.call))
            request = Request(user=seen.call.user, context=context, order="logit", exclude=seen.call.exclude)
            scores = await served.engine.score(request, seen.candidates)
            self.counters["shadow_calls"] += 1
            if scores.degraded or seen.answer.degraded:
                self.counters["shadow_degraded"] += 1
            elif isinstance(seen.answer, Ranking) and seen.call.order == "logit":
                first = seen.answer.ids[seen.answer.mask]
                logits = scores.logits if scores.logits.ndim == 1 else scores.logits[:, 0]
                order = np.argsort(-logits, kind="stable")[: len(first)]
                self.counters["shadow_top"] += len(first)
                self.counters["shadow_top_same"] += len(set(first.tolist()) & set(seen.candidates.ids[order].tolist()))
        except Exception as error:  # of a version that nobody was promised
            self.counters["shadow_failed"] += 1
            logger.warning("shadow: %s: %s", type(error).__name__, error)


PARENT: contextvars.ContextVar[str] = contextvars.ContextVar("traceparent", default="")
"""The W3C `traceparent` that a call came with; the fronts set it."""


class Traces:
    """Observes a service: `Service(models, observers=(Traces(),))`. Spans go where the process's tracer provider sends them.

    Args:
      provider: a tracer provider; None takes the global one, which `opentelemetry-instrument` or your code sets up.

    Raises:
      ImportError: opentelemetry is missing.
    """

    def __init__(self, provider: Any = None):
        try:
            from opentelemetry import propagate, trace
        except ImportError as error:
            raise ImportError('traces need OpenTelemetry: pip install "aif_jax[traces]"') from error
        self._extract = propagate.extract
        self._within = trace.set_span_in_context
        self._tracer = trace.get_tracer("aif_jax.service", tracer_provider=provider)

    def observe(self, seen: Observed) -> None:
        """Writes the spans of an answer."""
        answer = seen.answer
        zero = time.time() - (time.perf_counter() - answer.timeline.arrival)
        spans = answer.timeline.spans
        end = max((span.end for span in spans), default=0.0)
        parent = self._extract({"traceparent": PARENT.get()}) if PARENT.get() else None
        attributes = {
            "aif.version": answer.version, "aif.candidates": len(seen.candidates.ids), "aif.degraded": answer.degraded,
            "aif.request_id": seen.call.id,
        }  # fmt: skip
        whole = self._tracer.start_span(f"aif.{seen.method}", parent, start_time=_nanoseconds(zero), attributes=attributes)
        inside = self._within(whole)
        for span in spans:
            if span.stage != "total":
                part = self._tracer.start_span(f"aif.{span.stage}", inside, start_time=_nanoseconds(zero + span.start))
                part.end(_nanoseconds(zero + span.end))
        whole.end(_nanoseconds(zero + end))


def _nanoseconds(seconds: float) -> int:
    return int(1e9 * seconds)
