"""A storm of requests over many publishes and index updates: no answer mixes two versions, and every score is right."""

import asyncio
import gc
import time
from collections import Counter

import numpy as np
import pytest

from aif_jax import Trained
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig
from tests.reliability import coded
from tests.reliability.sizes import RUNS, Sizes, generator

pytestmark = pytest.mark.lane("standing")
K, CALLERS = 8, 96
UPDATES = 3  # of the index, after each publish


async def storm(sizes: Sizes, rng: np.random.Generator) -> Counter:
    """Callers ask at once and check every answer, while versions are published and the index is updated."""
    users = [coded.user_features(number) for number in range(coded.USERS)]
    draws = rng.integers(1 << 30, size=(4096, 2))
    # candidates with unknown items and repeated ones among them
    lists = [rng.choice(np.append(coded.IDS, coded.IDS[-1] + np.arange(1, 9)), rng.integers(1, 60)) for _ in range(500)]
    tally: Counter = Counter()
    names: dict[str, int] = {}
    last, coming = [0, 0], [0, 0]  # (version, update) that is served for sure, and that may be

    async def features(request: Request):
        return users[request.user]

    async def retrieval(request: Request):
        ids, late = request.context
        if late:  # time for a publish or an update
            await asyncio.sleep(0.003)
        return ids

    async def caller(number: int) -> None:
        turn = number * 41
        while tally["asked"] < sizes.storm_requests:
            tally["asked"] += 1
            turn += 1
            first, second = draws[turn % len(draws)].tolist()
            user, ids = first % coded.USERS, lists[second % len(lists)]
            # one request in eight shares its state with nobody
            request = Request(user=user, feature_version=None if first % 8 == 0 else 1, context=(ids, second % 16 == 1))
            low = tuple(last)
            if second % 4:
                answer = await engine.rank(request, K)
                best, code = coded.expected_ranking(user, ids, K)
                assert answer.mask.sum() == len(best) and (answer.ids[: len(best)] == best).all()
                assert (answer.ids[len(best) :] == -1).all() and answer.unknown == (coded.codes(user, ids) < 0).sum()
                logits = answer.logits[: len(best)]
            else:
                answer = await engine.score(request, ids)
                code = coded.codes(user, ids)
                assert (answer.mask == (code >= 0)).all() and (answer.logits[~answer.mask] == -np.inf).all()
                code, logits = code[code >= 0], answer.logits[answer.mask]
            assert not answer.degraded and answer.non_finite == 0
            if len(logits):
                version, update, got = coded.parts(logits)
                assert names[answer.version] == version, "the name of another version"
                assert (got == code).all(), "a score of another user or item"
                assert low <= (version, update) <= tuple(coming), f"{(version, update)} is not between {low} and {coming}"
                tally["scores"] += len(logits)
            tally["answers"] += 1

    async def publisher() -> None:
        for version in range(1, sizes.storm_publishes + 1):
            index = await asyncio.to_thread(coded.index, version)
            names[index.version] = version
            while tally["answers"] < version * sizes.storm_requests / (sizes.storm_publishes + 1):
                await asyncio.sleep(0.005)
            coming[:] = version, 0
            assert await engine.publish(Trained(engine.model, coded.params(version)), index) == index.version
            last[:] = version, 0
            for update in range(1, UPDATES + 1):
                index = await asyncio.to_thread(index.upsert, coded.IDS, coded.item_features(update))
                coming[1] = update
                await engine.update_index(index)
                last[1] = update

    first = coded.index(0)
    names[first.version] = 0
    config = ServingConfig(buckets=(16, 64), max_k=K, max_pending=CALLERS, batch_size=4)
    engine = AsyncPreRanker(Trained(coded.MODEL, coded.params(0)), first, features=features, retrieval=retrieval, config=config)
    async with engine:
        compiled = {name: n for name, n in engine.metrics()["counters"].items() if name.startswith("compiled")}
        async with asyncio.TaskGroup() as group:
            group.create_task(publisher())
            for number in range(CALLERS):
                group.create_task(caller(number))
        counters = engine.metrics()["counters"]
        assert {name: counters[name] for name in compiled} == compiled, "a publish compiled again"
        assert counters["requests"] == counters["answered"] == tally["answers"] == sizes.storm_requests
        assert counters["publishes"] == sizes.storm_publishes
        assert counters["index_updates"] == UPDATES * sizes.storm_publishes
        del first
        gc.collect()
        assert engine.metrics()["gauges"]["versions_in_memory"] == 1
    return tally


@pytest.mark.parametrize(("sizes", "seed"), RUNS)
def test_a_storm_of_requests_over_publishes(sizes, seed):
    rng, started = generator("storm", seed), time.perf_counter()
    tally = asyncio.run(storm(sizes, rng))
    seconds = time.perf_counter() - started
    print(
        f"{tally['answers']} requests over {sizes.storm_publishes} publishes and {UPDATES * sizes.storm_publishes} updates, "
        f"{tally['scores']} scores checked, {tally['answers'] / seconds:.0f} requests a second"
    )
