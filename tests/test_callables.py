"""What `features` and `retrieval` may do to an engine; all that they may raise: `tests/reliability/test_chaos.py`."""

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from aif_jax.serving import CallableError, DeadlineExceeded, Request, ServingConfig, callables
from aif_jax.serving.callables import TimeLimitedCall
from aif_jax.serving.metrics import prometheus_text
from tests.refusals import refused_later
from tests.serving_world import until


async def test_a_failing_callable_leaves_its_type_in_answer_metrics_and_log(world, caplog, monkeypatch):
    """One line for each type and minute, without the user; the counters have all."""
    turns = iter(range(100))

    def features(request):
        if next(turns) < 4:
            raise KeyError("a column")
        return {"no": "features"}

    async with world.engine_of(features, lambda request: world.ids[:40]) as engine:
        answers = [await engine.rank(Request(user=f"secret-{n}"), 5, budget=20.0) for n in range(6)]
        assert all("user side failed: KeyError: 'a column'; answered" in answer.reason for answer in answers[:4])
        kind = answers[4].reason.split("user side failed: ")[1].split(":")[0]
        assert kind.endswith("Error") and kind != "KeyError"
        assert engine.metrics()["callable_errors"] == {"features KeyError": 4, f"features {kind}": 2}
        lines = [record for record in caplog.records if record.name == "aif_jax.serving.callables"]
        assert [record.getMessage().splitlines()[0].split(": ")[1] for record in lines] == ["KeyError", kind]
        assert "Traceback" in lines[0].getMessage() and "secret" not in caplog.text
        assert 'aif_callable_errors_total{reason="features KeyError"} 4.0' in prometheus_text(engine.metrics())
        monkeypatch.setattr(callables, "QUIET", 0.0)
        await engine.rank("late", 5, budget=20.0)
        assert f"features failed: {kind}" in caplog.text and "(2 since the last line on this type)" in caplog.text


async def test_plain_callables_that_never_return_are_replaced_and_left_behind(world):
    release, hanging = threading.Event(), set(range(40))

    def features(request):
        if request.user in hanging:
            release.wait(30)
        return world.user(3)

    async with world.engine_of(features, lambda request: world.ids[:40], reserve=0.5) as engine:
        for start in range(0, 40, 8):
            answers = await asyncio.gather(*[engine.rank(user, 5, budget=1.0) for user in range(start, start + 8)])
            assert all("user side late" in answer.reason for answer in answers)
            await engine._users.running.close()  # the computations of those that were only late
        assert engine.metrics()["gauges"]["hung_calls"] == 40
        assert not (await engine.rank(99, 5)).degraded
        release.set()
        await until(lambda: not engine.metrics()["gauges"]["hung_calls"])
        assert not (await engine.rank(98, 5)).degraded
        await until(lambda: not any(thread.name.startswith("aif-features") for thread in threading.enumerate()))


async def test_calls_are_refused_while_too_many_hang(world):
    release = threading.Event()
    retrieve = lambda request: release.wait(30) if request.context else world.ids[:40]  # noqa: E731
    async with world.engine_of(lambda request: world.user(3), retrieve, max_hung=3) as engine:
        while engine.metrics()["gauges"]["hung_calls"] < 3:  # a call that ends before it has a thread does not count
            await refused_later(DeadlineExceeded, "^retrieval", engine.rank(Request(user=3, context=True), 5, budget=0.05))
            await asyncio.sleep(0)
        await refused_later(CallableError, "retrieval: 3 calls have not returned, as many as max_hung", engine.rank(3, 5))
        release.set()
        await until(lambda: not engine.metrics()["gauges"]["hung_calls"])
        assert (await engine.rank(3, 5)).mask.all()


@pytest.mark.parametrize("where", ["features", "retrieval"])
async def test_an_answer_leaves_at_its_deadline_whatever_refuses_to_be_cancelled(world, where):
    ended, release = [], asyncio.Event()

    async def stubborn():
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        ended.append(where)

    async def features(request):
        await (stubborn() if where == "features" else asyncio.sleep(0))
        return world.user(3)

    async def retrieval(request):
        await (stubborn() if where == "retrieval" else asyncio.sleep(0))
        return world.ids[:40]

    async with world.engine_of(features, retrieval, reserve=0.5) as engine:
        try:
            assert "late" in (await engine.rank(3, 5, budget=1.0)).reason and where == "features"
        except DeadlineExceeded as error:
            assert where != "features" and str(error).startswith("retrieval")
        assert not ended  # it is still at it
        await engine.close()
        assert not ended
    release.set()
    await until(lambda: ended == [where])


async def test_a_call_that_takes_longer_than_its_timeout_is_given_up(world):
    async def slow(request):
        await asyncio.sleep(30)

    async with world.engine_of(slow, lambda request: world.ids[:40], callable_timeout=0.05) as engine:
        first = asyncio.create_task(engine.rank(3, 5))
        await asyncio.sleep(0.02)  # the timer of the first call watches the second one too
        for answer in (await engine.rank(3, 5), await first):
            assert "user side failed: DeadlineExceeded: features: no answer within callable_timeout=0.05 s" in answer.reason
    for retrieval in (slow, lambda request: time.sleep(0.3)):
        async with world.engine_of(lambda request: world.user(3), retrieval, callable_timeout=0.05) as engine:
            await refused_later(DeadlineExceeded, "retrieval: no answer within callable_timeout=0.05 s", engine.rank(3, 5))


def test_a_process_ends_although_calls_never_return(python):
    code = """
import asyncio, time
from aif_jax.serving import ServingConfig
from aif_jax.serving.callables import TimeLimitedCall
from aif_jax.serving.metrics import prometheus_text

async def main():
    call = TimeLimitedCall("features", lambda request: time.sleep(600), ServingConfig(callable_timeout=0.05))
    while call.hung < 5:  # a call that ends before it has a thread does not count
        try:
            await call(None)
        except TimeoutError as error:
            await asyncio.sleep(0.01)
            print(error, call.hung)

asyncio.run(main())
"""
    assert "features: no answer within callable_timeout=0.05 s 5" in python(code, timeout=60)


async def test_a_coroutine_that_comes_too_late_is_closed(recwarn):
    hold = threading.Event()

    async def answer():
        return 1

    def slow(request):
        hold.wait(20)
        return answer()

    call = TimeLimitedCall("features", slow, ServingConfig(callable_timeout=0.05))
    while not call.hung:  # a thread may come to it too late
        await refused_later(TimeoutError, "", call(1))
        await asyncio.sleep(0)  # the call learns that it was given up
    assert call.hung == 1
    hold.set()
    await until(lambda: not call.hung)
    gc.collect()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]
