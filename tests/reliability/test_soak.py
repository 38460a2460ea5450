"""Minutes of everything at once: slow, failing, hanging and cancelled calls, overload, publishes and index updates.

Every request is answered or refused, every answer is right, and memory stays flat.
"""

import asyncio
import gc
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from aif_jax import Trained
from aif_jax.serving import AsyncPreRanker, CallableError, DeadlineExceeded, Overloaded, Request
from tests.reliability.sizes import FULL, SMOKE, generator
from tests.serving_world import in_batches, shared

USERS, K = 12, 8
REFUSALS = ("DeadlineExceeded", "ShardDown", "CallableError")


class FeatureStoreDown(OSError):
    """What failing features raise."""


class ShardDown(OSError):
    """What failing retrieval raises."""


async def soak(seconds: float, rng: np.random.Generator, clients: int = 12) -> tuple[Counter, np.ndarray, AsyncPreRanker]:
    """Runs the mixture; returns what became of the requests, (seconds, resident bytes) over time, and the closed engine."""
    world = shared()
    versions = {}
    for seed in range(3):
        params = world.params if seed == 0 else world.other_params(seed)
        versions[world.index_of(params).version] = params
    expected = {
        (name, user): world.logits(user, world.ids, params) for name, params in versions.items() for user in range(USERS)
    }
    outcome: Counter = Counter()
    resident: list[tuple[float, int]] = []

    async def features(request):
        await asyncio.sleep(rng.choice([0.0, 0.002, 0.15], p=[0.5, 0.45, 0.05]))
        if rng.random() < 0.05:
            raise FeatureStoreDown("feature store is down")
        if rng.random() < 0.02:
            raise SystemExit("features want the process to end")
        if rng.random() < 0.01:
            await stubborn()
        return world.user(request.user)

    async def stubborn():
        for _ in range(5):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                pass

    async def retrieval(request):
        await asyncio.sleep(rng.choice([0.0, 0.003, 0.3], p=[0.5, 0.45, 0.05]))
        if rng.random() < 0.05:
            raise ShardDown("a shard is down")
        if rng.random() < 0.02:
            raise KeyboardInterrupt
        if rng.random() < 0.2:
            return in_batches(*np.array_split(world.ids[request.context], 3), seconds=0.001)
        return world.ids[request.context]

    def check(answer, request):
        logits = expected[answer.version, request.user][request.context]
        if answer.reason is not None and "unknown user" in answer.reason:
            assert np.isfinite(answer.logits[answer.mask]).all()
            return
        best = np.argsort(-logits, kind="stable")[:K]
        np.testing.assert_allclose(answer.logits[: len(best)], logits[best], rtol=1e-4, atol=1e-4)

    async def client(engine, number):
        at = 0
        while time.perf_counter() < end:
            at += 1
            rows = rng.choice(len(world.ids), rng.integers(0, 120), replace=False)
            request = Request(user=int(rng.integers(USERS)), feature_version=at // 5 if number % 2 else None, context=rows)
            task = asyncio.create_task(engine.rank(request, K, budget=0.1 if rng.random() < 0.7 else None))
            if rng.random() < 0.05:
                await asyncio.sleep(0.002)
                task.cancel()
            try:
                answer = await task
            except (Overloaded, DeadlineExceeded, ShardDown, CallableError) as error:
                outcome[type(error).__name__] += 1
                assert str(error)
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                outcome["cancelled"] += 1
            else:
                outcome["degraded" if answer.degraded else "answered"] += 1
                assert answer.degraded == bool(answer.reason)
                check(answer, request)

    async def changes(engine):
        names = list(versions)
        at = 0
        while time.perf_counter() < end:
            at += 1
            params = versions[names[at % len(names)]]
            index = world.index_of(params)
            assert await engine.publish(Trained(engine.model, params), index) == names[at % len(names)]
            for _ in range(3):
                await asyncio.sleep(0.2)
                rows = rng.choice(len(world.ids), 10, replace=False)
                # the same features again: rows move in the table, scores stay
                index = await asyncio.to_thread(index.upsert, world.ids[rows], world.take(rows))
                await engine.update_index(index)
            gc.collect()
            resident.append((time.perf_counter(), resident_bytes()))

    async with world.engine_of(features, retrieval, max_k=K, max_pending=10, cache_bytes=200_000) as engine:
        end = time.perf_counter() + seconds
        await asyncio.gather(changes(engine), *[client(engine, number) for number in range(clients)])
    return outcome, np.array(resident), engine


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_accounts(outcome: Counter, engine: AsyncPreRanker) -> None:
    """Every request has one fate, the engine counted it as the clients did, and nothing is left behind."""
    metrics = engine.metrics()
    counters, gauges = metrics["counters"], metrics["gauges"]
    assert counters["answered"] == outcome["answered"] + outcome["degraded"] > 0
    assert counters["degraded"] == outcome["degraded"] == sum(metrics["degraded"].values()) > 0
    assert counters["refused"] == outcome["Overloaded"] > 0
    assert metrics["failed"] == {name: outcome[name] for name in REFUSALS if outcome[name]}
    fates = counters["answered"] + counters["refused"] + counters["cancelled"] + sum(metrics["failed"].values())
    assert counters["requests"] == fates
    assert gauges["pending"] == gauges["user_sides_running"] == 0
    assert gauges["cached_bytes"] <= 200_000
    gc.collect()
    assert engine.metrics()["gauges"]["versions_in_memory"] == 1


def test_a_few_seconds_of_everything():
    outcome, _, engine = asyncio.run(soak(SMOKE.soak_seconds, generator("soak", seed=0)))
    check_accounts(outcome, engine)


@pytest.mark.reliability
@pytest.mark.timeout(3600)
def test_minutes_of_everything_in_flat_memory():
    outcome, resident, engine = asyncio.run(soak(FULL.soak_seconds, generator("soak")))
    check_accounts(outcome, engine)
    settled = resident[len(resident) // 5 :]
    first, last = (np.median(part[:, 1]) for part in (settled[: len(settled) // 4], settled[-(len(settled) // 4) :]))
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 60 / 1e6
    print(f"{dict(outcome)}; resident {first / 1e6:.0f} -> {last / 1e6:.0f} MB, {slope:.2f} MB a minute")
    assert last < 1.05 * first + 8e6, f"resident memory grew from {first / 1e6:.0f} to {last / 1e6:.0f} MB"
