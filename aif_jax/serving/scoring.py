"""What an engine computes in threads, where tasks that wait for one are batched; candidates are looked up, then scored."""

import asyncio
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

from aif_jax.features import UserPacker
from aif_jax.serving.metrics import UnknownCounts
from aif_jax.serving.programs import LOGIT, NO_BID, Orders
from aif_jax.serving.requests import Candidates, Request, Span, Timeline

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


class Batches:
    """Computes tasks in threads; when a thread is free, it takes the task that has waited longest and those of its key.

    So batches form only where all threads are busy, and a lone task never waits for others.

    Args:
      most: the most tasks that one call can have.
      run: `run(tasks)` -> a result for each. Where it raises, each task is tried alone, so none fails with another.

    Attributes:
      seconds: by which a waiting task delays those behind it: the running mean of a task's seconds, by the number of threads.
    """

    def __init__(self, name: str, threads: int, most: int, run: Callable[[list[Any]], Sequence[Any]]):
        self.seconds = 0.0
        self._most, self._run = most, run
        self._threads = [threading.Thread(target=self._work, name=f"{name}_{n}", daemon=True) for n in range(threads)]
        self._calls = SimpleQueue[bool]()  # True lets a thread work, False ends it
        self._lock = threading.Lock()  # of the two below
        self._waiting: list[WaitingTask] = []
        self._working = 0  # threads that were called and have not found the queue empty since
        self._done = deque[tuple[list[Any], float]]()  # outcomes, with seconds a task
        self._scheduled = False  # a `_hand_out` that has not begun: cleared before it looks at `_done`

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, key: Hashable, task: Any) -> asyncio.Future[Any]:
        """Return the result of a task, or what went wrong with it; cancel the future to give the task up."""
        waiting = WaitingTask(key, task, asyncio.get_running_loop().create_future())
        with self._lock:
            self._waiting.append(waiting)
            free = self._working < len(self._threads)
            self._working += free
        if free:
            self._calls.put(True)
        return waiting.future

    def close(self) -> None:
        """End the threads, each after the call that it is in."""
        for _ in self._threads:
            self._calls.put(False)
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()

    def _work(self) -> None:
        """Compute, in a thread, whenever it is called, until nothing waits."""
        while self._calls.get():
            batch = self._take()
            while batch:
                began = time.perf_counter()
                self._done.append((self._outcomes(batch), (time.perf_counter() - began) / len(batch)))
                loop, batch = batch[0].future.get_loop(), self._take()
                if not self._scheduled:
                    self._scheduled = True
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(self._hand_out)

    def _take(self) -> list[WaitingTask]:
        """Return the next batch. Where nothing waits, the thread counts as free from then on: before its last answer leaves."""
        with self._lock:
            waiting = [each for each in self._waiting if not each.future.done()]  # without those that were given up
            batch = [each for each in waiting if each.key == waiting[0].key][: self._most]
            self._waiting = [each for each in waiting if each not in batch]
            self._working -= not batch
            return batch

    def _outcomes(self, batch: list[WaitingTask]) -> list[tuple[asyncio.Future[Any], Any]]:
        """Return the results of tasks of one key, or exceptions."""
        try:
            results = self._run([each.task for each in batch])
        except Exception as error:
            if len(batch) > 1:
                return [outcome for each in batch for outcome in self._outcomes([each])]
            results = [error]
        return [(each.future, result) for each, result in zip(batch, results, strict=True)]

    def _hand_out(self) -> None:
        """Give, on the loop, every task that is done its outcome."""
        self._scheduled = False
        while self._done:
            outcomes, seconds = self._done.popleft()
            self.seconds += RECENT * (seconds / len(self._threads) - self.seconds)
            for future, outcome in outcomes:
                if future.done():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                    future.exception()  # seen: a request that is over does not look
                else:
                    future.set_result(outcome)


class UserSide(NamedTuple):
    """A user state on the device."""

    state: Any
    since: float  # fetch of its features, by time.perf_counter; 0.0 for the unknown user
    counts: UnknownCounts = UnknownCounts()  # what of them the model does not know


