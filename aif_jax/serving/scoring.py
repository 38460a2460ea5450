"""Scores batches of candidates in worker threads, alone or together with those of concurrent requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.buckets import bucket_for
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import DeadlineExceeded
from aif_jax.serving.programs import Part, Programs, has_repeats, without_repeats
from aif_jax.serving.requests import Candidates
from aif_jax.serving.threads import Workers, post
from aif_jax.serving.versions import Snapshot, UserSide, Version, batch_sizes

Spans = list[tuple[str, float, float]]


class ScoringTask(NamedTuple):
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
    logits: np.ndarray | None  # float32 [C], where they were to come back
    rows: np.ndarray  # int32 [C] of the index, -1 where unknown
    spans: Spans


class _Waiting(NamedTuple):
    key: tuple[int, int, int]  # tasks of one key run the same compiled function on the same table
    bucket: int
    task: ScoringTask
    future: asyncio.Future[Scored | Exception]


class Scorer:
    """Turns tasks into scores without blocking the event loop.

    A thread that becomes free takes the task that has waited longest and, up to `batch_size`, those that can share its run. So
    batches form only where tasks have to wait.
    """

    def __init__(self, programs: Programs, config: ServingConfig):
        self._programs = programs
        self._config = config
        self._sizes = batch_sizes(config.batch_size)
        self._workers = Workers("aif-score", config.score_threads)
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._repeats = False  # whether the latest candidates that were looked through had repeats

    def submit(self, task: ScoringTask) -> asyncio.Future[Scored | Exception]:
        """Scores one batch of candidates; the future holds the scores, or what went wrong with this task alone."""
        future: asyncio.Future[Scored | Exception] = asyncio.get_running_loop().create_future()
        bucket = bucket_for(max(len(task.candidates.ids), 1), self._config.buckets)
        with self._lock:
            self._waiting.append(_Waiting((id(task.snapshot), task.user.length, bucket), bucket, task, future))
        self._workers.start(self._run_next)
        return future

    def close(self) -> None:
        """Ends the threads; waits for the run that each is in."""
        self._workers.close(wait=1.0)

    def _run_next(self) -> None:
        """In a worker thread: one batch of what waits, if another thread has not taken it."""
        batch = self._take()
        if batch:
            results = self._run([waiting.task for waiting in batch], batch[0].bucket)
            post(batch[0].future.get_loop(), _hand_out, [waiting.future for waiting in batch], results)

    def _take(self) -> list[_Waiting]:
        with self._lock:
            while self._waiting and self._waiting[0].future.done():  # cancelled
                self._waiting.popleft()
            if not self._waiting or self._config.batch_size == 1:
                return [self._waiting.popleft()] if self._waiting else []
            key = self._waiting[0].key
            batch = [waiting for waiting in self._waiting if waiting.key == key and not waiting.future.done()]
            # The largest compiled size that is at least three quarters full: the rest of it would be computed for nothing.
            size = next(size for size in reversed(self._sizes) if 4 * len(batch) >= 3 * size)
            taken = set(map(id, batch[:size]))
            self._waiting = deque(waiting for waiting in self._waiting if id(waiting) not in taken)
            return batch[:size]

    def _run(self, tasks: list[ScoringTask], bucket: int) -> list[Any]:
        """Scores tasks of one snapshot, bucket and history length: `Scored`, or the error of one task alone."""
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.lookup"):
            outcomes: list[Any] = [_look_up(task, start) for task in tasks]
        looked_up = time.perf_counter()
        live = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        if not live:
            return outcomes
        some, rows = [tasks[place] for place in live], [outcomes[place] for place in live]
        try:
            parts, logits, spans = self._compute(some, rows, bucket, look_first=self._repeats)
        except Exception as error:
            return [outcome if isinstance(outcome, Exception) else error for outcome in outcomes]
        for slot, place in enumerate(live):
            task, count = some[slot], len(rows[slot])
            part, whole = (None, logits[slot][:count]) if task.whole else (parts[slot], None)
            before = [("queue", task.submitted, start), ("lookup", start, looked_up)]
            outcomes[place] = Scored(part, whole, rows[slot], [*before, *spans])
        return outcomes

    def _compute(
        self, tasks: list[ScoringTask], rows: list[np.ndarray], bucket: int, *, look_first: bool
    ) -> tuple[list[Part], Any, Spans]:
        """Best candidates, all logits where a task wants them, and spans; looks for repeats first, or only among the best."""
        size = next(size for size in self._sizes if size >= len(tasks))
        spare = size - len(tasks)  # batches are filled up with their first request
        tasks, rows = tasks + tasks[:1] * spare, rows + rows[:1] * spare
        start = time.perf_counter()
        if look_first:
            distinct = list(map(_distinct, tasks, rows))
            self._repeats = any(a is not b for a, b in zip(distinct, rows, strict=True))
            rows = distinct
        packed, logits, uploaded = self._dispatch(tasks, rows, bucket)
        packed.block_until_ready()
        scored = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.fetch"):
            best = [] if all(task.whole for task in tasks) else self._programs.download_best(packed)
            whole = self._programs.download(logits) if any(task.whole for task in tasks) else None
        fetched = time.perf_counter()
        if not look_first and any(map(_repeats, tasks, rows, best)):
            return self._compute(tasks, rows, bucket, look_first=True)
        return best, whole, [("upload", start, uploaded), ("score", uploaded, scored), ("fetch", scored, fetched)]

    def _dispatch(self, tasks: list[ScoringTask], rows: list[np.ndarray], bucket: int) -> tuple[jax.Array, jax.Array, float]:
        """Packed answers and logits, not ready yet, and when their inputs were uploaded."""
        first = tasks[0]
        with jax.profiler.TraceAnnotation("aif.upload"):
            orders, bids = [task.order for task in tasks], [task.candidates.bids for task in tasks]
            inputs = self._programs.upload_rows(rows, bids, orders, bucket)
        uploaded = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.score"):
            function = first.snapshot.score[first.user.length, len(tasks), bucket]
            states = tuple(task.user.state for task in tasks)
            with first.snapshot.index.reading() as table:
                packed, logits = function(first.version.params, states, table, *inputs)
        return packed, logits, uploaded


def _look_up(task: ScoringTask, now: float) -> np.ndarray | Exception:
    """int32 [C] rows of a task's candidates, -1 where unknown."""
    if task.deadline is not None and now > task.deadline:
        return DeadlineExceeded("scoring: the budget was spent before a scoring thread was free")
    try:
        return task.snapshot.index.lookup(task.candidates.ids)[0]
    except Exception as error:
        return error


def _distinct(task: ScoringTask, rows: np.ndarray) -> np.ndarray:
    """The rows of a task, for a ranking without repeats; the same array where there are none."""
    return without_repeats(rows, task.candidates.bids) if not task.whole and has_repeats(rows) else rows


def _repeats(task: ScoringTask, rows: np.ndarray, best: Part) -> bool:
    if task.whole:
        return False
    chosen = np.sort(rows[best.positions[: np.count_nonzero(best.scores > -np.inf)]])
    return bool((chosen[1:] == chosen[:-1]).any())


def _hand_out(futures: list[asyncio.Future[Scored | Exception]], results: list[Scored | Exception]) -> None:
    for future, result in zip(futures, results, strict=True):
        if not future.done():
            future.set_result(result)
