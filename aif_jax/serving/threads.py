"""Daemon threads that run plain functions for an event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(eq=False, slots=True)
class _Call:
    """A function to run, the future that waits for it, and the thread that runs it, while one does."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: asyncio.Future[Any] | None
    thread: threading.Thread | None = None
    over: bool = False  # has run, or nobody wants it any more


class Workers:
    """A few threads that start when they are needed and never keep the process alive; `limit` run at once.

    With `replace`, for functions that may hang, a thread whose caller has given up no longer counts towards the limit; it ends
    when its function returns.
    """

    def __init__(self, name: str, limit: int, *, replace: bool = False):
        self.hung = 0  # functions that run on without a caller, where threads are replaced
        self._name = name
        self._limit = limit
        self._replace = replace
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding = 0  # calls that wait or run, without hung ones
        self._threads: set[threading.Thread] = set()  # without those of hung calls
        self._started = 0

    def start(self, function: Callable[..., Any], *arguments: Any, future: asyncio.Future[Any] | None = None) -> _Call:
        """Runs a function; `future` gets (result, error). Without one nobody waits, and the function must not raise."""
        call = _Call(function, arguments, future)
        with self._lock:
            self._outstanding += 1
            self._grow()
        self._queue.put(call)  # wakes a thread, which takes the lock
        return call

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns or raises. Cancelled before a thread takes it, it does not run."""
        future = asyncio.get_running_loop().create_future()
        call = self.start(function, *arguments, future=future)
        try:
            result, error = await future
        except asyncio.CancelledError:
            self._abandon(call)
            if future.done() and not future.cancelled():  # the result came in the same turn of the loop
                _drop(future.result())
            raise
        if error is not None:
            raise error
        return result

    def close(self, *, wait: float = 0.0) -> None:
        """Ends the threads once the functions that were handed in have run; waits up to `wait` seconds for each."""
        with self._lock:
            threads = list(self._threads)
            for _ in threads:
                self._queue.put(None)
        for thread in threads:
            thread.join(wait)

    def _grow(self) -> None:
        if self._outstanding > len(self._threads) < self._limit:
            self._started += 1
            thread = threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _abandon(self, call: _Call) -> None:
        with self._lock:
            if call.over or (call.thread is not None and not self._replace):
                return
            call.over = True
            self._outstanding -= 1
            if call.thread is not None:
                self.hung += 1
                self._threads.discard(call.thread)
            self._grow()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            with self._lock:
                if call.over:
                    continue
                call.thread = threading.current_thread()
            try:
                outcome = call.function(*call.arguments), None
            except BaseException as error:
                outcome = None, error
            with self._lock:
                if call.over:  # given up and replaced
                    self.hung -= 1
                    _drop(outcome)
                    return
                call.over = True
                self._outstanding -= 1
            if call.future is not None and not post(call.future.get_loop(), _deliver, call.future, outcome):
                _drop(outcome)
            del call, outcome  # an idle thread holds no request


def post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Runs a function on a loop from another thread; false where the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _deliver(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        _drop(outcome)
    else:
        future.set_result(outcome)  # errors too: a future refuses StopIteration and warns of errors that nobody awaits


def _drop(outcome: tuple[Any, BaseException | None]) -> None:
    """Closes a coroutine that a function returned when nobody waited for it any more."""
    if inspect.iscoroutine(outcome[0]):
        outcome[0].close()
