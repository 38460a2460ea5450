"""Calls of `features` and `retrieval`: async or in threads, contained so that each affects its request alone.

Every call runs in a separate task. A request that is over cancels its call and does not wait for it, and nothing that a call
raises reaches the event loop or cancels a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import CallableError
from aif_jax.serving.threads import Workers

GRACE = 1.0  # seconds that a cancelled call may take to clean up before it counts as hung
_END = object()


class Guarded:
    """A callable of the engine's owner; `function` is None where only `batches` is used."""

    def __init__(self, name: str, function: Callable[..., Any] | None, config: ServingConfig):
        self._name = name
        self._function = function
        self._call = self._on_loop if _is_async(function) else self._in_thread
        self._workers = Workers(f"aif-{name}", config.callable_threads, replace=True)
        self._timeout = config.callable_timeout
        self._max_hung = config.max_hung
        self._cancelled: dict[asyncio.Task[Any], float] = {}  # tasks that have not ended yet, and since when

    @property
    def hung(self) -> int:
        """Calls that still run although their requests are over."""
        now = time.perf_counter()
        return self._workers.hung + sum(now - since > GRACE for since in self._cancelled.values())

    async def __call__(self, request: Any) -> Any:
        """What the function returns or raises; CallableError for what would end others, TimeoutError by `callable_timeout`."""
        if self._workers.hung + len(self._cancelled) >= self._max_hung and self.hung >= self._max_hung:
            raise CallableError(f"{self._name}: {self.hung} calls have not returned, as many as max_hung allows")
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Any] = loop.create_future()
        task = loop.create_task(self._contained(self._call(request), outcome))
        timer = None if self._timeout is None else loop.call_later(self._timeout, self._expire, outcome)
        try:
            result, error = await outcome
        finally:
            if timer is not None:
                timer.cancel()
            if not task.done():
                self._give_up(task)
        if error is not None:
            raise error
        return result

    async def batches(self, stream: Any) -> AsyncGenerator[Any, None]:
        """The batches of an async iterator, which is read in one task and closed with the request."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Any] = loop.create_future()
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        task = loop.create_task(self._contained(_read(stream, arrived), outcome))
        outcome.add_done_callback(lambda _: arrived.put_nowait(_END))
        try:
            while True:
                timer = None if self._timeout is None else loop.call_later(self._timeout, self._expire, outcome)
                try:
                    batch = await arrived.get()
                finally:
                    if timer is not None:
                        timer.cancel()
                if batch is _END:
                    break
                yield batch
        finally:
            if not task.done():
                self._give_up(task)
        _, error = outcome.result()
        if error is not None:
            raise error

    def close(self) -> None:
        """Ends idle threads; those of hung calls end with the process."""
        self._workers.close()

    async def _on_loop(self, request: Any) -> Any:
        assert self._function is not None
        result = self._function(request)
        return await result if inspect.isawaitable(result) else result

    async def _in_thread(self, request: Any) -> Any:
        assert self._function is not None
        result = await self._workers.run(self._function, request)
        return await result if inspect.isawaitable(result) else result

    async def _contained(self, call: Coroutine[Any, Any, Any], outcome: asyncio.Future[Any]) -> None:
        """Runs a call in a task that raises nothing: asyncio ends its loop where a task raises SystemExit."""
        try:
            _settle(outcome, await call, None)
        except BaseException as error:
            stopped = isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration)
            if stopped or not isinstance(error, Exception):
                culprit = error.__cause__ if stopped else error  # Python's RuntimeError for a StopIteration names none
                what = f"{type(culprit).__name__}: {culprit}" if str(culprit) else type(culprit).__name__
                refused = CallableError(f"{self._name} raised {what}")
                refused.__cause__ = error
                error = refused
            _settle(outcome, None, error)

    def _expire(self, outcome: asyncio.Future[Any]) -> None:
        _settle(outcome, None, TimeoutError(f"{self._name}: no answer within callable_timeout={self._timeout} s"))

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._cancelled[task] = time.perf_counter()
        task.add_done_callback(self._cancelled.pop)


def _settle(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if not outcome.done():
        outcome.set_result((result, error))


async def _read(stream: Any, arrived: asyncio.Queue[Any]) -> None:
    async with contextlib.aclosing(stream) if hasattr(stream, "aclose") else contextlib.nullcontext(stream):
        async for batch in stream:
            arrived.put_nowait(batch)
            await asyncio.sleep(0)  # a stream that never waits must not hold up the loop


def _is_async(function: Any) -> bool:
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call))
