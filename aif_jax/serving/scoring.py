"""What an engine computes in threads, where tasks that wait for one are batched; candidates are looked up, then scored."""

import asyncio
import bisect
import contextlib
import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.serving.metrics import UnknownCounts
from aif_jax.serving.programs import LOGIT, ROWS_OWN, Orders
from aif_jax.serving.requests import Candidates, DeadlineExceeded, Span

UNKNOWN, EXCLUDED = -1, -2
"""Rows of candidates that the index does not hold, and of those that the request excludes: below 0 nothing is scored."""

RECENT = 0.1
"""Weight of the latest call in running means."""


@dataclasses.dataclass(eq=False, slots=True)
class WaitingTask:
    """A task that waits for a thread; those of one key can be computed together."""

    key: Hashable
    task: Any
    future: asyncio.Future[Any]
    prepared: Any = None
    outcome: Any = None  # result or exception


class Batches:
    """Computes tasks in threads; when a thread is free, it takes the task that has waited longest and those of its key.

    So batches form only where all threads are busy, and a lone task never waits for others.

    Args:
      sizes: numbers of tasks that one call can have, ascending from 1.
      full: the least share of a size that must be tasks; copies of the first one fill it up.
      prepare: the work of one task on the host. What it raises is the outcome of that task alone.
      run: `run(tasks, prepared)` -> a result for each, of one of the sizes.

    Attributes:
      seconds: mean seconds of a thread that a task takes, over the number of threads: how fast a queue gets shorter.
    """

    def __init__(
        self, name: str, threads: int, sizes: Sequence[int], full: float,
        prepare: Callable[[Any], Any], run: Callable[[list[Any], list[Any]], Sequence[Any]],
    ):  # fmt: skip
        self.seconds = 0.0
        self._name, self._most, self._sizes, self._full = name, threads, sizes, full
        self._prepare, self._run = prepare, run
        self._threads: list[threading.Thread] = []
        self._calls = SimpleQueue[bool]()  # True lets a thread work, False ends it
        self._lock = threading.Lock()  # of the two below
        self._waiting: list[WaitingTask] = []
        self._working = 0  # threads
        self._done = deque[tuple[list[WaitingTask], float]]()  # computed, with seconds a task
        self._handing_out = False  # the loop will see what is done

    def submit(self, key: Hashable, task: Any) -> asyncio.Future[Any]:
        """Return the result of a task, or what went wrong with it; cancel the future to give the task up."""
        waiting = WaitingTask(key, task, asyncio.get_running_loop().create_future())
        with self._lock:
            self._waiting.append(waiting)
            free = self._working < self._most
            self._working += free
        if free:
            self._call_thread()
        return waiting.future

    def close(self) -> None:
        """End the threads, each after the call that it is in."""
        for _ in self._threads:
            self._calls.put(False)
        for thread in self._threads:
            thread.join()

    def _call_thread(self) -> None:
        """Let one more thread work, a new one where all work."""
        if len(self._threads) < self._working:
            name = f"{self._name}_{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()
        self._calls.put(True)

    def _work(self) -> None:
        """Compute, in a thread, whenever it is called, until nothing waits; it is free before its last answer leaves."""
        while self._calls.get():
            batch = self._take()
            while batch:
                began = time.perf_counter()
                self._compute(batch)
                self._done.append((batch, (time.perf_counter() - began) / len(batch)))
                loop, batch = batch[0].future.get_loop(), self._take()
                if not self._handing_out:
                    self._handing_out = True
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(self._hand_out)

    def _take(self) -> list[WaitingTask]:
        with self._lock:
            waiting = [each for each in self._waiting if not each.future.done()]  # without those that were given up
            batch = [each for each in waiting if each.key == waiting[0].key]
            batch = batch[: self._size_for(len(batch))]
            self._waiting = [each for each in waiting if each not in batch]
            self._working -= not batch
            return batch

    def _size_for(self, count: int) -> int:
        """Return the largest size that so many tasks fill."""
        return next((size for size in reversed(self._sizes) if count >= self._full * size), 0)

    def _compute(self, batch: list[WaitingTask]) -> None:
        """Set the outcomes of tasks of one key."""
        ready = list[WaitingTask]()
        for each in batch:
            try:
                each.prepared = self._prepare(each.task)
                ready.append(each)
            except Exception as error:
                each.outcome = error
        while ready:
            size = self._size_for(len(ready))
            part, ready = ready[:size], ready[size:]
            full = part + part[:1] * (size - len(part))
            try:
                outcomes = self._run([each.task for each in full], [each.prepared for each in full])
            except Exception as error:
                outcomes = [error] * size
            for each, outcome in zip(part, outcomes, strict=False):
                each.outcome = outcome

    def _hand_out(self) -> None:
        """Give, on the loop, every task that is done its outcome."""
        self._handing_out = False
        while self._done:
            batch, seconds = self._done.popleft()
            self.seconds += RECENT * (seconds / self._most - self.seconds)
            for waiting in batch:
                if waiting.future.done():
                    continue
                if isinstance(waiting.outcome, Exception):
                    waiting.future.set_exception(waiting.outcome)
                    waiting.future.exception()  # seen: a request that is over does not look
                else:
                    waiting.future.set_result(waiting.outcome)


