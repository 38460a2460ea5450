"""The request log: a sample of the answered calls as Parquet files."""

import contextlib
import logging
import os
import queue
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.checks import ArgumentError, expect
from aif_jax.readers.tables import pyarrow
from aif_jax.service.core import Reply
from aif_jax.service.http import encode
from aif_jax.store.folders import new_file

logger = logging.getLogger(__name__)
EACH = 4096  # bytes of memory of any record, without its values
GROUP = 16  # records that are read by Arrow at once: 16 take as long as 3 alone, and few hold up no other thread
FILE_GROUPS, FILE_SECONDS = 256, 5.0  # a file is written with so many groups, or so long after its first record


class RequestLog:
    """Observes a service: `Service(models, observers=(log,))`.

    Args:
      folder: folder of the files; made where it is missing.
      share: share of the calls that are logged, 0 to 1.
      waiting_bytes: memory of the records that wait for the thread or the next file, which has at most half of it; with more,
        calls are not logged and `counters["log_dropped"]` counts them.

    Raises:
      ImportError: pyarrow is missing.
      ArgumentError: a share outside [0, 1].
    """

    def __init__(self, folder: str | Path, *, share: float = 1.0, waiting_bytes: int = 256 << 20):
        expect(0 <= share <= 1, "log_share", "0 to 1", share, error=ArgumentError)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counters = {"log_records": 0, "log_dropped": 0, "log_failed": 0}
        self._share, self._most = share, waiting_bytes
        self._schema = log_schema()
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._came = self._went = 0  # bytes, each counted by one thread
        self._thread = threading.Thread(target=self._work, name="aif-request-log", daemon=True)
        self._thread.start()

    def observe(self, reply: Reply) -> None:
        """Hand the record of an answer to the thread, or drop it."""
        if self._share < 1 and random.random() >= self._share:
            return
        try:
            record = record_of(reply)
        except Exception as error:  # a log must not end a call
            return self._failed(1, error)
        size = EACH + sum(value.nbytes if isinstance(value, np.ndarray) else sys.getsizeof(value) for value in record.values())
        if record["candidate_texts"] is not None:
            size += 3 * reply.call.size  # arrays keep long texts elsewhere, with room to grow
        if self._came - self._went + size > self._most:
            self.counters["log_dropped"] += 1
            return
        self._came += size
        self._waiting.put((record, size))

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        records: list[dict[str, Any]] = []
        groups: list[Any] = []  # Arrow batches, as small as arrays
        due, size = 0.0, 0
        while True:
            with contextlib.suppress(queue.Empty):  # the file is due
                found = self._waiting.get(timeout=max(0.0, due - time.monotonic()) if size else None)
                if found is None:
                    return self._write(groups + self._group(records))
                due = due if size else time.monotonic() + FILE_SECONDS
                size += found[1]
                records.append(found[0])
            full = len(groups) >= FILE_GROUPS or 2 * size >= self._most or time.monotonic() >= due
            if full or len(records) >= GROUP:
                groups += self._group(records)
                records = []
            if full:
                self._write(groups)
                self._went += size
                groups, size = [], 0

    def _group(self, records: list[dict[str, Any]]) -> list[Any]:
        """Return an Arrow batch of some records, none where there are none, or where it cannot be made."""
        try:  # Arrow reads texts from lists alone
            plain = [{name: v.tolist() if v is not None and "_texts" in name else v for name, v in r.items()} for r in records]
            return [pyarrow().RecordBatch.from_pylist(plain, self._schema)] if records else []
        except Exception as error:  # a log must not end a service
            self._failed(len(records), error)
            return []

    def _write(self, groups: list[Any]) -> None:
        if not groups:
            return
        table = pyarrow().Table.from_batches(groups)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # it may have been removed
            with new_file(self.folder / f"requests-{time.time_ns()}-{os.getpid()}.parquet") as partial:
                pyarrow("pyarrow.parquet").write_table(table, partial)
            self.counters["log_records"] += len(table)
        except Exception as error:  # a full disk must not end a service
            self._failed(len(table), error)

    def _failed(self, count: int, error: Exception) -> None:
        self.counters["log_failed"] += count
        logger.error("%s: %d records lost: %s", self.folder, count, error)


def record_of(reply: Reply) -> dict[str, Any]:
    """Return what is logged of an answer, by column: plain values, and arrays."""
    call, answer = reply.call, reply.answer
    candidates: Any = call.candidates
    ids, logits = (None, answer.logits) if reply.method == "score" else (answer.ids[answer.mask], answer.logits[answer.mask])
    given = {"record": call.record, "events": call.events, "now": call.now}
    known = {name: value for name, value in given.items() if value is not None}
    return {
        "id": call.id, "time": time.time(), "method": reply.method, "version": answer.version, "k": call.k or 0,
        "user": encode(call.user).decode(), "order": reply.order, "candidates": _of(candidates.ids, "i"),
        "candidate_texts": _of(candidates.ids, "UT"), "bids": candidates.bids, "ids": _of(ids, "i"), "id_texts": _of(ids, "UT"),
        "logits": logits.ravel(), "degraded": answer.degraded, "reason": answer.reason,
        "raw": encode(known).decode() if known.keys() - {"now"} and reply.features is not None else None,
        "exclude": _of(call.exclude, "i"), "exclude_texts": _of(call.exclude, "UT"), "stages": encode(answer.stages).decode(),
        "feature_version": None if call.feature_version is None else encode(call.feature_version).decode(),
    }  # fmt: skip


def _of(ids: Any, kinds: str) -> Any:
    """Return ids of some kinds of dtype, integers or texts; None for others."""
    return ids if ids is not None and ids.dtype.kind in kinds else None


def log_schema() -> Any:
    """Return the Arrow schema of the files."""
    arrow = pyarrow()
    text, integers, texts = arrow.string(), arrow.list_(arrow.int64()), arrow.list_(arrow.string())
    columns = {
        "id": text,
        "time": arrow.float64(),  # of the answer, in seconds since 1970
        "method": text,  # rank, score, or explain, which nobody was shown
        "version": text,
        "user": text,  # raw id as JSON
        "k": arrow.int64(),
        "order": text,  # of a ranking, "" of scores
        "candidates": integers,  # null of texts
        "candidate_texts": texts,
        "bids": arrow.list_(arrow.float32()),
        "ids": integers,  # of a ranking, best first
        "id_texts": texts,
        "logits": arrow.list_(arrow.float32()),  # of the ranking, or of the candidates; of T objectives T for each
        "degraded": arrow.bool_(),
        "reason": text,
        "stages": text,  # seconds by stage, JSON
        "raw": text,  # record, events and now that the answer used, JSON; null of a prepared or versioned state or a source
        "exclude": integers,  # ids that were not to be ranked; null of texts, and for a call without
        "exclude_texts": texts,
        "feature_version": text,  # as JSON: another record of this version and user may have the raw values
    }
    return arrow.schema(columns)
