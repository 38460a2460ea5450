"""One computation in flight per key, shared by everyone who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any


class Flight:
    """A running computation and how many wait for it."""

    def __init__(self, key: Hashable, task: asyncio.Task[Any]):
        self.key = key
        self.task = task
        self.waiters = 0
        self.prepared = False


class Flights:
    """Computations by key, used from the event loop's thread.

    Args:
      detached_limit: computations without a waiter that may run on, for those who come later.
    """

    def __init__(self, *, detached_limit: int):
        self._limit = detached_limit
        self._flights: dict[Hashable, Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, key: Hashable) -> Flight | None:
        """The flight of that key, if one is running."""
        return self._flights.get(key)

    def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[Flight, bool]:
        """The flight of that key, started where there is none, and whether it was running already."""
        flight = self._flights.get(key)
        running = flight is not None
        if flight is None:
            flight = self._flights[key] = Flight(key, asyncio.get_running_loop().create_task(start()))
            self._tasks.add(flight.task)
            flight.task.add_done_callback(lambda task: self._landed(key, task))
        flight.waiters += 1
        return flight, running

    def leave(self, flight: Flight, *, keep: bool) -> None:
        """Takes back one `join`. The last one out cancels the computation, unless `keep` lets it run on for the cache."""
        flight.waiters -= 1
        if flight.waiters or flight.task.done():
            return
        detached = sum(not other.waiters for other in self._flights.values())
        if not keep or detached > self._limit:
            flight.task.cancel()
            self._forget(flight.key, flight.task)

    async def close(self) -> None:
        """Cancels everything in flight and waits until it is gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _landed(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # seen here too, so that nobody is warned of an error that no request waits for any more

    def _forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        if key in self._flights and self._flights[key].task is task:
            del self._flights[key]
