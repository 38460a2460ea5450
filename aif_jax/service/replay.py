"""Replay: a request log scored by another version; what differs, field by field, in the ranking, in the scores."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.service import frame
from aif_jax.service.calls import Call, Limits, parse
from aif_jax.service.core import Service
from aif_jax.service.errors import problem_of
from aif_jax.service.log import Record, read_log
from aif_jax.service.models import Models
from aif_jax.serving import ServingConfig
from aif_jax.trees import leaves_by_path

ROOM = Limits(candidates=1 << 24, events=1 << 24)
BINS = 20


@dataclasses.dataclass(kw_only=True)
class Field:
    """One array of the features, over all records."""

    compared: int = 0
    different: int = 0
    largest: float = 0.0

    def note(self, logged: np.ndarray, now: np.ndarray) -> None:
        """Compares two values of it."""
        self.compared += 1
        if logged.shape != now.shape:
            self.different += 1
            self.largest = float("inf")
        elif not np.array_equal(logged, now):
            self.different += 1
            self.largest = max(self.largest, float(np.abs(logged.astype(np.float64) - now.astype(np.float64)).max()))


@dataclasses.dataclass(kw_only=True)
class Report:
    """What a replay found.

    Attributes:
      version: of the model that replayed.
      records: that were scored again.
      skipped: others, by reason.
      fields: by name of the features: how many records have other values now than were logged, and the largest difference.
      overlap: mean share of a logged ranking that the other version has among as many best.
      logit_difference: mean and largest |logit - logged logit| of the same items.
      histogram: edges and counts of logged logits and of the other version's.
    """

    version: str
    records: int
    skipped: dict[str, int]
    fields: dict[str, Field]
    overlap: float | None
    logit_difference: dict[str, float]
    histogram: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        skipped = "".join(f"; skipped {count}: {reason}" for reason, count in self.skipped.items())
        lines = [f"version {self.version[:12]}: {self.records} records{skipped}"]
        lines += [
            f"  {name}: {field.different} of {field.compared} differ, by at most {field.largest:g}"
            for name, field in self.fields.items()
            if field.different
        ]
        if not any(field.different for field in self.fields.values()):
            lines.append(f"  features: {len(self.fields)} fields, the same in every record")
        if self.overlap is not None:
            lines.append(f"  top-k overlap {self.overlap:.4f}")
        mean, most = (self.logit_difference[name] for name in ("mean", "largest"))
        return "\n".join([*lines, f"  logits differ by {mean:.3g} on average, at most {most:.3g}"])


def replay(log: str | Path, folder: str | Path, *, config: ServingConfig | None = None, limit: int | None = None) -> Report:
    """Scores the records of a log with the export in a folder.

    Raw records and events are encoded anew by the export's encoder; logged features are used where there are no raw ones.

    Args:
      log: file or folder that `RequestLog` wrote.
      folder: an export, or exports with a file `current`.
      config: of the engine.
      limit: records to read at most.

    Raises:
      FileNotFoundError, ValueError: no log, no export.
    """
    records = itertools.islice(read_log(log), limit)
    return asyncio.run(_replay(records, Service(Models(folder, config=config or ServingConfig()))))


async def _replay(records: Any, service: Service) -> Report:
    skipped: Counter[str] = Counter()
    fields: dict[str, Field] = {}
    overlaps: list[float] = []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    async with service:
        served = service.models.held[0]
        for record in records:
            try:
                call = call_of(record)
                if call is None:
                    skipped["no features"] += 1
                    continue
                if record.degraded:
                    skipped["answered degraded"] += 1
                    continue
                features = served.users.of(call)
                answer = (await service.score(call)).answer
                if answer.degraded:
                    skipped["degraded now"] += 1
                    continue
            except Exception as error:  # of one record, which the report counts
                skipped[f"{problem_of(error).code}: {str(error)[:120]}"] += 1
                continue
            count += 1
            if record.features is not None and call.features is None:
                now = leaves_by_path(features, separator=".")
                for name, logged in frame_arrays(record.features).items():
                    if name in now:
                        fields.setdefault(name, Field()).note(logged, np.asarray(now[name]))
            _compare(record, call, answer.logits, overlaps, pairs)
    logged, other = (np.concatenate([pair[side] for pair in pairs] or [np.zeros(0)]) for side in (0, 1))
    gap = np.abs(logged - other)
    return Report(
        version=served.version, records=count, skipped=dict(skipped), fields=fields,
        overlap=float(np.mean(overlaps)) if overlaps else None,
        logit_difference={"mean": float(gap.mean()) if len(gap) else 0.0, "largest": float(gap.max(initial=0.0))},
        histogram=_histogram(logged, other),
    )  # fmt: skip


def call_of(record: Record) -> Call | None:
    """The call that a record keeps, for `score`; None where it has neither raw nor encoded features."""
    candidates = record.candidates if record.candidate_texts is None else record.candidate_texts
    exclude = record.exclude if record.exclude_texts is None else record.exclude_texts
    fields: dict[str, Any] = {"user": json.loads(record.user), "candidates": candidates, "exclude": exclude, "id": record.id}
    if record.raw is not None:
        fields |= frame.unpack(record.raw)
    elif record.features is not None:
        fields |= {"features": frame_arrays(record.features), "encoding": record.encoding}
    else:
        return None
    return parse(fields, ROOM)


def frame_arrays(raw: bytes) -> dict[str, np.ndarray]:
    """The arrays of a frame by dotted name."""
    flat: dict[str, np.ndarray] = {}
    for name, value in frame.unpack(raw).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _compare(record: Record, call: Call, logits: np.ndarray, overlaps: list[float], pairs: list[Any]) -> None:
    """Notes the overlap of a ranking by logits of the first objective, and the logits of items that both versions scored."""
    assert call.candidates is not None
    best = record.ids if record.id_texts is None else record.id_texts
    count = len(logits) if best is None else len(best)
    logits, logged = (
        np.reshape(values, (rows, -1)) for values, rows in ((logits, len(logits)), (record.logits, max(count, 1)))
    )
    most = min(logits.shape[1], logged.shape[1])  # of versions with different objectives the first ones are compared
    logits, logged = logits[:, :most], np.asarray(logged[:count, :most], np.float64)
    if best is None:
        other = logits.astype(np.float64)
    else:
        at = {name: place for place, name in reversed(list(enumerate(call.candidates.ids.tolist())))}
        other = logits[[at[name] for name in best]].astype(np.float64)
        if best and record.order == "logit":
            top = call.candidates.ids[np.argsort(-logits[:, 0], kind="stable")[: len(best)]].tolist()
            overlaps.append(len(set(best) & set(top)) / len(best))
    both = np.isfinite(logged) & np.isfinite(other)
    pairs.append((logged[both], other[both]))


def _histogram(logged: np.ndarray, other: np.ndarray) -> dict[str, list[float]]:
    if not len(logged):
        return {"edges": [], "logged": [], "other": []}
    edges = np.histogram_bin_edges(np.concatenate([logged, other]), BINS)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in (("logged", logged), ("other", other))}
    return {"edges": edges.tolist(), **counts}
