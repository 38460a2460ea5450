"""OpenTelemetry spans of the calls: one for a call, one for each of its stages, under the caller's trace."""

from __future__ import annotations

import contextvars
import time
from typing import Any

from aif_jax.service.core import Observed

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
