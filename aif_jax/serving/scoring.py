"""Scores one batch of candidates in a worker thread, and makes the answer of what came of all batches of a request."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.metrics import Known
from aif_jax.serving.programs import LOGIT, ROWS_OWN, Orders
from aif_jax.serving.requests import Candidates, DeadlineExceeded

UNKNOWN, EXCLUDED = -1, -2
"""Rows of candidates that the index does not hold, and of those that the request excludes: below 0 nothing is scored."""


class UserSide(NamedTuple):
    """A user state on the device."""

    state: Any
    length: int  # places of the history that it was made from
    since: float | None  # fetch of its features, by time.perf_counter; None for the unknown user
    known: Known = Known()  # how much of them the model knows


class TopCandidates(NamedTuple):
    """The best of one batch of candidates, on the host."""

    scores: np.ndarray  # float32 [min(max_k, bucket)], best first, -inf behind the last
    logits: np.ndarray  # float32 [min(max_k, bucket)], or [.., T]
    positions: np.ndarray  # int32 [min(max_k, bucket)]
    non_finite: int  # known candidates of the whole batch without a finite score


class Snapshot(NamedTuple):
    """An index snapshot, and the functions compiled for its capacity."""

    index: Any
    orders: Orders
    programs: dict[tuple[int, int], Callable[..., Any]]  # by length of history and bucket
    no_bids: dict[int, jax.Array]  # float32 [bucket] of `ROWS_OWN`, on the device, as most requests bring none
    branches: dict[str, jax.Array]  # int32 [] of each order, on the device
    outputs: int  # T
    transfers: Counter[str]

    def inputs(self, rows: np.ndarray, bids: np.ndarray | None, order: str, bucket: int) -> tuple[Any, Any, Any]:
        """Rows [bucket], bids [bucket] and order [] of a scoring program; arrays on the host go up with its call."""
        rows = pad(rows.astype(np.int32, copy=False), bucket, UNKNOWN)
        self.count_up(rows)
        if bids is None or order == LOGIT:
            return rows, self.no_bids[bucket], self.branches[order]
        bids = pad(bids, bucket, ROWS_OWN)
        self.count_up(bids)
        return rows, bids, self.branches[order]

    def run(self, user: UserSide, bucket: int, inputs: tuple[Any, Any, Any]) -> tuple[jax.Array, jax.Array]:
        """The packed best and all logits, not ready yet."""
        program = self.programs[user.length, bucket]
        with jax.transfer_guard_host_to_device("allow"), self.index.reading() as table:  # the inputs are meant to go up
            return program(user.state, table, *inputs)

    def download(self, value: jax.Array) -> np.ndarray:
        """An array on the host."""
        self.transfers["device_to_host"] += 1
        self.transfers["device_to_host_bytes"] += value.nbytes
        with jax.transfer_guard_device_to_host("allow"):  # meant, and sooner there than by `device_get`
            return np.asarray(value)

    def best(self, packed: jax.Array) -> TopCandidates:
        """Scores, logits, positions and count from the int32 [(2 + T) k + 1] that a program packs them into."""
        values = self.download(packed)
        k = (len(values) - 1) // (2 + self.outputs)
        scores, logits, positions = values[:k], values[k : -1 - k], values[-1 - k : -1]
        shaped = logits.view(np.float32) if self.outputs == 1 else logits.view(np.float32).reshape(k, self.outputs)
        return TopCandidates(scores.view(np.float32), shaped, positions, int(values[-1]))

    def count_up(self, array: np.ndarray) -> None:
        """Counts an array that goes up to the device with a call."""
        self.transfers["host_to_device"] += 1
        self.transfers["host_to_device_bytes"] += array.nbytes


class ScoringTask(NamedTuple):
    """One batch of candidates of one request."""

    snapshot: Snapshot
    user: UserSide
    candidates: Candidates
    exclude: np.ndarray | None  # [E] ids of the candidates' kind that must not be scored
    bucket: int
    order: str
    whole: bool  # all logits come back, not the best
    submitted: float  # by time.perf_counter
    deadline: float | None


class Scored(NamedTuple):
    """What came of it, on the host."""

    ids: np.ndarray  # [C] of the candidates
    rows: np.ndarray  # int32 [C] of the index, UNKNOWN or EXCLUDED where there is nothing to score
    unknown: int  # candidates that the index does not hold
    excluded: int  # candidates that the request excludes
    best: TopCandidates | None
    logits: np.ndarray | None  # float32 [C] or [C, T], where they were to come back
    spans: list[tuple[str, float, float]]
    seconds: float  # of the thread


def score(task: ScoringTask) -> Scored:
    """Looks a task's candidates up, and scores them; to be called in a thread, since it waits for the device.

    Raises DeadlineExceeded where the budget is spent already, TypeError for ids of another kind than the index has.
    """
    started = time.perf_counter()
    if task.deadline is not None and started > task.deadline:
        raise DeadlineExceeded("scoring: the budget was spent before a scoring thread was free")
    snapshot, (ids, bids) = task.snapshot, (task.candidates.ids, task.candidates.bids)
    with jax.profiler.TraceAnnotation("aif.lookup"):
        rows = snapshot.index.lookup(ids)[0]
        if task.exclude is not None and len(task.exclude):
            excluded = snapshot.index.lookup(task.exclude)[0]
            rows = np.where(np.isin(rows, excluded[excluded >= 0]), np.int32(EXCLUDED), rows)
        ordered = np.sort(rows)
        below = ordered[: np.searchsorted(ordered, 0)]
        distinct = without_repeats(rows, bids) if not task.whole and has_repeats(ordered[len(below) :]) else rows
    looked_up = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.upload"):
        inputs = snapshot.inputs(distinct, bids, task.order, task.bucket)
    uploaded = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.score"):
        packed, logits = snapshot.run(task.user, task.bucket, inputs)
        packed.block_until_ready()
    scored = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.fetch"):
        best, whole = None, None
        if task.whole:
            whole = snapshot.download(logits)[: len(ids)]
        else:
            best = snapshot.best(packed)
    fetched = time.perf_counter()
    spans = [
        ("queue", task.submitted, started), ("lookup", started, looked_up), ("upload", looked_up, uploaded),
        ("score", uploaded, scored), ("fetch", scored, fetched),
    ]  # fmt: skip
    excluded = int(np.count_nonzero(below == EXCLUDED)) if len(below) else 0
    return Scored(ids, rows, len(below) - excluded, excluded, best, whole, spans, fetched - started)


def bucket_for(count: int, buckets: Sequence[int], *, least: int = 0) -> int:
    """The size that so many candidates are padded to, at least `least`; above the largest, that of their pieces.

    Pieces are all of one size: a quarter of the largest bucket or more, the one that pads least.

    Example:
      >>> bucket_for(100, (64, 256, 1024)), bucket_for(1030, (64, 256, 1024)), bucket_for(2000, (64, 256, 1024))
      (256, 256, 1024)
    """
    if count <= buckets[-1]:
        return max(buckets[bisect.bisect_left(buckets, count)], least)
    large = [size for size in reversed(buckets) if 4 * size >= buckets[-1]]
    return max(min(large, key=lambda size: -(-count // size) * size), least)


def pad(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """A new array [size, ...] that starts with `values` [n, ...] and ends with `fill`; a device may be given its memory."""
    padded = np.full((size, *values.shape[1:]), fill, values.dtype)
    padded[: len(values)] = values
    return padded


def has_repeats(ordered: np.ndarray) -> bool:
    """Whether some row comes twice; rows [n] ascend."""
    return bool((ordered[1:] == ordered[:-1]).any())


def without_repeats(rows: np.ndarray, bids: np.ndarray | None) -> np.ndarray:
    """Rows int32 [C] of candidates with -1 for those that repeat another: the first of the highest bid is left."""
    keys = (np.arange(len(rows)), rows) if bids is None else (np.arange(len(rows)), -bids, rows)
    order = np.lexsort(keys)
    once = np.full_like(rows, UNKNOWN)
    first = order[np.flatnonzero(np.diff(rows[order], prepend=-2))]
    once[first] = rows[first]
    return once


def best_of(parts: list[TopCandidates], rows: list[np.ndarray], k: int, *, outputs: int = 1) -> TopCandidates:
    """The best k of several batches of candidates; positions count from the first batch's first candidate.

    Args:
      parts: parts of each batch; none has an item twice.
      rows: int32 [n] index rows of each batch's candidates: an item of several batches comes once, with its best score.
      k: how many to keep; missing ones have score -inf and position 0.
      outputs: T, logits of a candidate.
    """
    if len(parts) == 1:
        scores, logits, positions = (field[:k] for field in parts[0][:3])
    else:
        offsets = np.cumsum([0, *map(len, rows)])[: len(rows)]
        scores = np.concatenate([part.scores for part in parts] or [np.zeros(0, np.float32)])
        none = np.zeros(0 if outputs == 1 else (0, outputs), np.float32)
        logits = np.concatenate([part.logits for part in parts] or [none])
        shifted = [part.positions + offset for part, offset in zip(parts, offsets, strict=True)]
        positions = np.concatenate(shifted or [np.zeros(0, np.int32)])
        best = np.argsort(-scores, kind="stable")
        best = best[scores[best] > -np.inf]
        _, first = np.unique(np.concatenate(rows)[positions[best]] if rows else best, return_index=True)
        best = best[np.sort(first)][:k]
        scores, logits, positions = scores[best], logits[best], positions[best]
    if len(scores) < k:
        scores, logits, positions = pad(scores, k, -np.inf), pad(logits, k, -np.inf), pad(positions, k, 0)
    return TopCandidates(scores, logits, positions, sum(part.non_finite for part in parts))
