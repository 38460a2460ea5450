"""Single-flight: one running computation for each key, shared by everyone who waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Hashable
from typing import Any


@dataclasses.dataclass(eq=False)
class Computation:
    """A running computation and how many wait for it."""

    key: Hashable
    task: asyncio.Task[Any]
    waiters: int = 0


class SingleFlight:
    """Computations by key, used from the event loop's thread; `detached_limit` without a waiter may run on."""

    def __init__(self, *, detached_limit: int):
        self._limit = detached_limit
        self._running: dict[Hashable, Computation] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._running

    def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Any]]) -> Computation:
        """The computation of that key, started where there is none. Every `join` needs a `leave`."""
        computation = self._running.get(key)
        if computation is None:
            computation = self._running[key] = Computation(key, asyncio.get_running_loop().create_task(start()))
            self._tasks.add(computation.task)
            computation.task.add_done_callback(lambda task: self._ended(key, task))
        computation.waiters += 1
        return computation

    def leave(self, computation: Computation, *, keep: bool) -> None:
        """Takes back one `join`. The last one out cancels the computation, unless `keep` lets it run on for the cache."""
        computation.waiters -= 1
        if computation.waiters or computation.task.done():
            return
        detached = sum(not other.waiters for other in self._running.values())
        if not keep or detached > self._limit:
            computation.task.cancel()
            self._forget(computation.key, computation.task)

    async def close(self) -> None:
        """Cancels every computation and waits until it is gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # seen here too, so that nobody is warned of an error that no request waits for any more

    def _forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        if key in self._running and self._running[key].task is task:
            del self._running[key]
