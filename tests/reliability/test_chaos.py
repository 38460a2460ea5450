"""Callables that do their worst under load: errors as documented, counters that add up, an engine that ends on `close`;
then for minutes, with publishes: each request is answered or refused, every answer is right, memory stays flat.
"""

import asyncio
import builtins
import gc
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from aif_jax import Trained
from aif_jax.serving import AsyncPreRanker, CallableError, DeadlineExceeded, EngineClosed, Overloaded, Request, ServingConfig
from tests.reliability import coded
from tests.reliability.sizes import FULL, RUNS, SMOKE, fully, generator, resident

pytestmark = pytest.mark.lane("standing")
K, CLIENTS = 4, 24
RAISED = "out of nothing"
CLASSES = sorted(
    {kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, BaseException)}
    | {asyncio.CancelledError, asyncio.TimeoutError, asyncio.InvalidStateError, asyncio.QueueFull},
    key=lambda kind: kind.__name__,
)
UNICODE = {
    UnicodeDecodeError: ("utf8", b"x", 0, 1, RAISED),
    UnicodeEncodeError: ("utf8", "x", 0, 1, RAISED),
    UnicodeTranslateError: ("x", 0, 1, RAISED),
    ExceptionGroup: (RAISED, [ValueError()]),
    BaseExceptionGroup: (RAISED, [KeyboardInterrupt()]),
}
HANGS = ("waits", "swallows cancellation", "spins", "hangs in its cleanup")


def error_of(kind: type[BaseException]) -> BaseException:
    return kind(*UNICODE.get(kind, (RAISED,)))


class Deeds:
    """What a callable does: `well`, a class to raise, or a hang, longer than any budget or timeout here, not for ever."""

    def __init__(self, seconds: float) -> None:
        self.over = threading.Event()
        self.seconds = seconds

    def plainly(self, deed: Any) -> None:
        if isinstance(deed, type):
            raise error_of(deed)
        if deed == "spins":
            end = time.monotonic() + self.seconds
            while time.monotonic() < end and not self.over.is_set():
                time.sleep(0.01)
        elif deed != "well":
            self.over.wait(self.seconds)

    async def asynchronously(self, deed: Any) -> None:
        if isinstance(deed, type):
            raise error_of(deed)
        end = time.monotonic() + self.seconds
        if deed == "waits":
            await asyncio.sleep(self.seconds)
        elif deed == "spins":
            while time.monotonic() < end and not self.over.is_set():
                await asyncio.sleep(0.001)
        elif deed == "swallows cancellation":
            while time.monotonic() < end and not self.over.is_set():
                try:
                    await asyncio.sleep(0.1)
                except asyncio.CancelledError:
                    pass
        elif deed == "hangs in its cleanup":
            try:
                await asyncio.sleep(self.seconds)
            finally:
                while time.monotonic() < end and not self.over.is_set():
                    await asyncio.sleep(0.05)


def callables(deeds: Deeds, *, plain: bool) -> tuple[Callable, Callable]:
    """`features` and `retrieval`, both async or both not; each follows the request's context (deed, place) for it."""

    def acting(side: str, give: Callable[[Request], Any]) -> Callable:
        async def asynchronous(request: Request) -> Any:
            deed, _ = request.context[side]
            await asyncio.sleep(0)
            await deeds.asynchronously(deed)
            return give(request)

        def function(request: Request) -> Any:
            deed, place = request.context[side]
            if place == "awaited":  # a plain function that returns a coroutine
                return asynchronous(request)
            deeds.plainly(deed)
            return give(request)

        return function if plain else asynchronous

    features = acting("features", lambda asked: coded.user_features(asked.user))
    return features, acting("retrieval", lambda asked: asked.context["ids"])


def refusals(deed: Any) -> tuple[type[BaseException], ...]:
    """Errors that `rank` may raise for what retrieval does, by its documentation."""
    if deed in HANGS:
        return (DeadlineExceeded, TimeoutError)
    if not issubclass(deed, Exception) or deed is StopIteration:
        return (CallableError,)
    return (deed, RuntimeError) if deed is StopAsyncIteration else (deed,)  # Python itself changes that one in a coroutine


