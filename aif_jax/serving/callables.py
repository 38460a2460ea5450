"""Calls of `features` and `retrieval`: async or in threads, contained so that each affects its request alone.

Every call runs in a separate task. A request that is over cancels its call and does not wait for it, and nothing that a call
raises reaches the event loop or cancels a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterator
from typing import Any

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import CallableError
from aif_jax.serving.threads import Workers

logger = logging.getLogger(__name__)
QUIET = 60.0  # seconds between two log lines on errors of one type of one callable
GRACE = 1.0  # seconds that a cancelled call may take to clean up before it counts as hung
_END = object()


class Guarded:
    """A callable of the engine's owner; `function` is None where only `batches` is used.

    Attributes:
      errors: how many of its calls failed, by type of the error.
    """

    def __init__(self, name: str, function: Any, config: ServingConfig):
        self._name = name
        self._function = function
        self._on_loop = _is_async(function)
        self._workers = Workers(f"aif-{name}", config.callable_threads, replace=True)
        self._timeout = config.callable_timeout
        self._max_hung = config.max_hung
        self.errors: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}  # by type: when its last line was, and how many errors there were then
        self._cancelled: dict[asyncio.Task[Any], float] = {}  # tasks that have not ended yet, and since when

    @property
    def hung(self) -> int:
        """Calls that still run although their requests are over."""
        now = time.perf_counter()
        return self._workers.hung + sum(now - since > GRACE for since in self._cancelled.values())

    async def __call__(self, request: Any) -> Any:
        """What the function returns or raises; CallableError for what would end others, TimeoutError by `callable_timeout`."""
        if self._workers.hung + len(self._cancelled) >= self._max_hung and self.hung >= self._max_hung:
            raise self.noted(CallableError(f"{self._name}: {self.hung} calls have not returned, as many as max_hung allows"))
        with self._task(self._call(request)) as outcome:
            result, error = await self._in_time(outcome, outcome)
        if error is not None:
            raise self.noted(error)
        return result

    def noted(self, error: BaseException) -> BaseException:
        """The same error, counted by its type; the first of a type is logged, and then one in `QUIET` seconds.

        The line has the error and where it was raised, and no user: a request is no business of a log.
        """
        kind, now = type(error).__name__, time.perf_counter()
        self.errors[kind] += 1
        last, before = self._logged.get(kind, (-QUIET, 0))
        if now - last >= QUIET:
            self._logged[kind] = now, self.errors[kind]
            since = f" ({self.errors[kind] - before} since the last line on this type)" if before else ""
            logger.error("%s failed: %s%s", self._name, described(error), since, exc_info=error)
        return error

    async def batches(self, stream: Any) -> AsyncGenerator[Any, None]:
        """The batches of an async iterator, which is read in one task and closed with the request."""
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        with self._task(_read(stream, arrived)) as outcome:
            outcome.add_done_callback(lambda _: arrived.put_nowait(_END))
            while (batch := await self._in_time(arrived.get(), outcome)) is not _END:
                yield batch
        _, error = outcome.result()
        if error is not None:
            raise self.noted(error)

    def close(self) -> None:
        """Ends idle threads; those of hung calls end with the process."""
        self._workers.close()

    async def _call(self, request: Any) -> Any:
        result = self._function(request) if self._on_loop else await self._workers.run(self._function, request)
        return await result if inspect.isawaitable(result) else result

    @contextlib.contextmanager
    def _task(self, call: Coroutine[Any, Any, Any]) -> Iterator[asyncio.Future[Any]]:
        """Runs a call in a task, which is cancelled at the end of the block; the future gets (result, error)."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Any] = loop.create_future()
        task = loop.create_task(self._contained(call, outcome))
        try:
            yield outcome
        finally:
            if not task.done():
                task.cancel()
                self._cancelled[task] = time.perf_counter()
                task.add_done_callback(self._cancelled.pop)

    async def _in_time(self, answer: Awaitable[Any], outcome: asyncio.Future[Any]) -> Any:
        """Awaits an answer of a call, whose outcome is a TimeoutError when that takes longer than `callable_timeout`."""
        timer = None if self._timeout is None else outcome.get_loop().call_later(self._timeout, self._expire, outcome)
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()

    def _expire(self, outcome: asyncio.Future[Any]) -> None:
        _settle(outcome, None, TimeoutError(f"{self._name}: no answer within callable_timeout={self._timeout} s"))

    async def _contained(self, call: Coroutine[Any, Any, Any], outcome: asyncio.Future[Any]) -> None:
        """Runs a call in a task that raises nothing: asyncio ends its loop where a task raises SystemExit."""
        try:
            _settle(outcome, await call, None)
        except BaseException as error:
            stopped = isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration)
            if stopped or not isinstance(error, Exception):
                culprit = stopped and error.__cause__ or error  # Python's RuntimeError for a StopIteration names none
                refused = CallableError(f"{self._name} raised {described(culprit)}")
                refused.__cause__ = error
                error = refused
            _settle(outcome, None, error)


def described(error: BaseException) -> str:
    """An error with its type, as the last line of a traceback has it."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


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