class TopCandidates(NamedTuple):
    """The best of a request's candidates, on the host."""

    scores: np.ndarray  # float32 [min(max_k, bucket)], best first, -inf behind the last
    logits: np.ndarray  # float32 [min(max_k, bucket)], or [.., T]
    positions: np.ndarray  # int32 [min(max_k, bucket)]
    non_finite: int  # known candidates without a finite score


class CompiledIndex(NamedTuple):
    """An index, as of one moment, and the functions compiled for its capacity."""

    index: Any
    orders: Orders
    programs: dict[int, Callable[..., Any]]  # by bucket, for up to b requests
    no_bids: dict[int, jax.Array]  # float32 [b, bucket] of `NO_BID`, on the device, as most requests bring none
    branches: dict[str, jax.Array]  # int32 [] of each order, on the device
    counts: list[jax.Array]  # int32 [] 0 to b, on the device
    outputs: int  # T
    transfers: Counter[str]

    def inputs(self, rows: list[np.ndarray], bids: list[Any], order: str, bucket: int) -> tuple[Any, Any, Any]:
        """Return rows [b, bucket], bids [b, bucket] and order [] of up to b requests; arrays on the host go up with a call."""
        none, branch = self.no_bids[bucket], self.branches[order]
        padded = self.filled(rows, none.shape, np.int32(UNKNOWN))
        if order == LOGIT or all(each is None for each in bids):
            return padded, none, branch
        return padded, self.filled([() if each is None else each for each in bids], none.shape, np.float32(NO_BID)), branch

    def run(self, users: list[UserSide], inputs: tuple[Any, Any, Any]) -> tuple[jax.Array, jax.Array]:
        """Return the packed best and all logits, not ready yet; places behind those of the users have no meaning."""
        (size, bucket), count = inputs[0].shape, len(users)
        states = tuple(user.state for user in users + users[:1] * (size - count))
        with jax.transfer_guard_host_to_device("allow"), self.index.reading() as table:  # the inputs are meant to go up
            return self.programs[bucket](states, table, *inputs, self.counts[count])

    def download(self, value: jax.Array) -> np.ndarray:
        """Return an array on the host."""
        with jax.transfer_guard_device_to_host("allow"):  # meant, and sooner there than by `device_get`
            array = np.asarray(value)
        self.transfers["device_to_host"] += 1
        self.transfers["device_to_host_bytes"] += array.nbytes
        return array

    def best(self, packed: jax.Array, count: int) -> list[TopCandidates]:
        """Return the best of the first `count` requests, of the int32 [b, (2 + T) k + 1] that a program packs."""
        found = []
        for values in self.download(packed)[:count]:
            k = (len(values) - 1) // (2 + self.outputs)
            scores, logits, positions = values[:k], values[k : -1 - k], values[-1 - k : -1]
            shaped = logits.view(np.float32) if self.outputs == 1 else logits.view(np.float32).reshape(k, self.outputs)
            found.append(TopCandidates(scores.view(np.float32), shaped, positions, int(values[-1])))
        return found

    def filled(self, values: Sequence[Any], shape: tuple[int, ...], fill: Any) -> np.ndarray:
        """Return a new array of rows that start with `values` [n] and end with `fill`, counted as going up."""
        rows = np.full(shape, fill)
        for row, some in zip(rows, values, strict=False):
            row[: len(some)] = some
        self.transfers["host_to_device"] += 1
        self.transfers["host_to_device_bytes"] += rows.nbytes
        return rows


