"""Counters and latency histograms, as plain values and for Prometheus; and counts of unknown ids in a user's features."""

import bisect
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from aif_jax.checks import needs_extra
from aif_jax.types import UserFeatures

UNKNOWN = "history_events", "unknown_events", "unknown_actions", "unknown_attributes"  # counters of `UnknownCounts`
COUNTERS = (  # that are there from the start: Prometheus' `rate` does not see the first event of one that appears
    *UNKNOWN, "requests", "answered", "refused", "cancelled", "index_updates", "cache_hits", "cache_misses", "cache_joins",
    "candidates", "unknown_candidates", "excluded_candidates", "non_finite_scores",
)  # fmt: skip
MIN_EVENTS = 5  # that a history must have before its unknown share marks an answer


class UnknownCounts(NamedTuple):
    """Events and attributes of one user that the model does not know."""

    events: int = 0  # of the history
    items: int = 0  # events whose item is unknown
    actions: int = 0  # events whose action is unknown
    attributes: int = 0  # of the user, unknown or missing

    def warning(self, bound: float | None) -> str | None:
        """Return why an answer is marked: a share of unknown items or actions above the bound. None where it is not."""
        if bound is None or self.events < MIN_EVENTS or max(self.items, self.actions) <= bound * self.events:
            return None
        unknown = f"{self.items} of {self.events} events have an unknown item, {self.actions} an unknown action"
        return f"history: {unknown}, more than max_unknown={bound}; expected ids and actions as the model's encoder read them"


def count_unknown(features: UserFeatures) -> UnknownCounts:
    """Return counts of checked features."""
    history, attributes = features.history, sum(not np.count_nonzero(value) for value in features.ids.values())
    mask = np.asarray(history.mask)
    unknown = (mask & (np.asarray(ids) == 0) for ids in (history.item, history.action))
    events, items, actions = (int(np.count_nonzero(there)) for there in (mask, *unknown))
    return UnknownCounts(events, items, actions, attributes)


BOUNDS = tuple(round(1e-5 * 10 ** (i / 6), 9) for i in range(37))
"""Upper bounds of the histogram buckets in seconds: 10 microseconds to 10 seconds, six a decade."""


class Histogram:
    """Latencies in geometric buckets; a quantile is read to about a fifth of its value."""

    def __init__(self):
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one latency."""
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def quantile(self, share: float) -> float:
        """Return seconds below which `share` of the latencies lie, interpolated inside a bucket; 0.0 without any."""
        wanted, before = share * sum(self.counts), 0
        for place, count in enumerate(self.counts):
            if count and before + count >= wanted:
                low = BOUNDS[place - 1] if place else 0.0
                return low + (BOUNDS[min(place, len(BOUNDS) - 1)] - low) * (wanted - before) / count
            before += count
        return 0.0

    def values(self) -> dict[str, Any]:
        """Count, sum, p50, p99 in seconds and the cumulative counts by upper bound."""
        cumulative = dict(zip((*BOUNDS, float("inf")), itertools.accumulate(self.counts), strict=True))
        quantiles = {"p50": self.quantile(0.5), "p99": self.quantile(0.99)}
        return {"count": sum(self.counts), "sum": self.sum, **quantiles, "cumulative": cumulative}


class Metrics:
    """What an engine counts; written from the event loop's thread only."""

    def __init__(self):
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.degraded: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.stages: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.scorings = deque([0.0], maxlen=32)  # seconds that the scoring of each of the latest requests took

    @property
    def scoring(self) -> float:
        """Seconds within which nine of ten recent requests were scored; while fewer than four were, the longest of them."""
        return sorted(self.scorings)[round(0.9 * (len(self.scorings) - 1))]

    def values(self) -> dict[str, Any]:
        """Return plain dicts and numbers: `counters`, `degraded` and `failed` by reason, `stages` by name."""
        return {
            "counters": {**self.counters, "degraded": sum(dict(self.degraded).values())},
            "degraded": dict(self.degraded),
            "failed": dict(self.failed),
            "stages": {name: histogram.values() for name, histogram in dict(self.stages).items()},
        }


Part: TypeAlias = tuple[dict[str, str], dict[str, Any]]
"""Labels, and the metrics of one part of a process that have them."""


def prometheus_text(metrics: dict[str, Any], *more: Part) -> str:
    """Return metrics in the Prometheus text format, by the official client library.

    Counters are `aif_<name>_total`, gauges `aif_<name>`, latencies `aif_stage_seconds{stage=...}`.

    Args:
      metrics: `AsyncPreRanker.metrics()`, or those of another part with counters and gauges by name, such as
        `connectors.Follower.metrics()`.
      more: metrics of further parts, each with the labels of its samples, such as ({"version": "3f9a"}, engine.metrics()).

    Raises:
      ImportError: prometheus-client is not there.

    Example:
      >>> "aif_answered_total 2.0" in prometheus_text({"counters": {"answered": 2}})
      True
    """
    client, registry = registry_of(lambda: [({}, metrics), *more])
    return client.generate_latest(registry).decode()


def registry_of(read: Callable[[], list[Part]]) -> tuple[Any, Any]:
    """Return the client library, and a registry whose metrics are read when it is; ImportError without the library."""
    with needs_extra("metrics for Prometheus need prometheus-client", "metrics"):
        import prometheus_client as client

    class Collector:
        def collect(self):
            return _families(client, read())

    registry = client.CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return client, registry


def _families(client: Any, parts: list[Part]) -> Iterable[Any]:
    """Return the metrics of all parts by name, as the client library has them."""
    families: dict[str, Any] = {}

    def add(name: str, text: str, kind: str, samples: Iterable[tuple[str, dict[str, str], float]]) -> None:
        family = families.setdefault(name, client.Metric(f"aif_{name}", text, kind))
        for suffix, labels, value in samples:
            family.add_sample(f"aif_{name}{suffix}", labels, value)

    for labels, metrics in parts:
        for name, value in metrics.get("counters", {}).items():
            add(name, f"Total of {name.replace('_', ' ')}.", "counter", [("_total", labels, value)])
        for name, value in metrics.get("gauges", {}).items():
            add(name, f"Current {name.replace('_', ' ')}.", "gauge", [("", labels, value)])
        for name in ("degraded_reason", "failed_reason", "callable_errors"):
            counts = metrics.get(name.removesuffix("_reason"), {})
            reasons = [("_total", labels | {"reason": why}, n) for why, n in counts.items()]
            add(name, f"Total of {name.replace('_', ' ')}.", "counter", reasons)
        for stage, values in metrics.get("stages", {}).items():
            by = labels | {"stage": stage}
            counts = zip([*map(repr, BOUNDS), "+Inf"], values["cumulative"].values(), strict=True)
            samples = [("_bucket", by | {"le": bound}, count) for bound, count in counts]
            samples += [("_count", by, values["count"]), ("_sum", by, values["sum"])]
            add("stage_seconds", "Latency of each stage.", "histogram", samples)
    return families.values()
