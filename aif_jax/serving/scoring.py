"""Scores candidates in worker threads, alone or together with those of concurrent requests, and makes the answer of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.admission import PendingRequest
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.metrics import Metrics
from aif_jax.serving.programs import Programs, TopCandidates, best_of, has_repeats, without_repeats
from aif_jax.serving.requests import Candidates, DeadlineExceeded, NonFiniteScores, Ranking, Scores, kind_of
from aif_jax.serving.threads import Batcher, TimeLimitedCall
from aif_jax.serving.users import Computation, UserStates
from aif_jax.serving.versions import Snapshot, UserSide

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
    split: bool  # one of several batches of a request
    submitted: float  # by time.perf_counter
    deadline: float | None
    future: asyncio.Future[Any]

    @property
    def key(self) -> tuple[int, int, int, int | None]:
        """Tasks of one key run in one call of a compiled function. A batch of several runs alone: whether others wait must not
        decide which program scores it, since a tie with another batch of its request is a tie only in one program.
        """
        return id(self.snapshot), self.user.length, self.bucket, id(self.future) if self.split else None

    @property
    def shape(self) -> tuple[int, int, bool] | None:
        """What its time depends on; None while an update writes into the index, and where many ids are excluded."""
        many = self.exclude is not None and len(self.exclude) > self.bucket
        return None if many or self.snapshot.index.is_writing else (self.user.length, self.bucket, self.whole)


class Scored(NamedTuple):
    """What came of it, on the host."""

    ids: np.ndarray  # [C] of the candidates
    part: TopCandidates | None
    logits: np.ndarray | None  # float32 [C], where they were to come back
    rows: np.ndarray  # int32 [C] of the index, UNKNOWN or EXCLUDED where there is nothing to score
    spans: list[tuple[str, float, float]]


class Scorer:
    """Scores the candidates of requests, all at once or batch by batch, without blocking the event loop."""

    def __init__(self, programs: Programs, users: UserStates, config: ServingConfig, metrics: Metrics):
        self._programs, self._users, self._config, self._metrics = programs, users, config, metrics
        self._tasks = Batcher("aif-score", config.score_threads, config, programs, prepare=_look_up, run=self._run)
        self.close = self._tasks.close
        self._repeats = False  # whether the latest candidates that were looked through had repeats

    @property
    def seconds(self) -> float:
        """Time that one more request in the queue adds to its wait."""
        return self._tasks.seconds

    async def score(
        self, job: PendingRequest, user: UserSide | Computation, given: Any, reader: TimeLimitedCall, *, whole: bool
    ) -> list[Scored]:
        """Scores candidates, all logits where `whole`, else the best, with one user state and one index snapshot.

        `given` are candidates as `Candidates.of` takes them, or an async iterator of such, which `reader` reads.
        """
        tasks: list[ScoringTask] = []
        start = job.timeline.arrival
        try:
            if not hasattr(given, "__aiter__"):
                await self._submit(job, user, given, start, whole, tasks, split=False)
            else:
                async with contextlib.aclosing(reader.batches(given)) as stream:
                    async for batch in stream:
                        await self._submit(job, user, batch, start, whole, tasks, split=True)
                        start = time.perf_counter()
            job.waiting_for = "scoring"
            results = []
            for task in tasks:
                scored = await task.future
                if isinstance(scored, Exception):
                    raise scored
                results.append(scored)
        except BaseException:
            for task in tasks:
                task.future.cancel()
            if tasks:  # of those that were too late too, or the reserve would not grow
                self._metrics.observe_scoring(time.perf_counter() - job.submitted)
            raise
        if results:
            self._metrics.observe_scoring(time.perf_counter() - job.submitted)
        for scored in results:
            for span in scored.spans:
                job.timeline.add(*span)
        return results

    async def _submit(
        self, job: PendingRequest, user: UserSide | Computation, given: Any, start: float, whole: bool,
        tasks: list[ScoringTask], *, split: bool,
    ) -> None:  # fmt: skip
        """Hands one batch of candidates to the scorer, in pieces where it is larger than the largest bucket.

        The pieces and batches of a request are padded to one size, since programs of two sizes may differ in the last bit of
        equal candidates; only a batch that is larger than those before it takes a larger one.
        """
        job.candidates_there = time.perf_counter()
        if not whole:
            job.timeline.add("retrieval", start, job.candidates_there)
        batch, buckets = Candidates.of(given), self._config.buckets
        order = self._config.order if job.request.order is None else job.request.order
        job.version.snapshot.orders.expect(order, given=batch.bids is not None)
        if tasks and len(batch.ids) and batch.kind != (kind := tasks[0].candidates.kind):
            raise TypeError(f"candidates: expected {kind} as in the batches before, got {batch.kind}")
        exclude = job.request.exclude
        if exclude is not None and len(exclude) and len(batch.ids) and kind_of(exclude) != batch.kind:
            raise TypeError(f"Request.exclude: expected {batch.kind} as the candidates are, got {kind_of(exclude)}")
        if job.user is None or job.snapshot is None:
            job.user = await self._users.ready(job, user)
            job.snapshot = job.version.snapshot
        split |= len(batch.ids) > buckets[-1]
        bucket = bucket_for(len(batch.ids), buckets, least=tasks[-1].bucket if tasks else 0)
        for first in range(0, len(batch.ids), bucket):
            part = batch.part(slice(first, first + bucket))
            future, job.submitted = asyncio.get_running_loop().create_future(), time.perf_counter()
            times = job.submitted, job.deadline
            task = ScoringTask(job.snapshot, job.user, part, exclude, bucket, order, whole, split, *times, future)
            self._tasks.submit(task)
            tasks.append(task)

    def _run(self, tasks: list[ScoringTask], rows: list[np.ndarray], started: float) -> list[Scored]:
        """Scores tasks of one key, whose rows were looked up."""
        looked_up = time.perf_counter()
        priced = any(task.candidates.bids is not None for task in tasks)  # a repeat's score may differ
        parts, logits, spans = self._compute(tasks, rows, look_first=self._repeats or priced)
        scored = []
        for slot, task in enumerate(tasks):
            part, whole = (None, logits[slot][: len(rows[slot])]) if task.whole else (parts[slot], None)
            before = [("queue", task.submitted, started), ("lookup", started, looked_up)]
            scored.append(Scored(task.candidates.ids, part, whole, rows[slot], [*before, *spans]))
        return scored

    def _compute(
        self, tasks: list[ScoringTask], rows: list[np.ndarray], *, look_first: bool
    ) -> tuple[list[TopCandidates], Any, list]:
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


def _repeats(task: ScoringTask, rows: np.ndarray, best: TopCandidates) -> bool:
    return not task.whole and has_repeats(rows[best.positions[: np.count_nonzero(best.scores > -np.inf)]])


def bucket_for(count: int, buckets: Sequence[int], *, least: int = 0) -> int:
    """The size that so many candidates are padded to, at least `least`; above the largest, that of their pieces.

    Pieces are all of one size: a quarter of the largest bucket or more, the one that pads least.

    Example:
      >>> bucket_for(100, (64, 256, 1024)), bucket_for(1030, (64, 256, 1024)), bucket_for(2000, (64, 256, 1024))
      (256, 256, 1024)
    """
    fits = next((size for size in buckets if size >= count), None)
    if fits is None:
        large = [size for size in reversed(buckets) if 4 * size >= buckets[-1]]
        fits = min(large, key=lambda size: -(-count // size) * size)
    return max(fits, least)


def ranking(job: PendingRequest, results: list[Scored], k: int) -> Ranking:
    """The best k of everything that was scored for a request; NonFiniteScores where no known candidate has a finite one."""
    outputs = max(1, len(job.version.meaning.objectives))
    rows = [scored.rows for scored in results]
    best = best_of([scored.part for scored in results if scored.part], rows, k, outputs=outputs)
    mask = best.scores > -np.inf
    _expect_some_finite(job, best.non_finite, mask, rows)
    none = np.zeros(0, np.str_ if job.version.snapshot.index.kind == "strings" else np.int64)
    ids = results[0].ids if len(results) == 1 else np.concatenate([s.ids for s in results] or [none])
    if mask.all():
        chosen, logits = ids[best.positions], best.logits
    else:
        chosen = np.full(k, -1 if ids.dtype.kind == "i" else "", ids.dtype)
        chosen[mask] = ids[best.positions[mask]]
        logits = np.where(mask if outputs == 1 else mask[:, None], best.logits, np.float32(-np.inf))
    return Ranking(
        ids=chosen, scores=best.scores, logits=logits, mask=mask, candidates=len(ids), unknown=job.unknown,
        excluded=job.excluded, _meaning=job.version.meaning, **job.finish(),
    )  # fmt: skip


def scores(job: PendingRequest, results: list[Scored]) -> Scores:
    """Every logit of a request, in order; NonFiniteScores where no known candidate has a finite one."""
    outputs = max(1, len(job.version.meaning.objectives))
    none = np.zeros(0 if outputs == 1 else (0, outputs), np.float32)
    logits = np.concatenate([scored.logits for scored in results if scored.logits is not None] or [none])
    rows = [scored.rows for scored in results]
    known = np.concatenate(rows or [np.zeros(0, np.int32)]) >= 0
    mask = known & ((logits if outputs == 1 else logits[:, 0]) > -np.inf)
    _expect_some_finite(job, int(np.count_nonzero(known & ~mask)), mask, rows)
    return Scores(logits=logits, mask=mask, _meaning=job.version.meaning, **job.finish())


def _expect_some_finite(job: PendingRequest, non_finite: int, mask: np.ndarray, rows: list[np.ndarray]) -> None:
    job.non_finite, job.candidates = non_finite, sum(map(len, rows))
    some = [each for each in rows if len(each) and each.min() < 0]
    job.unknown, job.excluded = (sum(int(np.count_nonzero(each == mark)) for each in some) for mark in (UNKNOWN, EXCLUDED))
    if non_finite and not mask.any():
        message = f"scores: expected finite ones, got NaN or infinity for all {non_finite} known candidates"
        raise NonFiniteScores(message, non_finite=non_finite, unknown=job.unknown, excluded=job.excluded)