class UserSide(NamedTuple):
    """A user state on the device."""

    state: Any
    length: int  # places of the history that it was made from
    since: float | None  # fetch of its features, by time.perf_counter; None for the unknown user
    known: UnknownCounts = UnknownCounts()  # how much of them the model knows


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
    programs: dict[tuple[int, int, int], Callable[..., Any]]  # by length of history, requests in a batch, bucket
    no_bids: dict[tuple[int, int], jax.Array]  # float32 [b, bucket] of `ROWS_OWN`, on the device, as most requests bring none
    branches: dict[str, jax.Array]  # int32 [] of each order, on the device
    outputs: int  # T
    transfers: Counter[str]

    def inputs(self, rows: list[np.ndarray], bids: list[Any], order: str, bucket: int) -> tuple[Any, Any, Any]:
        """Return rows [b, bucket], bids [b, bucket] and order [] of b requests; arrays on the host go up with the call."""
        words = self.count_up(filled(rows, bucket, np.int32(UNKNOWN)))
        if order == LOGIT or all(each is None for each in bids):
            return words, self.no_bids[len(rows), bucket], self.branches[order]
        prices = filled([() if each is None else each for each in bids], bucket, np.float32(ROWS_OWN))
        return words, self.count_up(prices), self.branches[order]

    def run(self, users: list[UserSide], bucket: int, inputs: tuple[Any, Any, Any]) -> tuple[jax.Array, jax.Array]:
        """Return the packed best and all logits, not ready yet, of histories of one length."""
        program = self.programs[users[0].length, len(users), bucket]
        with jax.transfer_guard_host_to_device("allow"), self.index.reading() as table:  # the inputs are meant to go up
            return program(tuple(user.state for user in users), table, *inputs)

    def download(self, value: jax.Array) -> np.ndarray:
        """Return an array on the host."""
        with jax.transfer_guard_device_to_host("allow"):  # meant, and sooner there than by `device_get`
            array = np.asarray(value)
        self.transfers["device_to_host"] += 1
        self.transfers["device_to_host_bytes"] += array.nbytes
        return array

    def best(self, packed: jax.Array) -> list[TopCandidates]:
        """Return scores, logits, positions and count of each request, of the int32 [b, (2 + T) k + 1] that a program packs."""
        found = []
        for values in self.download(packed):
            k = (len(values) - 1) // (2 + self.outputs)
            scores, logits, positions = values[:k], values[k : -1 - k], values[-1 - k : -1]
            shaped = logits.view(np.float32) if self.outputs == 1 else logits.view(np.float32).reshape(k, self.outputs)
            found.append(TopCandidates(scores.view(np.float32), shaped, positions, int(values[-1])))
        return found

    def count_up(self, array: np.ndarray) -> np.ndarray:
        """Return the same array, counted as one that goes up to the device with a call."""
        self.transfers["host_to_device"] += 1
        self.transfers["host_to_device_bytes"] += array.nbytes
        return array


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


class CandidateRows(NamedTuple):
    """A task's candidates in the index."""

    all: np.ndarray  # int32 [C], UNKNOWN or EXCLUDED where there is nothing to score
    once: np.ndarray  # the same without repeats, where the best are wanted
    unknown: int  # candidates that the index does not hold
    excluded: int  # candidates that the request excludes
    spans: list[Span]


class ScoringResult(NamedTuple):
    """What came of a task, on the host."""

    rows: CandidateRows
    best: TopCandidates | None
    logits: np.ndarray | None  # float32 [C] or [C, T], where they were to come back
    spans: list[Span]


