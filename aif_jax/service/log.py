"""Observers of answered calls: the request log (a sample as Parquet files) and its replay by another version, shadow traffic,
OpenTelemetry spans."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import itertools
import json
import logging
import os
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.checks import expect, needs_extra
from aif_jax.readers.sources import pyarrow
from aif_jax.service import tensors
from aif_jax.service.calls import Call, Limits, parse, problem_of
from aif_jax.service.core import Observed, Service
from aif_jax.service.features import Context
from aif_jax.service.models import Models, Served
from aif_jax.serving import Ranking, Request, ServingConfig
from aif_jax.store.folders import new_file
from aif_jax.trees import leaves_by_path
from aif_jax.types import Behaviours

logger = logging.getLogger(__name__)
FILE = "requests-{start:020d}-{process}-{number:08d}.parquet"  # a container's processes have the same number each time
PLAIN = {int, float, str, bool, type(None)}


class LogRecord(NamedTuple):
    """One logged call."""

    id: str
    time: float  # of the answer, in seconds since 1970
    method: str  # rank or score
    version: str
    user: str  # raw id as JSON
    k: int
    order: str  # of a ranking, "" of scores
    candidates: Any  # lists, or arrays before they are written: int64 [C], None of texts
    candidate_texts: list[str] | None
    bids: Any  # float32 [C] or None
    ids: Any  # of a ranking, best first
    id_texts: list[str] | None
    logits: Any  # float32, of the ranking, or of the candidates; of T objectives T for each
    degraded: bool
    reason: str | None
    stages: str  # seconds by stage, JSON
    encoding: str
    features: bytes | None  # encoded, tensors by dotted name; None of an earlier call's state, and of a row of users
    raw: bytes | None  # record, events and now of the call, as tensors.pack writes; None for a call without
    exclude: Any = None  # ids that were not to be ranked, int64 [E]; None of texts, and for a call without, as in older files
    exclude_texts: list[str] | None = None


FILE_ROWS, FILE_SECONDS = 4096, 5.0  # a file is written with so many records, or so long after its first


class RequestLog:
    """Observes a service: `Service(models, observers=(log,))`.

    Args:
      folder: folder of the files; made where it is missing.
      share: share of the calls, 0 to 1, that are logged.
      waiting: records that may wait for the thread; with more, calls are not logged and `counters["log_dropped"]` counts them.
      waiting_bytes: the same in bytes of memory, those of the next file, which has at most half of them, included.

    Raises:
      ImportError: pyarrow is missing.
      ValueError: a share outside [0, 1].
    """

    def __init__(self, folder: str | Path, *, share: float = 1.0, waiting: int = 4096, waiting_bytes: int = 256 << 20):
        expect(0 <= share <= 1, "log share", "0 to 1", share)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counters = {"log_records": 0, "log_dropped": 0, "log_failed": 0}
        self._share = share
        self._schema = log_schema()
        self._waiting: queue.Queue[tuple[Observed, int] | None] = queue.Queue(waiting)
        self._most = waiting_bytes
        self._came = self._went = 0  # bytes, each counted by one thread
        # Files sort by their start: after those of an earlier process, also where the clock was set back meanwhile.
        before = (int(path.name.split("-")[1]) for path in self.folder.glob("requests-*-*-*.parquet"))
        self._start, self._number = max(time.time_ns(), max(before, default=0) + 1), 0
        self._thread = threading.Thread(target=self._work, name="aif-request-log", daemon=True)
        self._thread.start()

    def observe(self, seen: Observed) -> None:
        """Hands an answer to the thread, or drops it."""
        if self._share < 1 and random.random() >= self._share:
            return
        try:
            size = _size(seen)
            if self._came - self._went + size > self._most:
                raise queue.Full
            self._waiting.put_nowait((seen, size))
            self._came += size
        except queue.Full:
            self.counters["log_dropped"] += 1

    def close(self) -> None:
        """Writes what waits and ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        records: list[LogRecord] = []
        due, size = 0.0, 0
        while True:
            with contextlib.suppress(queue.Empty):  # the file is due
                found = self._waiting.get(timeout=max(0.0, due - time.monotonic()) if size else None)
                if found is None:
                    return self._write(records)
                due = due if size else time.monotonic() + FILE_SECONDS
                size += found[1]
                try:
                    records.append(record_of(found[0]))
                except Exception as error:  # a log must not end a service
                    self._failed(1, error)
            if len(records) >= FILE_ROWS or 2 * size >= self._most or time.monotonic() >= due:
                self._write(records)
                self._went += size
                records, size, found = [], 0, None  # an idle thread holds no version

    def _write(self, records: Sequence[LogRecord]) -> None:
        if not records:
            return
        try:
            name = FILE.format(start=self._start, process=os.getpid(), number=self._number)
            columns = {field: [getattr(record, field) for record in records] for field in LogRecord._fields}
            with new_file(self.folder / name) as partial:
                pyarrow("pyarrow.parquet").write_table(pyarrow().table(columns, schema=self._schema), partial)
            self._number += 1
            self.counters["log_records"] += len(records)
        except Exception as error:  # a full disk must not end a service
            self._failed(len(records), error)

    def _failed(self, count: int, error: Exception) -> None:
        self.counters["log_failed"] += count
        logger.error("%s: %d records lost: %s", self.folder, count, error)


