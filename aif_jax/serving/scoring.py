"""Scores batches of candidates in worker threads, alone or together with those of concurrent requests."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import DeadlineExceeded
from aif_jax.serving.programs import Form, Part, Programs, has_repeats, without_repeats
from aif_jax.serving.requests import Candidates
from aif_jax.serving.together import Together
from aif_jax.serving.versions import Snapshot, UserSide, batch_sizes

UNKNOWN, EXCLUDED = -1, -2
"""Rows of candidates that the index does not hold, and of those that the request excludes: below 0 nothing is scored."""


class ScoringTask(NamedTuple):
    """One batch of candidates of one request; `future` gets its `Scored`, or what went wrong with this task alone."""

    snapshot: Snapshot
    user: UserSide
    candidates: Candidates
    exclude: np.ndarray | None  # [E] ids of the candidates' kind that must not be scored
    bucket: int
    order: str
    whole: bool  # all logits come back, not the best k
    split: bool  # one of several batches of a request: where the cut is diverse, all its candidates come back
    submitted: float  # by time.perf_counter
    deadline: float | None
    future: asyncio.Future[Any]

    @property
    def key(self) -> tuple[int, Form, int, int | None]:
        """Tasks of one key run in one call of a compiled function. A batch of several runs alone: whether others wait must not
        decide which program scores it, since a tie with another batch of its request is a tie only in one program.
        """
        return id(self.snapshot), self.user.form, self.bucket, id(self.future) if self.split else None


class Scored(NamedTuple):
    """What came of it, on the host."""

    ids: np.ndarray  # [C] of the candidates
    part: Part | None
    logits: np.ndarray | None  # float32 [C], where they were to come back
    rows: np.ndarray  # int32 [C] of the index, UNKNOWN or EXCLUDED where there is nothing to score
    spans: list[tuple[str, float, float]]


class Scorer:
    """Turns tasks into scores without blocking the event loop."""

    def __init__(self, programs: Programs, config: ServingConfig):
        self._programs = programs
        sizes = batch_sizes(config.batch_size)
        self._tasks = Together("aif-score", config.score_threads, sizes, full=programs.full, prepare=_look_up, run=self._run)
        self.submit = self._tasks.submit
        self.close = self._tasks.close
        self._repeats = False  # whether the latest candidates that were looked through had repeats

    @property
    def seconds(self) -> float:
        """Time that one more request in the queue adds to its wait."""
        return self._tasks.seconds

    def _run(self, tasks: list[ScoringTask], rows: list[np.ndarray], started: float) -> list[Scored]:
        """Scores tasks of one key, whose rows were looked up."""
        looked_up = time.perf_counter()
        parts, logits, spans = self._compute(tasks, rows, look_first=self._repeats)
        scored = []
        for slot, task in enumerate(tasks):
            part, whole = (None, logits[slot][: len(rows[slot])]) if task.whole else (parts[slot], None)
            before = [("queue", task.submitted, started), ("lookup", started, looked_up)]
            scored.append(Scored(task.candidates.ids, part, whole, rows[slot], [*before, *spans]))
        return scored

    def _compute(self, tasks: list[ScoringTask], rows: list[np.ndarray], *, look_first: bool) -> tuple[list[Part], Any, list]:
        """Best candidates, all logits where a task wants them, and spans; looks for repeats first, or only among the best."""
        spare = self._tasks.size_for(len(tasks)) - len(tasks)  # batches are filled up with their first request
        tasks, rows = tasks + tasks[:1] * spare, rows + rows[:1] * spare
        first, start = tasks[0], time.perf_counter()
        if look_first:
            distinct = list(map(_distinct, tasks, rows))
            self._repeats = any(a is not b for a, b in zip(distinct, rows, strict=True))
            rows = distinct
        with jax.profiler.TraceAnnotation("aif.upload"):
            orders, bids = [task.order for task in tasks], [task.candidates.bids for task in tasks]
            inputs = self._programs.upload_rows(rows, bids, orders, first.bucket, first.snapshot.orders)
        uploaded = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.score"):
            packed, logits = first.snapshot.run([task.user for task in tasks], first.bucket, inputs)
        packed.block_until_ready()
        scored = time.perf_counter()
        with jax.profiler.TraceAnnotation("aif.fetch"):
            best = [] if all(task.whole for task in tasks) else self._programs.download_best(packed)
            if first.snapshot.orders.group is not None:
                if any(task.split and not task.whole for task in tasks):
                    every = self._programs.download_whole(logits, best)
                    best = [every[slot] if task.split else best[slot] for slot, task in enumerate(tasks)]
                logits, _ = logits
            whole = self._programs.download(logits) if any(task.whole for task in tasks) else None
        fetched = time.perf_counter()
        if not look_first and any(map(_repeats, tasks, rows, best)):
            return self._compute(tasks, rows, look_first=True)
        return best, whole, [("upload", start, uploaded), ("score", uploaded, scored), ("fetch", scored, fetched)]


def _look_up(task: ScoringTask) -> np.ndarray:
    """int32 [C] rows of a task's candidates, UNKNOWN or EXCLUDED where they are not to be scored."""
    if task.deadline is not None and time.perf_counter() > task.deadline:
        raise DeadlineExceeded("scoring: the budget was spent before a scoring thread was free")
    with jax.profiler.TraceAnnotation("aif.lookup"):
        rows = task.snapshot.index.lookup(task.candidates.ids)[0]
        if task.exclude is not None and len(task.exclude):
            excluded = task.snapshot.index.lookup(task.exclude)[0]
            rows = np.where(np.isin(rows, excluded[excluded >= 0]), np.int32(EXCLUDED), rows)
        return rows


def _distinct(task: ScoringTask, rows: np.ndarray) -> np.ndarray:
    """The rows of a task, for a ranking without repeats; the same array where there are none."""
    return without_repeats(rows, task.candidates.bids) if not task.whole and has_repeats(rows) else rows


def _repeats(task: ScoringTask, rows: np.ndarray, best: Part) -> bool:
    return not task.whole and has_repeats(rows[best.positions[: np.count_nonzero(best.scores > -np.inf)]])
