"""Candidates of one request, scored as they come, and the answer made of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from aif_jax.serving.admission import Job
from aif_jax.serving.callables import Guarded
from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import NonFiniteScores
from aif_jax.serving.metrics import Metrics
from aif_jax.serving.programs import best_of
from aif_jax.serving.requests import Candidates, Ranking, Scores, kind_of
from aif_jax.serving.scoring import EXCLUDED, UNKNOWN, Scored, Scorer, ScoringTask
from aif_jax.serving.single_flight import Computation
from aif_jax.serving.users import UserSides
from aif_jax.serving.versions import UserSide


class CandidateScoring:
    """Scores the candidates of requests, all at once or batch by batch."""

    def __init__(self, users: UserSides, scorer: Scorer, config: ServingConfig, metrics: Metrics):
        self._users = users
        self._scorer = scorer
        self._config = config
        self._metrics = metrics

    async def score(self, job: Job, user: UserSide | Computation, given: Any, reader: Guarded, *, whole: bool) -> list[Scored]:
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
            raise
        if results:
            self._metrics.observe_scoring(time.perf_counter() - job.submitted)
        for scored in results:
            for span in scored.spans:
                job.timeline.add(*span)
        return results

    async def _submit(
        self,
        job: Job,
        user: UserSide | Computation,
        given: Any,
        start: float,
        whole: bool,
        tasks: list[ScoringTask],
        *,
        split: bool,
    ) -> None:
        """Hands one batch of candidates to the scorer, in pieces where it is larger than the largest bucket.

        The pieces and batches of a request are padded to one size, since programs of two sizes may differ in the last bit of
        equal candidates; only a batch that is larger than those before it takes a larger one.
        """
        job.candidates_there = time.perf_counter()
        if not whole:
            job.timeline.add("retrieval", start, job.candidates_there)
        batch, buckets, order = Candidates.of(given), self._config.buckets, job.request.order or self._config.order
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
            self._scorer.submit(task)
            tasks.append(task)


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


def ranking(job: Job, results: list[Scored], k: int, most: int | None) -> Ranking:
    """The best k of everything that was scored for a request; NonFiniteScores where no known candidate has a finite one."""
    outputs = max(1, len(job.version.meaning.objectives))
    rows = [scored.rows for scored in results]
    best = best_of([scored.part for scored in results if scored.part], rows, k, outputs=outputs, most=most)
    mask = best.scores > -np.inf
    _expect_some_finite(job, best.non_finite, mask, rows)
    ids = results[0].ids if len(results) == 1 else np.concatenate([s.ids for s in results] or [np.zeros(0, np.int64)])
    chosen = np.full(k, -1 if ids.dtype.kind == "i" else "", ids.dtype)
    chosen[mask] = ids[best.positions[mask]]
    return Ranking(
        ids=chosen,
        scores=best.scores,
        logits=np.where(mask if outputs == 1 else mask[:, None], best.logits, np.float32(-np.inf)),
        mask=mask,
        candidates=len(ids),
        unknown=job.unknown,
        excluded=job.excluded,
        _meaning=job.version.meaning,
        **job.finish(),
    )


def scores(job: Job, results: list[Scored]) -> Scores:
    """Every logit of a request, in order; NonFiniteScores where no known candidate has a finite one."""
    outputs = max(1, len(job.version.meaning.objectives))
    none = np.zeros(0 if outputs == 1 else (0, outputs), np.float32)
    logits = np.concatenate([scored.logits for scored in results if scored.logits is not None] or [none])
    rows = [scored.rows for scored in results]
    known = np.concatenate(rows or [np.zeros(0, np.int32)]) >= 0
    mask = known & ((logits if outputs == 1 else logits[:, 0]) > -np.inf)
    _expect_some_finite(job, int(np.count_nonzero(known & ~mask)), mask, rows)
    return Scores(logits=logits, mask=mask, _meaning=job.version.meaning, **job.finish())


def _expect_some_finite(job: Job, non_finite: int, mask: np.ndarray, rows: list[np.ndarray]) -> None:
    job.non_finite, job.candidates = non_finite, sum(map(len, rows))
    job.unknown, job.excluded = (sum(int(np.count_nonzero(each == mark)) for each in rows) for mark in (UNKNOWN, EXCLUDED))
    if non_finite and not mask.any():
        message = f"scores: expected finite ones, got NaN or infinity for all {non_finite} known candidates"
        raise NonFiniteScores(message, non_finite=non_finite, unknown=job.unknown, excluded=job.excluded)
