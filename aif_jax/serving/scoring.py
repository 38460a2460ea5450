"""Scores batches of candidates in worker threads, alone or together with those of concurrent requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import DeadlineExceeded
from aif_jax.serving.programs import Part, Programs, has_repeats, without_repeats
from aif_jax.serving.requests import Candidates
from aif_jax.serving.threads import Workers, post
from aif_jax.serving.versions import Snapshot, UserSide, batch_sizes


class ScoringTask(NamedTuple):
    """One batch of candidates of one request; `future` gets its `Scored`, or what went wrong with this task alone."""

    snapshot: Snapshot
    user: UserSide
    candidates: Candidates
    bucket: int
    order: str
    whole: bool  # all logits come back, not the best k
    submitted: float  # by time.perf_counter
    deadline: float | None
    future: asyncio.Future[Any]

    @property
    def key(self) -> tuple[int, int, int]:
        """Tasks of one key run the same compiled function on the same table."""
        return id(self.snapshot), self.user.length, self.bucket


class Scored(NamedTuple):
    """What came of it, on the host."""

    ids: np.ndarray  # [C] of the candidates
    part: Part | None
    logits: np.ndarray | None  # float32 [C], where they were to come back
    rows: np.ndarray  # int32 [C] of the index, -1 where unknown
    spans: list[tuple[str, float, float]]


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
        self._waiting: deque[ScoringTask] = deque()
        self._lock = threading.Lock()
        self._repeats = False  # whether the latest candidates that were looked through had repeats

    def submit(self, task: ScoringTask) -> None:
        """Scores one batch of candidates."""
        with self._lock:
            self._waiting.append(task)
        self._workers.start(self._run_next)

    def close(self) -> None:
        """Ends the threads; waits for the run that each is in."""
        self._workers.close(wait=1.0)

    def _run_next(self) -> None:
        """In a worker thread: one batch of what waits, if another thread has not taken it."""
        tasks = self._take()
        if tasks:
            post(tasks[0].future.get_loop(), _hand_out, tasks, self._run(tasks))

    def _take(self) -> list[ScoringTask]:
        with self._lock:
            while self._waiting and self._waiting[0].future.done():  # cancelled
                self._waiting.popleft()
            if not self._waiting or self._config.batch_size == 1:
                return [self._waiting.popleft()] if self._waiting else []
            key = self._waiting[0].key
            batch = [task for task in self._waiting if task.key == key and not task.future.done()]
            # The largest compiled size that is at least three quarters full: the rest of it would be computed for nothing.
            size = next(size for size in reversed(self._sizes) if 4 * len(batch) >= 3 * size)
            taken = set(map(id, batch[:size]))
            self._waiting = deque(task for task in self._waiting if id(task) not in taken)
            return batch[:size]

    def _run(self, tasks: list[ScoringTask]) -> list[Any]:
        """Scores tasks of one key: `Scored`, or the error of one task alone."""
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.lookup"):
            outcomes: list[Any] = [_look_up(task, start) for task in tasks]
        looked_up = time.perf_counter()
        live = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        if not live:
            return outcomes
        some, rows = [tasks[place] for place in live], [outcomes[place] for place in live]
        try:
            parts, logits, spans = self._compute(some, rows, look_first=self._repeats)
        except Exception as error:
            return [outcome if isinstance(outcome, Exception) else error for outcome in outcomes]
        for slot, (place, task) in enumerate(zip(live, some, strict=True)):
            part, whole = (None, logits[slot][: len(rows[slot])]) if task.whole else (parts[slot], None)
            before = [("queue", task.submitted, start), ("lookup", start, looked_up)]
            outcomes[place] = Scored(task.candidates.ids, part, whole, rows[slot], [*before, *spans])
        return outcomes

    def _compute(self, tasks: list[ScoringTask], rows: list[np.ndarray], *, look_first: bool) -> tuple[list[Part], Any, list]:
        """Best candidates, all logits where a task wants them, and spans; looks for repeats first, or only among the best."""
        size = next(size for size in self._sizes if size >= len(tasks))
        spare = size - len(tasks)  # batches are filled up with their first request
        tasks, rows = tasks + tasks[:1] * spare, rows + rows[:1] * spare
        first, start = tasks[0], time.perf_counter()
        if look_first:
            distinct = list(map(_distinct, tasks, rows))
            self._repeats = any(a is not b for a, b in zip(distinct, rows, strict=True))
            rows = distinct
        with jax.profiler.TraceAnnotation("aif.upload"):
            orders, bids = [task.order for task in tasks], [task.candidates.bids for task in tasks]
            inputs = self._programs.upload_rows(rows, bids, orders, first.bucket)
        uploaded = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.score"):
            packed, logits = first.snapshot.run([task.user for task in tasks], first.bucket, inputs)
        packed.block_until_ready()
        scored = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.fetch"):
            best = [] if all(task.whole for task in tasks) else self._programs.download_best(packed)
            whole = self._programs.download(logits) if any(task.whole for task in tasks) else None
        fetched = time.perf_counter()
        if not look_first and any(map(_repeats, tasks, rows, best)):
            return self._compute(tasks, rows, look_first=True)
        return best, whole, [("upload", start, uploaded), ("score", uploaded, scored), ("fetch", scored, fetched)]


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
    return not task.whole and has_repeats(rows[best.positions[: np.count_nonzero(best.scores > -np.inf)]])


def _hand_out(tasks: list[ScoringTask], results: list[Any]) -> None:
    for task, result in zip(tasks, results, strict=True):
        if not task.future.done():
            task.future.set_result(result)