@dataclasses.dataclass(eq=False)
class Version:
    """One model version. Requests hold the version they started with; it is freed when the last of them completes."""

    name: str
    packer: UserPacker
    encoding: str  # version of the encoder that its features must come from, "" where none is known
    params: Any
    user: Callable[..., Any]  # compiled, for up to b users
    unknown_user: UserSide  # to compile for, and to answer with
    compiled: CompiledIndex
    probabilities: Callable[[np.ndarray], dict[str, np.ndarray]]  # of logits, on the host

    def states(self, words: list[np.ndarray]) -> tuple[Any, ...]:
        """Return the states of some users, not ready yet."""
        count, counts = len(words), self.compiled.counts
        packed = self.compiled.filled(words, (len(counts) - 1, len(words[0])), np.int32(0))
        with jax.transfer_guard_host_to_device("allow"):  # the features are meant to go up
            return self.user(packed, counts[count])[:count]


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """One accepted request, and what is known of it so far."""

    request: Request
    version: Version  # of the model, for the whole request
    timeline: Timeline
    budget: float | None  # seconds from arrival to answer; None for no limit
    deadline: float | None  # by `time.perf_counter`
    waiting_for: str = "user side"  # what a missed deadline is reported as
    whole: bool = False  # all logits come back, not the best
    compiled: CompiledIndex = dataclasses.field(init=False)  # its version's latest when the request goes to scoring
    user: UserSide = dataclasses.field(init=False)  # whose state scores
    candidates: Candidates = dataclasses.field(init=False)
    candidates_there: float = 0.0  # when they came
    rows: np.ndarray = dataclasses.field(init=False)  # int32 [C] of candidates, UNKNOWN or EXCLUDED: there nothing is scored
    unknown: int = 0  # candidates that the index does not hold
    excluded: int = 0  # candidates that the request excludes
    order: str = LOGIT
    bucket: int = 0
    submitted: float = 0.0  # when it was queued for a scoring thread
    reason: str | None = None  # why the answer is degraded, in words
    degraded: str | None = None  # the same, as a counter's name
    stand_in: str | None = None  # whose state scores in place of the user's own


def look_up(jobs: list[PendingRequest]) -> None:
    """Look up the candidates of requests of one index, all at once, and those that each request excludes."""
    lookup, start = jobs[0].compiled.index.lookup, 0
    given = [job.candidates.ids for job in jobs if len(job.candidates.ids)]  # an empty array may be of the other kind
    rows = lookup(np.concatenate(given))[0] if given else np.zeros(0, np.int32)
    for job in jobs:
        job.rows = rows[start : start + len(job.candidates.ids)]
        start += len(job.rows)
        if job.request.exclude is not None and len(job.request.exclude):
            excluded = lookup(job.request.exclude)[0]
            job.rows[np.isin(job.rows, excluded[excluded >= 0])] = EXCLUDED
        job.unknown, job.excluded = (int(np.count_nonzero(job.rows == of)) for of in (UNKNOWN, EXCLUDED))


def score(jobs: list[PendingRequest]) -> Any:
    """Look up and score requests of one index, bucket and order, in a thread, which waits for the device.

    Returns `TopCandidates` of each, or all logits float32 [b, bucket] or [b, bucket, T] where they were to come back.
    """
    compiled, bucket, began = jobs[0].compiled, jobs[0].bucket, time.perf_counter()
    look_up(jobs)
    inputs = compiled.inputs([job.rows for job in jobs], [job.candidates.bids for job in jobs], jobs[0].order, bucket)
    if not jobs[0].whole:
        leave_out_repeats(inputs[0], jobs)
    found = time.perf_counter()
    packed, logits = compiled.run([job.user for job in jobs], inputs)
    packed.block_until_ready()
    scored = time.perf_counter()
    results = compiled.download(logits)[: len(jobs)] if jobs[0].whole else compiled.best(packed, len(jobs))
    spans = Span("lookup", began, found), Span("score", found, scored), Span("fetch", scored, time.perf_counter())
    for job in jobs:
        job.timeline.clocked += Span("queue", job.submitted, began), *spans
    return results


def leave_out_repeats(rows: np.ndarray, jobs: list[PendingRequest]) -> None:
    """Score every item once a request: in rows [b, bucket], -1 stands for what repeats another of a higher or equal bid."""
    ordered = np.sort(rows[: len(jobs)])
    for place in np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)):
        own, bids = jobs[place].rows, jobs[place].candidates.bids
        order = np.lexsort((np.arange(len(own)), own) if bids is None else (np.arange(len(own)), -bids, own))
        repeats = order[np.flatnonzero(np.diff(own[order], prepend=EXCLUDED - 1) == 0)]
        rows[place, repeats] = UNKNOWN  # in the device's copy, not in `job.rows`; repeats of -1 and -2 too, unscored anyway