async def chaos(
    turns: Iterable[int], rng: np.random.Generator, *, plain: bool = False, timeout: float, memory: list[Any] | None = None
) -> tuple[dict[str, int], AsyncPreRanker]:
    """Clients send a request each turn to callables that misbehave in most of them, and check what comes back.

    A machine that stands still lets calls time out that did not hang: a request is forgiven that where it took `timeout`
    seconds and the loop stood still for a quarter of them. With `memory`, versions are published and the index is updated
    meanwhile, and it gets (seconds, resident bytes) after each publish. Returns what became of the requests, and the closed
    engine.
    """
    deeds, tally, failed = Deeds(seconds=8 * timeout), Counter(), Counter()
    halted = 0.0  # until when the loop last stood still
    features, retrieval = callables(deeds, plain=plain)
    config = ServingConfig(
        buckets=(16, 64), max_k=K, max_pending=CLIENTS - 4, callable_timeout=timeout, max_hung=10**6, reserve=0.02,
        drain_timeout=2.0, cache_bytes=200_000,
    )  # fmt: skip
    index, turns = coded.index(0), iter(turns)
    names, published, over = {index.version: 0}, 0, asyncio.Event()
    left: list[Any] = [rng.permutation(len(CLASSES)), rng.permutation(len(CLASSES))]

    def draw(side: int) -> Any:
        kind = rng.choice(3, p=[0.4, 0.55, 0.05])
        if kind == 0:
            return "well"
        if kind == 2:
            return HANGS[rng.integers(len(HANGS))]
        if not len(left[side]):
            left[side] = rng.permutation(len(CLASSES))
        place, left[side] = left[side][-1], left[side][:-1]  # every class comes before one comes again
        return CLASSES[place]

    async def clock() -> None:
        nonlocal halted
        while not over.is_set():
            before = time.perf_counter()
            await asyncio.sleep(timeout / 20)
            if (now := time.perf_counter()) - before > timeout / 4:
                halted = now

    def stalled(began: float) -> bool:
        return halted > began and time.perf_counter() - began >= timeout

    async def client() -> None:
        for turn in turns:
            place = ("called", "awaited")[rng.integers(2)]
            ids = rng.choice(coded.IDS, rng.integers(2, 40), replace=False)
            context = {"features": (draw(0), place), "retrieval": (draw(1), place), "ids": ids}
            hangs = any(context[side][0] in HANGS for side in ("features", "retrieval"))
            budget = 0.2 if hangs and rng.random() < 0.5 else None
            version = turn if turn % 2 else None
            request = Request(user=int(rng.integers(1, coded.USERS)), feature_version=version, context=context)
            task, began = asyncio.create_task(engine.rank(request, K, budget=budget)), time.perf_counter()
            cancelled = rng.random() < 0.02
            if cancelled:
                await asyncio.sleep(0.001)
                task.cancel()
            try:
                answer = await task
            except Overloaded:
                tally["refused"] += 1
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                assert cancelled and not asyncio.current_task().cancelling()
                tally["cancelled"] += 1
            except BaseException as error:
                deed = context["retrieval"][0]
                late = budget is not None and isinstance(error, DeadlineExceeded)
                late |= isinstance(error, TimeoutError) and stalled(began)
                assert late or deed != "well", f"{context}: {error!r}"
                assert late or isinstance(error, refusals(deed)), f"{context}: {error!r}"
                named = isinstance(deed, str) or RAISED in str(error) or deed.__name__ in str(error)
                assert late or named, f"{context}: {error!r}"
                failed[type(error).__name__] += 1
            else:
                check(answer, request, budget, began)
                tally["degraded" if answer.degraded else "answered"] += 1

    def check(answer: Any, request: Request, budget: float | None, began: float) -> None:
        deed = request.context["features"][0]
        assert request.context["retrieval"][0] == "well", "an answer without candidates"
        number = request.user
        if answer.degraded:
            assert deed != "well" or budget is not None or stalled(began), answer.reason
            assert "user side failed" in answer.reason or "user side late" in answer.reason
            number = request.user if "stale state" in answer.reason else 0
        else:
            assert deed == "well"
        best, code = coded.expected_ranking(number, request.context["ids"], K)
        assert (answer.ids[answer.mask] == best).all() and len(best) == answer.mask.sum()
        version, _, got = coded.parts(answer.logits[answer.mask])
        assert (got == code).all() and names[answer.version] == version

    async def changes() -> None:
        nonlocal published
        while not over.is_set():
            published += 1
            params = coded.params(published % 3)
            index = await asyncio.to_thread(coded.index, published % 3)
            names[index.version] = published % 3
            assert await engine.publish(Trained(engine.model, params), index) == index.version
            for update in range(1, 4):
                await asyncio.sleep(0.2)
                index = await asyncio.to_thread(index.upsert, coded.IDS, coded.item_features(update))
                await engine.update_index(index)
            gc.collect()
            memory.append((time.perf_counter(), resident()))

    engine = AsyncPreRanker(Trained(coded.MODEL, coded.params(0)), index, features=features, retrieval=retrieval, config=config)
    del index
    async with asyncio.timeout(3000):  # of a run that hangs
        async with engine:
            meanwhile = [asyncio.create_task(each()) for each in (clock, changes)[: 1 + (memory is not None)]]
            await asyncio.gather(*[client() for _ in range(CLIENTS)])
            over.set()
            await asyncio.gather(*meanwhile)
            async with asyncio.timeout(10 * timeout):  # without a request, a user side may run on for as long as a call may
                while (metrics := engine.metrics())["gauges"]["user_sides_running"]:
                    await asyncio.sleep(0.01)
            counters = metrics["counters"]
            assert metrics["gauges"]["pending"] == 0
            assert metrics["failed"] == failed, "the engine counts other errors than the callers saw"
            assert counters["answered"] == tally["answered"] + tally["degraded"] > 0
            assert counters.get("degraded", 0) == tally["degraded"] == sum(metrics["degraded"].values()) > 0
            assert counters.get("refused", 0) == tally["refused"] and counters.get("cancelled", 0) == tally["cancelled"]
            assert counters["requests"] == sum(tally.values()) + sum(failed.values())
            assert (counters.get("publishes", 0), counters.get("index_updates", 0)) == (published, 3 * published)
            assert metrics["gauges"]["cached_bytes"] <= 200_000
            # close while calls hang, and one request waits for one
            hanging = {"features": ("well", "called"), "retrieval": ("swallows cancellation", "called"), "ids": coded.IDS}
            waiting = asyncio.create_task(engine.rank(Request(user=1, context=hanging), K))
            await asyncio.sleep(0.01)
        (end,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(end, TimeoutError | EngineClosed), end
        deeds.over.set()
        while threads := [t.name for t in threading.enumerate() if t.name.startswith("aif-")]:
            await asyncio.sleep(0.01)  # a thread that stays fails by the timeout above
            gc.collect()
        assert not threads
    return tally | {"failed": failed.total(), "error classes": len(failed)}, engine


@pytest.mark.parametrize(("sizes", "seed"), RUNS)
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
def test_chaos_of_callables_under_load(plain, sizes, seed):
    rng = generator(f"chaos, {'plain' if plain else 'async'}", seed)
    tally, _ = asyncio.run(chaos(range(sizes.chaos_requests), rng, plain=plain, timeout=0.4 if sizes is SMOKE else 1.0))
    print(f"{len(CLASSES)} exception classes, {len(HANGS)} ways to hang: {dict(tally)}")


def soak(seconds: float, rng: np.random.Generator, timeout: float) -> np.ndarray:
    """Runs the mixture; returns (seconds, resident bytes) over time."""
    end, memory = time.perf_counter() + seconds, list[Any]()
    turns = itertools.takewhile(lambda _: time.perf_counter() < end, itertools.count())
    tally, engine = asyncio.run(chaos(turns, rng, timeout=timeout, memory=memory))
    print(tally)
    assert all(tally[fate] > 0 for fate in ("answered", "degraded", "refused", "failed"))
    gc.collect()
    assert engine.metrics()["gauges"]["versions_in_memory"] == 1
    return np.array(memory)


def test_a_few_seconds_of_everything():
    assert len(soak(SMOKE.soak_seconds, generator("soak", seed=0), 0.4)) > 1


@fully
def test_minutes_of_everything_in_flat_memory():
    memory = soak(FULL.soak_seconds, generator("soak"), 1.0)
    settled = memory[len(memory) // 5 :]
    first, last = (np.median(part[:, 1]) for part in (settled[: len(settled) // 4], settled[-(len(settled) // 4) :]))
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 60 / 1e6
    print(f"resident {first / 1e6:.0f} -> {last / 1e6:.0f} MB, {slope:.2f} MB a minute")
    assert last < 1.05 * first + 8e6, f"resident memory grew from {first / 1e6:.0f} to {last / 1e6:.0f} MB"