def record_of(seen: Observed) -> LogRecord:
    """What is logged of an answer."""
    call, answer = seen.call, seen.answer
    ids = answer.ids[answer.mask] if isinstance(answer, Ranking) else None
    logits = answer.logits[answer.mask] if isinstance(answer, Ranking) else answer.logits
    candidates = seen.candidates
    given = {"record": call.record, "events": call.events, "now": seen.now if call.now is None else call.now}
    known = {name: value for name, value in given.items() if value is not None}
    raw = tensors.pack(known) if known.keys() - {"now"} else None
    features = None
    if seen.features is not None and isinstance(seen.features.history, Behaviours):
        features = tensors.pack({k: np.asarray(v) for k, v in leaves_by_path(seen.features, separator=".").items()})
    return LogRecord(
        id=call.id, time=time.time(), method=seen.method, version=answer.version, user=json.dumps(call.user), k=call.k or 0,
        order=call.order or "", candidates=_of(candidates.ids, "i"), candidate_texts=_of(candidates.ids, "T"),
        bids=candidates.bids, ids=_of(ids, "i"), id_texts=_of(ids, "T"), logits=logits.ravel(), degraded=answer.degraded,
        reason=answer.reason, stages=json.dumps(answer.stages),
        encoding="" if seen.features is None else seen.features.encoding, features=features, raw=raw,
        exclude=_of(call.exclude, "i"), exclude_texts=_of(call.exclude, "T"),
    )  # fmt: skip


def read_log(path: str | Path) -> Iterator[LogRecord]:
    """The records of a file or of a folder, file by file; raises FileNotFoundError, ValueError for files that are none."""
    arrow = pyarrow()
    for file in log_files(path):
        try:
            table = pyarrow("pyarrow.parquet").ParquetFile(file)
            missing = sorted(set(LogRecord._fields) - set(LogRecord._field_defaults) - set(table.schema_arrow.names))
            expect(not missing, str(file), "the columns of a request log", f"none of {missing}")
            columns = [name for name in LogRecord._fields if name in table.schema_arrow.names]
            for batch in table.iter_batches(1024, columns=columns):
                yield from (LogRecord(**row) for row in batch.to_pylist())
        except arrow.ArrowException as error:
            raise ValueError(f"{file}: expected a request log: {error}") from error


