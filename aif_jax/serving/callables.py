"""Calls of `features` and `retrieval`: async or in threads, so that whatever they do is the matter of one request.

Every call runs in a task of its own. A request that is over cancels its call and does not wait for it, and nothing that a call
raises reaches the event loop or cancels a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, NoReturn

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.errors import CallableError
from aif_jax.serving.threads import Workers

GRACE = 1.0  # seconds that a cancelled call may take to clean up before it counts as hung
_END = object()


class Guarded:
    """A callable of the engine's owner.

    Args:
      name: for messages and threads.
      function: async or not; None where only `batches` is used.
      config: `callable_timeout` for a call or for one batch of a stream, `callable_threads`, `max_hung`.
    """

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
        """Calls that go on although their requests are over."""
        now = time.perf_counter()
        return self._workers.hung + sum(now - since > GRACE for since in self._cancelled.values())

    async def __call__(self, request: Any) -> Any:
        """What the function returns.

        Raises:
          CallableError: it raised what would end or cancel others; too many calls have not returned.
          TimeoutError: it took longer than `callable_timeout`.
          Exception: whatever else it raised.
        """
        if self._workers.hung + len(self._cancelled) >= self._max_hung and self.hung >= self._max_hung:
            raise CallableError(f"{self._name}: {self.hung} calls have not returned, as many as max_hung allows")
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._contained(self._call(request)))
        over = loop.create_future()
        task.add_done_callback(lambda _: _wake(over))
        timer = None if self._timeout is None else loop.call_later(self._timeout, _wake, over)
        try:
            await over
        finally:
            if timer is not None:
                timer.cancel()
            in_time = task.done()
            if not in_time:
                self._give_up(task)
        return self._outcome(task) if in_time else self._too_late()

    async def batches(self, stream: Any) -> AsyncGenerator[Any, None]:
        """The batches of an async iterator, which is read in one task and closed with the request."""
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.get_running_loop().create_task(self._contained(_read(stream, arrived)))
        task.add_done_callback(lambda _: arrived.put_nowait(_END))
        try:
            while True:
                try:
                    async with asyncio.timeout(self._timeout):
                        batch = await arrived.get()
                except TimeoutError:
                    self._too_late()
                if batch is _END:
                    break
                yield batch
            self._outcome(task)
        finally:
            if not task.done():
                self._give_up(task)

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

    async def _contained(self, call: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await call
        except (KeyboardInterrupt, SystemExit) as error:  # asyncio ends the loop where a task raises one of these
            raise self._refused(error) from error
        except RuntimeError as error:
            if isinstance(error.__cause__, StopIteration):  # Python's own form of it, which names no culprit
                raise self._refused(error.__cause__) from error
            raise

    def _outcome(self, task: asyncio.Task[Any]) -> Any:
        if task.cancelled():  # by the call itself: a request that cancels does not look at the outcome
            raise self._refused(asyncio.CancelledError())
        error = task.exception()
        if error is not None:
            raise error if isinstance(error, Exception) else self._refused(error)
        return task.result()

    def _refused(self, error: BaseException) -> CallableError:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return CallableError(f"{self._name} raised {what}")

    def _too_late(self) -> NoReturn:
        raise TimeoutError(f"{self._name}: no answer within callable_timeout={self._timeout} s")

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._cancelled[task] = time.perf_counter()
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._cancelled[task]
        if not task.cancelled():
            task.exception()  # looked at, so that nobody is warned of an error that no request waits for


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _read(stream: Any, arrived: asyncio.Queue[Any]) -> None:
    async with contextlib.aclosing(stream) if hasattr(stream, "aclose") else contextlib.nullcontext(stream):
        async for batch in stream:
            arrived.put_nowait(batch)
            await asyncio.sleep(0)  # a stream that never waits must not hold up the loop


def _is_async(function: Any) -> bool:
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call))