def look_up(task: ScoringTask) -> CandidateRows:
    """Look up a task's candidates, in a thread. Raises DeadlineExceeded without budget, TypeError for ids of another kind."""
    began = time.perf_counter()
    if task.deadline is not None and began > task.deadline:
        raise DeadlineExceeded("scoring: the budget was spent before a scoring thread was free")
    index, (ids, bids) = task.snapshot.index, (task.candidates.ids, task.candidates.bids)
    with jax.profiler.TraceAnnotation("aif.lookup"):
        rows = index.lookup(ids)[0]
        if task.exclude is not None and len(task.exclude):
            excluded = index.lookup(task.exclude)[0]
            rows = np.where(np.isin(rows, excluded[excluded >= 0]), np.int32(EXCLUDED), rows)
        ordered = np.sort(rows)
        below = ordered[: np.searchsorted(ordered, 0)]
        known = ordered[len(below) :]
        repeated = not task.whole and (known[1:] == known[:-1]).any()
        once = without_repeats(rows, bids) if repeated else rows
    excluded = int(np.count_nonzero(below == EXCLUDED)) if len(below) else 0
    spans = [Span("queue", task.submitted, began), Span("lookup", began, time.perf_counter())]
    return CandidateRows(rows, once, len(below) - excluded, excluded, spans)


def score(tasks: list[ScoringTask], rows: list[CandidateRows]) -> list[ScoringResult]:
    """Score tasks of one snapshot, length of history, bucket and order; to be called in a thread: it waits for the device."""
    snapshot, bucket, order, whole = tasks[0].snapshot, tasks[0].bucket, tasks[0].order, tasks[0].whole
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.upload"):
        inputs = snapshot.inputs([each.once for each in rows], [task.candidates.bids for task in tasks], order, bucket)
    uploaded = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.score"):
        packed, logits = snapshot.run([task.user for task in tasks], bucket, inputs)
        packed.block_until_ready()
    scored = time.perf_counter()
    with jax.profiler.TraceAnnotation("aif.fetch"):
        fetched: Any = snapshot.download(logits) if whole else snapshot.best(packed)
    fetch = Span("fetch", scored, time.perf_counter())
    spans = [Span("upload", start, uploaded), Span("score", uploaded, scored), fetch]
    results = []
    for task, its, values in zip(tasks, rows, fetched, strict=True):
        best, all_logits = (None, values[: len(task.candidates.ids)]) if whole else (values, None)
        results.append(ScoringResult(its, best, all_logits, [*its.spans, *spans]))
    return results


def bucket_for(count: int, buckets: Sequence[int]) -> int:
    """Return the size that so many candidates are padded to; above the largest, that of their pieces.

    Pieces are all of one size: a quarter of the largest bucket or more, the one that pads least.

    Example:
      >>> bucket_for(100, (64, 256, 1024)), bucket_for(1030, (64, 256, 1024)), bucket_for(2000, (64, 256, 1024))
      (256, 256, 1024)
    """
    if count <= buckets[-1]:
        return buckets[bisect.bisect_left(buckets, count)]
    large = [size for size in reversed(buckets) if 4 * size >= buckets[-1]]
    return min(large, key=lambda size: -(-count // size) * size)


def pad(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """Return a new array [size, ...] that starts with `values` [n, ...], then `fill`; a device may be given its memory."""
    padded = np.full((size, *values.shape[1:]), fill, values.dtype)
    padded[: len(values)] = values
    return padded


def filled(values: Sequence[Any], size: int, fill: Any) -> np.ndarray:
    """Return new array [b, size] of rows that start with `values` [n] and end with `fill`; a device may be given its memory."""
    rows = np.full((len(values), size), fill)
    for row, some in zip(rows, values, strict=True):
        row[: len(some)] = some
    return rows


def without_repeats(rows: np.ndarray, bids: np.ndarray | None) -> np.ndarray:
    """Return rows int32 [C] of candidates with -1 for those that repeat another: the first of the highest bid is left."""
    keys = (np.arange(len(rows)), rows) if bids is None else (np.arange(len(rows)), -bids, rows)
    order = np.lexsort(keys)
    once = np.full_like(rows, UNKNOWN)
    first = order[np.flatnonzero(np.diff(rows[order], prepend=-2))]
    once[first] = rows[first]
    return once


def best_of(parts: list[TopCandidates], rows: list[np.ndarray], k: int, *, outputs: int = 1) -> TopCandidates:
    """Return the best k of several batches of candidates with their `rows` int32 [n]; T = `outputs` logits each.

    Positions count from the first batch's first candidate. An item of several batches comes once, with its best score. Missing
    entries have score -inf and position 0.
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