def log_files(path: str | Path) -> list[Path]:
    """The files of a request log, by time; FileNotFoundError for none."""
    path = Path(path)
    files = sorted(path.glob("requests-*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{path}: expected a request log, got none; write one: aif-jax serve --log DIR")
    return files


def log_schema() -> Any:
    """The Arrow schema of its files."""
    arrow = pyarrow()
    kinds = {
        "time": arrow.float64(), "k": arrow.int32(), "candidates": arrow.list_(arrow.int64()),
        "candidate_texts": arrow.list_(arrow.string()), "bids": arrow.list_(arrow.float32()),
        "ids": arrow.list_(arrow.int64()), "id_texts": arrow.list_(arrow.string()), "logits": arrow.list_(arrow.float32()),
        "degraded": arrow.bool_(), "features": arrow.binary(), "raw": arrow.binary(),
        "exclude": arrow.list_(arrow.int64()), "exclude_texts": arrow.list_(arrow.string()),
    }  # fmt: skip
    return arrow.schema([(name, kinds.get(name, arrow.string())) for name in LogRecord._fields])


def _of(ids: Any, kind: str) -> Any:
    """Ids of one kind, texts as a list, numbers apart from the body that they came in; None for those of the other."""
    return None if ids is None or ids.dtype.kind != kind else ids.tolist() if kind == "T" else ids.copy()


def _size(seen: Observed) -> int:
    """Bytes of memory that a call and its answer hold until they are written."""
    call, answer = seen.call, seen.answer
    held = [call.record, call.events, call.features, call.exclude, seen.candidates.ids, seen.candidates.bids]
    held += jax.tree.leaves(seen.features) + [getattr(answer, name, None) for name in ("ids", "scores", "logits", "mask")]
    return 4096 + _bytes(held)


def _bytes(values: list[Any]) -> int:
    """Bytes of arrays and of plain values at any depth, with their containers; without recursion, since callers choose it."""
    size, waiting = 0, values
    while waiting:
        value = waiting.pop()
        if isinstance(value, np.ndarray | jax.Array):
            size += value.nbytes
            if isinstance(value, np.ndarray) and value.dtype.kind == "T":
                size += int(np.strings.str_len(value).sum())
            continue
        size += sys.getsizeof(value)
        if isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            if PLAIN.issuperset(map(type, value)):
                size += sum(map(sys.getsizeof, value))
            else:
                waiting += value
    return size


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
        if not np.array_equal(logged, now):
            self.different += 1
            same = logged.shape == now.shape
            gap = np.abs(logged.astype(np.float64) - now.astype(np.float64)).max() if same else np.inf
            self.largest = max(self.largest, float(gap))


@dataclasses.dataclass(kw_only=True)
class Replay:
    """What a replay found.

    Attributes:
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


def replay(log: str | Path, folder: str | Path, *, config: ServingConfig | None = None, limit: int | None = None) -> Replay:
    """Scores the records of a log with the export in a folder.

    Raw records and events are encoded again by the export's encoder; logged features are used where there are no raw ones.

    Args:
      log: file or folder that `RequestLog` wrote.

    Raises:
      FileNotFoundError, ValueError: no log, no export.
    """
    records = itertools.islice(read_log(log), limit)
    return asyncio.run(_replay(records, Service(Models(folder, config=config or ServingConfig()))))


async def _replay(records: Any, service: Service) -> Replay:
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
                if call is None or record.degraded:
                    skipped["no features" if call is None else "answered degraded"] += 1
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
            same = record.encoding == served.restored.trained.encoding  # or rows mean other values
            if record.features is not None and call.features is None and same:
                now = leaves_by_path(features, separator=".")
                for name, logged in logged_arrays(record.features).items():
                    if name in now:
                        fields.setdefault(name, Field()).note(logged, np.asarray(now[name]))
            if len(answer.logits):
                _compare(record, call, answer.logits, overlaps, pairs)
    logged, other = (np.concatenate([pair[side] for pair in pairs] or [np.zeros(0)]) for side in (0, 1))
    gap = np.abs(logged - other)
    return Replay(
        version=served.version, records=count, skipped=dict(skipped), fields=fields,
        overlap=float(np.mean(overlaps)) if overlaps else None,
        logit_difference={"mean": float(gap.mean()) if len(gap) else 0.0, "largest": float(gap.max(initial=0.0))},
        histogram=_histogram(logged, other),
    )  # fmt: skip


def call_of(record: LogRecord) -> Call | None:
    """The call that a record keeps, for `score`; None where it has neither raw nor encoded features."""
    candidates = record.candidates if record.candidate_texts is None else record.candidate_texts
    exclude = record.exclude if record.exclude_texts is None else record.exclude_texts
    fields: dict[str, Any] = {"user": json.loads(record.user), "candidates": candidates, "exclude": exclude, "id": record.id}
    if record.raw is not None:
        fields |= tensors.unpack(record.raw)
    elif record.features is not None:
        fields |= {"features": logged_arrays(record.features), "encoding": record.encoding}
    else:
        return None
    return parse(fields, ROOM)


def logged_arrays(raw: bytes) -> dict[str, np.ndarray]:
    """Arrays of a record by dotted name; raises ValueError."""
    head, _, data = raw.partition(b"\n")
    return tensors.arrays_from(tensors.parse_json(head).get("tensors"), data)


def _compare(record: LogRecord, call: Call, logits: np.ndarray, overlaps: list[float], pairs: list[Any]) -> None:
    """Notes the overlap of a ranking by logits of the first objective, and the logits of items that both versions scored."""
    assert call.candidates is not None
    best = record.ids if record.id_texts is None else record.id_texts
    count = len(logits) if best is None else len(best)
    logits, logged = np.reshape(logits, (len(logits), -1)), np.reshape(record.logits, (max(count, 1), -1))
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


class Shadow:
    """Observes a service: `Service(models, observers=(Shadow(lambda: models.named("next")),))`.

    A version without users, share=0 in `current`, is loaded for it. Where one of the two answers is degraded, which may be that
    of another user state, they are not compared; `counters["shadow_degraded"]` counts them.

    Args:
      share: share of the calls, 0 to 1.
      limit: calls that may be scored at once; others are dropped.
    """

    def __init__(self, version: Callable[[], Served], *, share: float = 0.1, limit: int = 2):
        expect(0 <= share <= 1, "shadow share", "0 to 1", share)
        names = ("calls", "dropped", "failed", "degraded", "top", "top_same")
        self.counters = {f"shadow_{name}": 0 for name in names}
        self._version, self._share, self._limit, self._said = version, share, limit, ""
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

    async def _score(self, seen: Observed) -> None:
        try:
            served = self._version()
            if served is seen.served:
                return
            context = Context(served.users.of(seen.call), now=seen.call.now)
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
            if (text := f"{type(error).__name__}: {error}") != self._said:  # a line for a problem, not for each call
                self._said = text
                logger.warning("shadow: %s", text)


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
        with needs_extra("traces need OpenTelemetry", "traces"):
            from opentelemetry import propagate, trace
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
