"""Work off the event loop: daemon threads, time-limited calls of `features` and `retrieval`, batches for the device.

A call of `features` or `retrieval` runs in a separate task, so that it affects its request alone. A request that is over
cancels its call and does not wait for it, and nothing that a call raises reaches the event loop or cancels a caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import math
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from typing import Any

from aif_jax.serving.config import ServingConfig, batch_sizes
from aif_jax.serving.programs import Programs
from aif_jax.serving.requests import CallableError, CallerError, EngineClosed


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


logger = logging.getLogger(__name__)
QUIET = 60.0  # seconds between two log lines on errors of one type of one callable
GRACE = 1.0  # seconds that a cancelled call may take to clean up before it counts as hung
_END = object()


class TimeLimitedCall:
    """A callable of the engine's owner; `function` is None where only `batches` is used.

    Attributes:
      errors: how many of its calls failed, by type of the error.
    """

    def __init__(self, name: str, function: Any, config: ServingConfig):
        self._name = name
        self._function = function
        call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        self._on_loop = any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call))
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
            text = f"{self._name}: {self.hung} calls have not returned, as many as max_hung allows"
            raise self.noted(CallableError(f"{text}; add a timeout to its client, or set callable_timeout"))
        with self._task(self._call(request)) as outcome:
            result, error = await self._in_time(outcome, outcome)
        if error is not None:
            raise self.noted(error)
        return result

    def noted(self, error: BaseException) -> BaseException:
        """The same error, counted by its type; the first of a type is logged, and then one in `QUIET` seconds.

        The line has the error and, unless a caller is at fault, where it was raised; no user, who is no business of a log.
        """
        kind, now = type(error).__name__, time.perf_counter()
        self.errors[kind] += 1
        last, before = self._logged.get(kind, (-QUIET, 0))
        if now - last >= QUIET:
            self._logged[kind] = now, self.errors[kind]
            since = f" ({self.errors[kind] - before} since the last line on this type)" if before else ""
            if isinstance(error, CallerError):
                logger.warning("%s refused a request: %s%s", self._name, described(error), since)
                return error
            # as text: a handler that keeps records would keep the frames of the traceback, and with them model versions
            where = "".join(traceback.format_exception(error)).rstrip()
            logger.error("%s failed: %s%s\n%s", self._name, described(error), since, where)
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
        _deliver(outcome, (None, TimeoutError(f"{self._name}: no answer within callable_timeout={self._timeout} s")))

    async def _contained(self, call: Coroutine[Any, Any, Any], outcome: asyncio.Future[Any]) -> None:
        """Runs a call in a task that raises nothing: asyncio ends its loop where a task raises SystemExit."""
        try:
            _deliver(outcome, (await call, None))
        except BaseException as error:
            stopped = isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration)
            if stopped or not isinstance(error, Exception):
                culprit = stopped and error.__cause__ or error  # Python's RuntimeError for a StopIteration names none
                refused = CallableError(f"{self._name} raised {described(culprit)}")
                refused.__cause__ = error
                error = refused
            _deliver(outcome, (None, error))


def described(error: BaseException) -> str:
    """An error with its type, as the last line of a traceback has it."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


async def _read(stream: Any, arrived: asyncio.Queue[Any]) -> None:
    async with contextlib.aclosing(stream) if hasattr(stream, "aclose") else contextlib.nullcontext(stream):
        async for batch in stream:
            arrived.put_nowait(batch)
            await asyncio.sleep(0)  # a stream that never waits must not hold up the loop


RECENT = 0.1  # weight of the latest call in running means
GROWTH = 1.25
"""The most by which one call makes the time that such a call is expected to take longer: a busy machine stops any thread."""
PAUSE, AFTER_PAUSE = 10.0, 2.0
"""A task that comes `PAUSE` times `on_loop` after the one before may take `AFTER_PAUSE` times `on_loop` on the loop's thread:
its caches are cold, so it takes longer, a thread would have to be woken, and other tasks are unlikely to wait meanwhile."""


