"""Scores batches of candidates in worker threads, alone or together with those of concurrent requests."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.buckets import bucket_for
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import DeadlineExceeded
from aif_jax.serving.programs import Part, Programs
from aif_jax.serving.requests import Candidates
from aif_jax.serving.versions import Snapshot, UserSide, Version, batch_sizes

Spans = list[tuple[str, float, float]]


class Item(NamedTuple):
    """One batch of candidates of one request, ready to be scored."""

    version: Version
    snapshot: Snapshot
    user: UserSide
    candidates: Candidates
    order: str
    whole: bool  # all logits come back, not the best k
    submitted: float  # by time.perf_counter
    deadline: float | None


class Scored(NamedTuple):
    """What came of it, on the host."""

    part: Part | None
    logits: np.ndarray | None  # float32 [C], where asked for
    known: np.ndarray  # bool [C]
    spans: Spans


class Scorer:
    """Turns items into scores without blocking the event loop.

    Args:
      programs: compiled functions.
      config: bucket sizes, threads, batching.
    """

    def __init__(self, programs: Programs, config: ServingConfig):
        self._programs = programs
        self._config = config
        self._sizes = batch_sizes(config.batch_size)
        self._pool = ThreadPoolExecutor(config.score_threads, thread_name_prefix="aif-score")
        self._waiting: dict[Any, list[tuple[Item, asyncio.Future[Scored]]]] = {}

    def submit(self, item: Item) -> asyncio.Future[Scored]:
        """Scores one batch of candidates; the future raises what went wrong with this one alone."""
        loop = asyncio.get_running_loop()
        bucket = bucket_for(max(len(item.candidates.ids), 1), self._config.buckets)
        if self._config.batch_size == 1:
            return loop.run_in_executor(self._pool, self._run_alone, item, bucket)
        # A state of another shape, an index snapshot or a bucket of another size needs another compiled function.
        key = (id(item.snapshot), item.user.shape, bucket)
        group = self._waiting.setdefault(key, [])
        future: asyncio.Future[Scored] = loop.create_future()
        group.append((item, future))
        if len(group) == self._config.batch_size:
            self._flush(key, group, bucket)
        elif len(group) == 1:
            loop.call_later(self._config.batch_wait, self._flush, key, group, bucket)
        return future

    def close(self) -> None:
        """Ends the threads once their work is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _flush(self, key: Any, group: list[tuple[Item, asyncio.Future[Scored]]], bucket: int) -> None:
        if self._waiting.get(key) is not group:
            return  # full and gone before its time was up
        del self._waiting[key]
        wanted = [(item, future) for item, future in group if not future.done()]  # the others were cancelled
        if not wanted:
            return
        running = asyncio.get_running_loop().run_in_executor(self._pool, self._run, [item for item, _ in wanted], bucket)
        running.add_done_callback(lambda done: _hand_out(done, [future for _, future in wanted]))

    def _run_alone(self, item: Item, bucket: int) -> Scored:
        (result,) = self._run([item], bucket)
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, items: list[Item], bucket: int) -> list[Scored | BaseException]:
        """In a worker thread: scores items of one snapshot, bucket and state shape. One item's error is its own."""
        start = time.perf_counter()
        results: list[Any] = [None] * len(items)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        with jax.profiler.TraceAnnotation("aif.lookup"):
            for at, item in enumerate(items):
                try:
                    if item.deadline is not None and start > item.deadline:
                        raise DeadlineExceeded("scoring: the budget was spent before a scoring thread was free")
                    found[at] = item.snapshot.index.lookup(item.candidates.ids)
                except Exception as error:
                    results[at] = error
        if not found:
            return results
        looked_up = time.perf_counter()
        try:
            packed, logits, spans = self._compute([items[at] for at in found], [rows for rows, _ in found.values()], bucket)
        except Exception as error:
            return [error if result is None else result for result in results]
        for place, (at, (_, known)) in enumerate(found.items()):
            item = items[at]
            own = [("queue", item.submitted, start), ("lookup", start, looked_up), *spans]
            part = None if item.whole else self._programs.unpack(packed[place])
            whole = np.asarray(logits[place][: len(known)]) if item.whole else None
            results[at] = Scored(part, whole, known, own)
        return results

    def _compute(self, items: list[Item], rows: list[np.ndarray], bucket: int) -> tuple[Any, Any, Spans]:
        size = next(size for size in self._sizes if size >= len(items))
        spare = size - len(items)  # batches are filled up with their first request
        items, rows = items + items[:1] * spare, rows + rows[:1] * spare
        first = items[0]
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.upload"):
            orders, bids = [item.order for item in items], [item.candidates.bids for item in items]
            inputs = self._programs.upload_rows(rows, bids, orders, bucket)
        uploaded = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.score"):
            function = first.snapshot.score[first.user.shape, size, bucket]
            states = tuple(item.user.state for item in items)
            with first.snapshot.index.reading() as table:
                packed, logits = function(first.version.params, states, table, *inputs)
            packed.block_until_ready()
        scored = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.fetch"):
            best = None if all(item.whole for item in items) else self._programs.download(packed)
            whole = self._programs.download(logits) if any(item.whole for item in items) else None
        fetched = time.perf_counter()
        return best, whole, [("upload", start, uploaded), ("score", uploaded, scored), ("fetch", scored, fetched)]


def _hand_out(done: asyncio.Future[list[Any]], futures: list[asyncio.Future[Scored]]) -> None:
    error = asyncio.CancelledError() if done.cancelled() else done.exception()
    results = [error] * len(futures) if error is not None else done.result()
    for future, result in zip(futures, results, strict=True):
        if future.done():
            continue
        if isinstance(result, asyncio.CancelledError):
            future.cancel()
        elif isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
