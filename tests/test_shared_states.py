"""The state cache that replicas share: a state is computed once, a store that fails costs time and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest

from aif_jax import Trained
from aif_jax.connectors import ValkeyStates
from aif_jax.serving import Request, ServingConfig, StateKey
from tests import servers, serving_world
from tests.serving_world import Engine

pytestmark = pytest.mark.usefixtures("light_compilation")


def engine(store, **changes) -> Engine:
    """An engine of the shared world over a store."""
    world = serving_world.shared()
    made = world.engine(**changes)
    made._users._store = store
    return made


async def settled(one: Engine) -> None:
    """Waits until the engine's states are in the store."""
    for _ in range(500):
        if not one._users._putting:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("states are still on their way")


def with_client(url: str, test) -> None:
    from redis import asyncio as redis

    async def run() -> None:
        async with redis.Redis.from_url(url) as client:
            await client.flushall()
            await test(client)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_second_replica_reads_what_the_first_computed(valkey_url):
    async def test(client) -> None:
        stores = [ValkeyStates(client, timeout=5.0) for _ in range(2)]
        async with engine(stores[0]) as first, engine(stores[1]) as second:
            request = Request(user=3, feature_version=17)
            expected = await first.rank(request, 5)
            await settled(first)
            got = await second.rank(request, 5)
            assert second.fetched == [] and len(first.fetched) == 1
            np.testing.assert_array_equal(got.logits, expected.logits)
            assert not got.degraded and "shared" in got.stages and got.state_age >= expected.state_age
            await second.rank(request, 5)  # from its own cache now
            counters = second.metrics()["counters"]
            assert (counters["shared_hits"], counters["cache_hits"]) == (1, 1)
            await second.rank(Request(user=3, feature_version=18), 5)  # newer features
            await second.rank(Request(user="3", feature_version=17), 5)  # another user
            await second.rank(Request(user=3), 5)  # of no known version: never shared
            assert second.fetched == [3, "3", 3]
            await settled(second)
        assert stores[0].counters["written"] == 1 and stores[1].counters["written"] == 2

    with_client(valkey_url, test)


def test_states_of_another_model_are_not_read(valkey_url):
    async def test(client) -> None:
        world = serving_world.shared()
        async with engine(ValkeyStates(client, timeout=5.0)) as first:
            await first.rank(Request(user=3, feature_version=1), 5)
            await settled(first)
            params = world.other_params(1)
            await first.publish(Trained(first.model, params), world.index_of(params))
            after = await first.rank(Request(user=3, feature_version=1), 5)
            assert len(first.fetched) == 2
            best = np.sort(world.logits(3, world.ids[:40], params))[::-1][:5]
            np.testing.assert_allclose(after.logits, best, rtol=1e-4, atol=1e-5)
            await settled(first)

    with_client(valkey_url, test)


@pytest.mark.parametrize("change", ["torn", "altered", "foreign", "another layout", "old"])
def test_damaged_and_old_states_are_computed_again(valkey_url, change):
    async def test(client) -> None:
        async with engine(ValkeyStates(client, timeout=5.0)) as first:
            expected = await first.rank(Request(user=3, feature_version=1), 5)
            await settled(first)
        (key,) = await client.keys()
        value = await client.get(key)
        store = ValkeyStates(client, timeout=5.0)
        state_key = StateKey(3, 1, expected.version)
        body = await store.get(state_key)
        if change == "another layout":
            await store.put(state_key, body[:8] + b"01234567" + body[16:])
        elif change == "old":
            await store.put(state_key, np.float64(time.time() - 7200).tobytes() + body[8:])
        else:
            await client.set(key, {"torn": value[:-3], "altered": value[:-1] + b"x", "foreign": b"?"}[change])
        async with engine(store) as second:
            got = await second.rank(Request(user=3, feature_version=1), 5)
            assert second.fetched == [3] and not got.degraded
            np.testing.assert_array_equal(got.logits, expected.logits)
            await settled(second)

    with_client(valkey_url, test)


def test_a_store_that_hangs_or_fails_costs_time_alone(valkey_url):
    async def test(client) -> None:
        class Broken:
            async def get(self, key):
                raise ConnectionError("gone")

            async def put(self, key, state):
                raise ConnectionError("gone")

        async with engine(Broken()) as one:
            assert not (await one.rank(Request(user=3, feature_version=1), 5)).degraded
            await settled(one)
            assert one.metrics()["counters"]["shared_failed"] == 2
        slow = ValkeyStates(client, timeout=0.02)
        async with engine(slow) as one:
            await client.execute_command("CLIENT", "PAUSE", "500")
            assert not (await one.rank(Request(user=4, feature_version=1), 5)).degraded
            await settled(one)
        assert slow.counters["timeouts"] == 2

    with_client(valkey_url, test)


def test_a_server_that_dies_costs_time_alone():
    """The replica computes what it would have read, and goes on without the server."""
    from redis import asyncio as redis

    async def test() -> None:
        with contextlib.ExitStack() as server:
            client = redis.Redis.from_url(server.enter_context(servers.valkey()))
            store, request = ValkeyStates(client, timeout=5.0), Request(user=3, feature_version=1)
            async with client, engine(store) as first, engine(store) as second:
                expected = await first.rank(request, 5)
                await settled(first)
                server.close()
                got = await second.rank(request, 5)
                await settled(second)
                np.testing.assert_array_equal(got.logits, expected.logits)
                assert not got.degraded and second.fetched == [3]
            assert store.counters == {"misses": 2, "written": 1, "failed": 2}

    asyncio.run(asyncio.wait_for(test(), 120))


def test_states_are_bounded_in_size_and_time(valkey_url):
    async def test(client) -> None:
        store, key = ValkeyStates(client, timeout=5.0, seconds=0.05, most_bytes=10), StateKey(1, 2, "v")
        await store.put(key, b"x" * 11)
        assert await store.get(key) is None and store.counters["too_large"] == 1
        await store.put(key, b"x" * 10)
        assert await store.get(key) == b"x" * 10
        await asyncio.sleep(0.1)
        assert await store.get(key) is None
        assert dict(store.counters) == {"too_large": 1, "misses": 2, "written": 1, "hits": 1}

    with_client(valkey_url, test)


def test_the_engine_takes_a_store():
    world = serving_world.shared()
    store = ValkeyStates(None)
    from aif_jax.serving import AsyncPreRanker

    made = AsyncPreRanker(
        Trained(world.model, world.params), world.index, features=world.user, config=ServingConfig(), states=store
    )
    assert made._users._store is store
