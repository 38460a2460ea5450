"""What Prometheus scrapes: the engines' figures by version, and those of the service."""

from __future__ import annotations

import os
from typing import Any

from aif_jax.service.core import Service
from aif_jax.serving.metrics import prometheus_text


def service_text(service: Service) -> str:
    """The metrics of a service in the Prometheus text format; raises ImportError as `prometheus_text`.

    Counters and latencies of the engines have the label `version` and add up over worker processes by their label `worker`.
    Those of the feature source have no version.
    """
    models, worker = service.models, str(os.getpid())
    shares = {id(served): share for share, served in models.shares}
    gauges: dict[str, Any] = {"ready": [({}, float(service.unready is None))]}
    gauges |= {f"model_{name}": [] for name in ("age_seconds", "share", "items")}
    gauges |= {name: [] for name in ("index_age_seconds", "index_position", "user_table_age_seconds", "user_table_position")}
    for served in models.held:
        labels = {"version": served.version[:12], "folder": served.entry.folder}
        gauges["model_age_seconds"].append((labels, served.age))
        gauges["model_share"].append((labels, shares.get(id(served), 0.0)))
        gauges["model_items"].append((labels, float(len(served.restored.index or ()))))
        gauges["index_age_seconds"].append((labels, served.index_age))
        for name, written in (("index", served.index_from), ("user_table", served.table_from)):
            positions = {} if written is None else written.positions
            gauges[f"{name}_position"] += [(labels | {"partition": str(part)}, float(at)) for part, at in positions.items()]
        if served.table_from is not None:
            gauges["user_table_age_seconds"].append((labels, served.table_from.age))
    counters = {
        "calls": [({"method": method, "code": code}, float(n)) for (method, code), n in service.calls.items()],
        "publishes": [({}, float(models.publishes))],
        "publish_failures": [({}, float(models.failures))],
    }
    for observer in service.observers:
        for name, value in getattr(observer, "counters", {}).items():
            counters.setdefault(name, []).append(({}, float(value)))
    by_version = {served.version[:12]: served.engine.metrics() for served in reversed(models.held)}
    reads = None if models.reads is None else models.reads.values()
    return prometheus_text(reads, by_version=by_version, gauges=gauges, counters=counters, labels={"worker": worker})
