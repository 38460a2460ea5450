"""Work for the device in worker threads: what has to wait anyway runs together in one call."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from aif_jax.serving.threads import Workers, post

RECENT = 0.1
"""Weight of the latest call in running means."""


class Task(Protocol):
    """Something to compute; `future` gets the result, or the exception that stands for what went wrong with it alone."""

    @property
    def future(self) -> asyncio.Future[Any]:
        """Whose result is the task's."""
        ...

    @property
    def key(self) -> Hashable:
        """Tasks of one key can run in one call."""
        ...


T = TypeVar("T", bound=Task)


class Together(Generic[T]):
    """Computes tasks without blocking the event loop.

    A thread that becomes free takes the task that has waited longest and, up to the largest compiled size, those of the same
    key. So batches form only where tasks have to wait, and a lone task never waits for others.

    Args:
      name: of the threads.
      threads: how many.
      sizes: compiled batch sizes, ascending from 1.
      full: the least share of a size that must be filled with tasks; the rest is computed for nothing.
      prepare: the work of one task on the host. An exception of one concerns that task alone.
      run: `run(tasks, prepared, started)` -> one result for each of the tasks that could be prepared.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        sizes: Sequence[int],
        *,
        full: float,
        prepare: Callable[[T], Any],
        run: Callable[[list[T], list[Any], float], Sequence[Any]],
    ):
        self.sizes = sizes
        self.seconds = 0.0  # of a thread that a task took lately, over the number of threads: how fast a queue gets shorter
        self._threads = threads
        self._full = full
        self._prepare = prepare
        self._run = run
        self._workers = Workers(name, threads)
        self._waiting: deque[T] = deque()
        self._lock = threading.Lock()

    def submit(self, task: T) -> None:
        """Computes one task."""
        with self._lock:
            self._waiting.append(task)
        self._workers.start(self._run_next)

    def close(self) -> None:
        """Ends the threads; waits for the call that each is in."""
        self._workers.close(wait=1.0)

    def size_for(self, count: int) -> int:
        """The compiled size that takes so many tasks."""
        return next(size for size in self.sizes if size >= count)

    def _run_next(self) -> None:
        """In a worker thread: some of what waits, if another thread has not taken it."""
        if tasks := self._take():
            started = time.perf_counter()
            outcomes = self._outcomes(tasks, started)
            taken = (time.perf_counter() - started) / (len(tasks) * self._threads)
            self.seconds += RECENT * (taken - self.seconds)
            post(tasks[0].future.get_loop(), _hand_out, tasks, outcomes)

    def _take(self) -> list[T]:
        with self._lock:
            while self._waiting and self._waiting[0].future.done():  # cancelled
                self._waiting.popleft()
            if not self._waiting or self.sizes[-1] == 1:
                return [self._waiting.popleft()] if self._waiting else []
            key = self._waiting[0].key
            alike = [task for task in self._waiting if task.key == key and not task.future.done()]
            size = next(size for size in reversed(self.sizes) if len(alike) >= self._full * size)
            taken = set(map(id, alike[:size]))
            self._waiting = deque(task for task in self._waiting if id(task) not in taken)
            return alike[:size]

    def _outcomes(self, tasks: list[T], started: float) -> list[Any]:
        outcomes: list[Any] = []
        for task in tasks:
            try:
                outcomes.append(self._prepare(task))
            except Exception as error:
                outcomes.append(error)
        live = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        if not live:
            return outcomes
        try:
            results = self._run([tasks[place] for place in live], [outcomes[place] for place in live], started)
        except Exception as error:
            results = [error] * len(live)
        for place, result in zip(live, results, strict=True):
            outcomes[place] = result
        return outcomes


def _hand_out(tasks: list[Any], outcomes: list[Any]) -> None:
    for task, outcome in zip(tasks, outcomes, strict=True):
        if not task.future.done():
            task.future.set_result(outcome)