class Batcher:
    """Computes tasks: a lone short one on the event loop's thread, all others in the batcher's threads.

    A task has a `future`, which gets the result or the exception that stands for what went wrong with it alone; a `key`: tasks
    of one key can run in one call; and a `shape`: what its time depends on, None where it would wait for more than the device.

    A thread that becomes free takes the task that has waited longest and, up to the largest compiled size, those of the same
    key. So batches form only where tasks have to wait, and a lone task never waits for others. One whose like took at most
    `on_loop` seconds lately, or twice as long where none came for a while, runs on the loop's thread, unless a thread works for
    the same device or two came at once.

    Args:
      config: `on_loop`, and the `batch_size` whose compiled sizes batches have.
      programs: `full`, the least share of a size that must be filled with tasks (the rest is computed for nothing), and the
        `batchers` whose work shares the device, this one among them once it is made.
      prepare: the work of one task on the host. An exception of one concerns that task alone.
      run: `run(tasks, prepared, started)` -> one result for each of the tasks that could be prepared.
    """

    def __init__(
        self, name: str, threads: int, config: ServingConfig, programs: Programs, *, prepare: Callable[[Any], Any],
        run: Callable[[list[Any], list[Any], float], Sequence[Any]],
    ):  # fmt: skip
        self.sizes = batch_sizes(config.batch_size)  # ascending from 1
        self._sharing, self._full = programs.batchers, programs.full
        self._sharing.add(self)
        self.seconds = 0.0  # of a thread that a task took lately, over the number of threads: how fast a queue gets shorter
        self._threads = threads
        self._on_loop = config.on_loop
        self._prepare = prepare
        self._run = run
        self._workers = Workers(name, threads)
        self._waiting: deque[Any] = deque()
        self._lock = threading.Lock()  # of what waits and of the number of threads at work
        self._working = 0
        self._called = False  # whether the loop is about to look at what waits
        self._latest = -math.inf  # when the loop last did, by time.perf_counter
        self._lately: dict[Hashable, float] = {}  # seconds that a lone task of a shape is expected to take

    def submit(self, task: Any) -> None:
        """Computes one task, which is looked at when those of the same turn of the loop are there too."""
        with self._lock:
            self._waiting.append(task)
        if not self._called:
            self._called = True
            task.future.get_loop().call_soon(self._dispatch)

    def close(self) -> None:
        """Ends the threads; waits for the call that each is in. Nothing is left that refers to the owner of the functions."""
        self._workers.close(wait=1.0)
        self._prepare = self._run = _refuse

    def size_for(self, count: int) -> int:
        """The compiled size that takes so many tasks."""
        return next(size for size in self.sizes if size >= count)

    def _dispatch(self) -> None:
        """On the loop: computes a lone short task, or lets threads compute what waits."""
        self._called, before, self._latest = False, self._latest, time.perf_counter()
        paused = self._latest - before >= PAUSE * self._on_loop
        with self._lock:
            alone = len(self._waiting) == 1 and not any(each._working for each in self._sharing)
            longest = self._on_loop * (AFTER_PAUSE if paused else 1.0)
            alone = alone and self._lately.get(self._waiting[0].shape, math.inf) <= longest
            threads = 0 if alone else min(self._threads - self._working, len(self._waiting))
            self._working += threads
            tasks = self._take() if alone else []
        if tasks:
            _hand_out(tasks, self._outcomes(tasks))
        for _ in range(threads):
            self._workers.start(self._work)

    def _work(self) -> None:
        """In a thread: computes until nothing waits; who gets the last answer finds the thread free."""
        tasks = self._next()
        while tasks:
            done, outcomes = tasks, self._outcomes(tasks)
            tasks = self._next()
            post(done[0].future.get_loop(), _hand_out, done, outcomes)

    def _next(self) -> list[Any]:
        with self._lock:
            tasks = self._take()
            self._working -= not tasks
            return tasks

    def _take(self) -> list[Any]:
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

    def _outcomes(self, tasks: list[Any]) -> list[Any]:
        """What came of tasks that run together, and how long that took."""
        started = time.perf_counter()
        outcomes = self._results(tasks, started)
        seconds = time.perf_counter() - started
        self.seconds += RECENT * (seconds / (len(tasks) * self._threads) - self.seconds)
        done = len(tasks) == 1 and not isinstance(outcomes[0], Exception)  # what is refused takes no time
        if done and (shape := tasks[0].shape) is not None:
            self._lately[shape] = min(seconds, GROWTH * self._lately.get(shape, math.inf))
        return outcomes

    def _results(self, tasks: list[Any], started: float) -> list[Any]:
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


def _refuse(*arguments: Any) -> Any:
    raise EngineClosed("the engine is closed")


def _hand_out(tasks: list[Any], outcomes: list[Any]) -> None:
    for task, outcome in zip(tasks, outcomes, strict=True):
        if not task.future.done():
            task.future.set_result(outcome)
