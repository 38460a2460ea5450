"""Time-limited calls of `features` and `retrieval`.

A call runs in a separate task: a caller that is cancelled cancels it and does not wait, and nothing that it raises reaches the
event loop. `retrieval` is called by a request, `features` by the computation of a user state, which requests may share.
"""

import asyncio
import contextlib
import inspect
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from aif_jax.serving.config import ServingConfig
from aif_jax.serving.requests import CallableError, CallerError, DeadlineExceeded

logger = logging.getLogger(__name__)
QUIET = 60.0  # seconds between two log lines on errors of one type of one callable
GRACE = 1.0  # seconds that a cancelled task may take to clean up before it counts as hung


class TimeLimitedCall:
    """A callable of the engine's owner.

    An async function runs on the event loop, any other in one daemon thread a call. A call that outlives its caller is left
    behind: with `max_hung` of them, calls fail.

    Attributes:
      errors: how many of its calls failed, or gave what the user function failed on, by type of the error.
    """

    def __init__(self, name: str, function: Callable[[Any], Any], config: ServingConfig):
        self.name = name
        self._function = function
        call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        self._on_loop = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        self._timeout = config.callable_timeout
        self._max_hung = config.max_hung
        self._running: dict[asyncio.Future[Any], float] = {}  # calls in time, oldest first, and when each is late
        self._timer: asyncio.TimerHandle | None = None  # for the oldest
        self._left: dict[asyncio.Future[Any], float] = {}  # calls without a caller: from when each counts as hung, 0.0 at once
        self.errors: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}  # by type: when its last line was, and how many errors there were then

    @property
    def hung(self) -> int:
        """Calls that still run although their callers have given up."""
        now = time.perf_counter()
        return sum(since <= now for since in list(self._left.values()))

    async def __call__(self, request: Any) -> Any:
        """Return what the function returns or raises; cancelled, it gives the call up.

        Raises CallableError for what would end others and for too many hung calls, DeadlineExceeded by `callable_timeout`.
        """
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()
        task = loop.create_task(self._contained(outcome, request))
        if self._timeout is not None:
            self._running[outcome] = loop.time() + self._timeout
            self._timer = self._timer or loop.call_later(self._timeout, self._expire)
        try:
            result, error = await outcome
        finally:
            self._running.pop(outcome, None)
            if not self._running and self._timer is not None:  # which would keep the engine alive
                self._timer.cancel()
                self._timer = None
            self._leave(task)
        if error is not None:
            self.note(error)
            raise error
        return result

    def _expire(self) -> None:
        """Fail the calls whose time is over, and come back for the oldest of the others: one timer for all."""
        loop, self._timer = asyncio.get_running_loop(), None
        for outcome, end in list(self._running.items()):
            if end > loop.time():
                self._timer = loop.call_at(end, self._expire)
                return
            if not outcome.done():
                late = f"{self.name}: no answer within callable_timeout={self._timeout} s"
                outcome.set_result((None, DeadlineExceeded(late)))

    def note(self, error: BaseException) -> None:
        """Count an error by its type; log the first of a type, then one in `QUIET` seconds; no traceback of a `CallerError`."""
        kind, now = type(error).__name__, time.perf_counter()
        self.errors[kind] += 1
        last, before = self._logged.get(kind, (-QUIET, 0))
        if now - last >= QUIET:
            self._logged[kind] = now, self.errors[kind]
            since = f" ({self.errors[kind] - before} since the last line on this type)" if before else ""
            if isinstance(error, CallerError):
                return logger.warning("%s refused a request: %s%s", self.name, described(error), since)
            # as text: a handler that keeps records would keep the frames of the traceback, and with them model versions
            where = "".join(traceback.format_exception(error)).rstrip()
            logger.error("%s failed: %s%s\n%s", self.name, described(error), since, where)

    async def _in_thread(self, request: Any) -> Any:
        """Return what the function returns or raises in a thread."""
        ended = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._run, args=(request, ended), name=f"aif-{self.name}", daemon=True).start()
        try:
            result, error = await asyncio.shield(ended)
        except asyncio.CancelledError:  # a thread cannot be cancelled: it counts as hung at once, until it returns
            self._left[ended] = 0.0
            ended.add_done_callback(self._drop)
            raise
        if error is not None:
            raise error
        return result

    def _run(self, request: Any, ended: asyncio.Future[Any]) -> None:
        """Call the function, in a thread, and hand what came of it to the loop."""
        try:
            outcome = self._function(request), None
        except BaseException as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            ended.get_loop().call_soon_threadsafe(ended.set_result, outcome)

    def _drop(self, ended: asyncio.Future[Any]) -> None:
        """Forget a call whose caller has given up, and close a coroutine that it returned."""
        del self._left[ended]
        if inspect.iscoroutine(late := ended.result()[0]):
            late.close()

    async def _contained(self, outcome: asyncio.Future[Any], request: Any) -> None:
        """Set what a call returns, and what it raises: asyncio ends its loop where a task raises SystemExit."""
        result, raised = None, None
        try:
            if self._left and (hung := self.hung) >= self._max_hung:
                text = f"{self.name}: {hung} calls have not returned, as many as max_hung allows"
                raise CallableError(f"{text}; add a timeout to its client, or set callable_timeout")
            result = self._function(request) if self._on_loop else await self._in_thread(request)
            if inspect.isawaitable(result):
                result = await result
        except BaseException as error:
            stopped, raised = isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration), error
            if stopped or not isinstance(error, Exception):
                culprit = stopped and error.__cause__ or error  # Python's RuntimeError for a StopIteration names none
                raised = CallableError(f"{self.name} raised {described(culprit)}")
                raised.__cause__ = error
        if not outcome.done():
            outcome.set_result((result, raised))

    def _leave(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task that has not ended, and wait for nothing."""
        if not task.done():
            task.cancel()
            self._left[task] = time.perf_counter() + GRACE
            task.add_done_callback(self._left.pop)


def described(error: BaseException) -> str:
    """Return an error with its type, as the last line of a traceback has it."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")
