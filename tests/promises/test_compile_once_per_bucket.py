"""Promise: every bucket is compiled once, at warm-up; traffic, index updates and publishes compile nothing more."""

import numpy as np

import aif_jax as aif
from tests.serving_world import World


async def test_every_bucket_is_compiled_once():
    world = World()
    others = [world.other_params(seed) for seed in (1, 2)]
    async with world.engine(buckets=(16, 64)) as engine:
        compiled = world.programs.compiles
        assert dict(compiled) == {"user": 1, "score": 2}
        for count in range(0, 150, 7):
            await engine.rank(aif.Request(user=count, context=world.ids[:count]), 8)
        changed = np.arange(20)
        features = world.take(changed)
        index = world.index
        for _ in range(3):
            index = index.upsert(world.ids[changed], features)
            await engine.update_index(index)
            await engine.rank(1, 8)
        for params in others:
            await engine.publish(aif.Trained(engine.model, params), world.index_of(params))
            await engine.rank(1, 8)
        assert dict(compiled) == {"user": 1, "score": 2}
        grown = world.index_of(others[-1], capacity=1024)
        await engine.update_index(grown)  # other shapes: compiled beside the traffic, before the swap
        assert dict(compiled) == {"user": 1, "score": 4}
        await engine.rank(1, 8)
        assert dict(compiled) == {"user": 1, "score": 4}
