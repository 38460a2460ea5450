"""The request log: a sample of the answered calls as Parquet files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.checks import expect
from aif_jax.readers.tables import pyarrow
from aif_jax.service.core import Observed, to_json
from aif_jax.serving import Ranking
from aif_jax.store.folders import new_file
from aif_jax.trees import leaves_by_path

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
    features: Any  # that the answer used: pairs of a dotted name and numbers; None of an earlier call's state and of a stand-in
    raw: str | None  # record, events and now that these were made from, JSON; None for a call without
    exclude: Any  # ids that were not to be ranked, int64 [E]; None of texts, and for a call without
    exclude_texts: list[str] | None
    feature_version: str | None  # as JSON: another record of this version and user may have the features


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
        """Hand an answer to the thread, or drop it."""
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
        """Write what waits and end the thread."""
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
    """Return what is logged of an answer."""
    call, answer = seen.call, seen.answer
    ids = answer.ids[answer.mask] if isinstance(answer, Ranking) else None
    logits = answer.logits[answer.mask] if isinstance(answer, Ranking) else answer.logits
    candidates = seen.candidates
    given = {"record": call.record, "events": call.events, "now": seen.now if call.now is None else call.now}
    known = {name: value for name, value in given.items() if value is not None}
    raw = json.dumps(to_json(known)) if known.keys() - {"now"} and seen.features is not None else None
    features = None
    if seen.features is not None:
        features = [
            (name, np.ravel(leaf).astype(np.float64)) for name, leaf in leaves_by_path(seen.features, separator=".").items()
        ]
    return LogRecord(
        id=call.id, time=time.time(), method=seen.method, version=answer.version, user=json.dumps(call.user), k=call.k or 0,
        order=call.order or "", candidates=_of(candidates.ids, "i"), candidate_texts=_of(candidates.ids, "T"),
        bids=candidates.bids, ids=_of(ids, "i"), id_texts=_of(ids, "T"), logits=logits.ravel(), degraded=answer.degraded,
        reason=answer.reason, stages=json.dumps(answer.stages),
        encoding="" if seen.features is None else seen.features.encoding, features=features, raw=raw,
        exclude=_of(call.exclude, "i"), exclude_texts=_of(call.exclude, "T"),
        feature_version=None if call.feature_version is None else json.dumps(call.feature_version),
    )  # fmt: skip


def log_schema() -> Any:
    """Return the Arrow schema of its files."""
    arrow = pyarrow()
    kinds = {
        "time": arrow.float64(), "k": arrow.int32(), "candidates": arrow.list_(arrow.int64()),
        "candidate_texts": arrow.list_(arrow.string()), "bids": arrow.list_(arrow.float32()),
        "ids": arrow.list_(arrow.int64()), "id_texts": arrow.list_(arrow.string()), "logits": arrow.list_(arrow.float32()),
        "degraded": arrow.bool_(), "features": arrow.map_(arrow.string(), arrow.list_(arrow.float64())),
        "exclude": arrow.list_(arrow.int64()), "exclude_texts": arrow.list_(arrow.string()),
    }  # fmt: skip
    return arrow.schema([(name, kinds.get(name, arrow.string())) for name in LogRecord._fields])


def _of(ids: Any, kind: str) -> Any:
    """Return ids of one kind, texts as a list, numbers apart from the body that they came in; None for those of the other."""
    return None if ids is None or ids.dtype.kind != kind else ids.tolist() if kind == "T" else ids.copy()


def _size(seen: Observed) -> int:
    """Return bytes of memory that a call and its answer hold until they are written."""
    call, answer = seen.call, seen.answer
    held = [call.record, call.events, call.features, call.exclude, seen.candidates.ids, seen.candidates.bids]
    held += jax.tree.leaves(seen.features) + [getattr(answer, name, None) for name in ("ids", "scores", "logits", "mask")]
    return 4096 + _bytes(held)


def _bytes(values: list[Any]) -> int:
    """Return bytes of arrays and plain values at any depth, and their containers; no recursion: callers choose the depth."""
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
