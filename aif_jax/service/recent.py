"""The last minutes of a service: who was answered, how fast by stage, and the timeline of the latest request."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from typing import Any, NamedTuple

import numpy as np

from aif_jax.serving.requests import Answer

SECONDS = 300.0
MOST = 20_000
STAGES = (
    "features",
    "user",
    "shared",
    "retrieval",
    "wait_user",
    "queue",
    "lookup",
    "upload",
    "score",
    "fetch",
    "critical",
    "total",
)


class Seen(NamedTuple):
    """One call that ended."""

    at: float  # seconds since 1970
    method: str
    version: str
    code: str  # "OK", or that of the problem
    degraded: bool
    stages: dict[str, float]


class Recent:
    """Calls of the last minutes, at most `MOST`; noted from one thread, summed up from any."""

    def __init__(self):
        self._calls: deque[Seen] = deque(maxlen=MOST)
        self._timeline: dict[str, Any] | None = None

    def note(self, method: str, version: str, code: str, answer: Answer | None) -> None:
        """Counts a call that has ended."""
        stages = {} if answer is None else answer.stages
        self._calls.append(Seen(time.time(), method, version, code, answer is not None and answer.degraded, stages))
        if answer is not None and method == "rank":
            self._timeline = {"version": version, "spans": [list(span) for span in answer.timeline.spans]}

    def summary(self, *, seconds: float = SECONDS) -> dict[str, Any]:
        """Calls a second, codes, and p50 and p99 of every stage by version, over the last seconds; the latest timeline."""
        now = time.time()
        calls = [seen for seen in self._calls.copy() if now - seen.at <= seconds]  # a copy, because more come meanwhile
        span = max(min(seconds, now - calls[0].at), 1.0) if calls else seconds
        by_version: dict[str, Any] = {}
        for seen in calls:
            group = by_version.setdefault(seen.version, {"codes": Counter(), "degraded": 0, "stages": defaultdict(list)})
            group["codes"][seen.code] += 1
            group["degraded"] += seen.degraded
            for stage, value in seen.stages.items():
                group["stages"][stage].append(value)
        for group in by_version.values():
            group["per_second"] = group["codes"].total() / span
            found = {
                stage: np.percentile(group["stages"][stage], [50, 99]).tolist() for stage in STAGES if stage in group["stages"]
            }
            group["stages"] = {stage: {"p50": p50, "p99": p99} for stage, (p50, p99) in found.items()}
        recent = [seen for seen in calls if now - seen.at <= 10.0]
        return {
            "seconds": span,
            "per_second": len(recent) / min(10.0, span),
            "versions": by_version,
            "timeline": self._timeline,
        }
