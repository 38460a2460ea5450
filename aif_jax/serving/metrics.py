"""Counters and latency histograms: as plain values, and as Prometheus text."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from typing import Any

BOUNDS = tuple(round(1e-5 * 10 ** (i / 6), 9) for i in range(37))
"""Upper bounds of the histogram buckets in seconds: 10 microseconds to 10 seconds, six a decade."""


class Histogram:
    """Latencies in geometric buckets; a quantile is read to about a fifth of its value."""

    def __init__(self):
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one latency."""
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def quantile(self, share: float) -> float:
        """Seconds below which `share` of the latencies lie, interpolated inside a bucket; 0.0 where nothing was observed."""
        total = sum(self.counts)
        wanted, before = share * total, 0
        for place, count in enumerate(self.counts):
            if count and before + count >= wanted:
                low = BOUNDS[place - 1] if place else 0.0
                high = BOUNDS[min(place, len(BOUNDS) - 1)]
                return low + (high - low) * (wanted - before) / count
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
        self.counters: Counter[str] = Counter()
        self.degraded: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.stages: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.scoring = 0.0  # seconds that scoring took lately: up at once, down slowly

    def observe_scoring(self, seconds: float) -> None:
        """Notes how long the scoring of one request took."""
        self.scoring = max(seconds, 0.95 * self.scoring + 0.05 * seconds)

    def observe(self, stages: dict[str, float]) -> None:
        """Counts the seconds of each stage of one request."""
        for stage, seconds in stages.items():
            self.stages[stage].observe(seconds)

    def values(self) -> dict[str, Any]:
        """Plain dicts and numbers: `counters`, `degraded` and `failed` by reason, `stages` by name."""
        return {
            "counters": dict(self.counters),
            "degraded": dict(self.degraded),
            "failed": dict(self.failed),
            "stages": {name: histogram.values() for name, histogram in dict(self.stages).items()},
        }


def prometheus_text(metrics: dict[str, Any]) -> str:
    """The metrics of an engine, `AsyncPreRanker.metrics()`, in the Prometheus text format, by the official client library.

    Counters are `aif_<name>_total`, gauges `aif_<name>`, latencies `aif_stage_seconds{stage=...}`.

    Raises:
      ImportError: prometheus-client is not there.

    Example:
      >>> "aif_answered_total 2.0" in prometheus_text({"counters": {"answered": 2}, "degraded": {}, "failed": {}, "stages": {}})
      True
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    except ImportError as error:
        raise ImportError('prometheus_text needs prometheus-client: pip install "aif_jax[metrics]"') from error

    class Collector:
        def collect(self):
            for name, value in metrics["counters"].items():
                yield CounterMetricFamily(f"aif_{name}", f"Total of {name.replace('_', ' ')}.", value=value)
            for name, value in metrics.get("gauges", {}).items():
                yield GaugeMetricFamily(f"aif_{name}", f"Current {name.replace('_', ' ')}.", value=value)
            for name in ("degraded", "failed"):
                family = CounterMetricFamily(f"aif_{name}_reason", f"Requests {name}, by reason.", labels=["reason"])
                for reason, value in metrics[name].items():
                    family.add_metric([reason], value)
                yield family
            latency = HistogramMetricFamily("aif_stage_seconds", "Latency of each stage.", labels=["stage"])
            for stage, values in metrics["stages"].items():
                bounds = [*map(repr, BOUNDS), "+Inf"]
                latency.add_metric([stage], list(zip(bounds, values["cumulative"].values(), strict=True)), values["sum"])
            yield latency

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())  # type: ignore[arg-type]
    return generate_latest(registry).decode()
