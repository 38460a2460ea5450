"""Promise: an answer is of one version; the old one is freed. Under load: `test_service.py`, `reliability/test_storm.py`."""

import asyncio
import dataclasses
import gc
import weakref

import numpy as np

import aif_jax as aif
from aif_jax import Trained, export
from tests.refusals import refused


async def test_a_request_ends_on_the_version_it_started_with_and_then_its_memory_goes(world):
    new = world.other_params(1)
    new_index = world.index_of(new)
    begun, go = asyncio.Event(), asyncio.Event()

    async def late(name: str, *_: object) -> None:
        """Holds up the first retrieval alone."""
        if name == "retrieval" and not begun.is_set():
            begun.set()
            await go.wait()

    async with world.engine(buckets=(64,), index=world.index_of(world.params)) as engine:
        old_name = world.index.version
        old_index = weakref.ref(engine._current.compiled.index)  # the engine alone holds it
        await engine.rank(aif.Request(user=4, feature_version=1), 8)  # a cached state of the old version
        engine._wait = late
        under_way = asyncio.create_task(engine.rank(aif.Request(user=3), 8))
        await asyncio.wait_for(begun.wait(), 60)
        await engine.publish(Trained(engine.model, new), new_index)
        assert engine.metrics()["gauges"]["cached_states"] == 0  # their memory is of the old version
        assert (await engine.rank(4, 8)).version == new_index.version
        gc.collect()
        assert old_index() is not None and engine.metrics()["gauges"]["versions_in_memory"] == 2
        go.set()
        answer = await under_way
        assert answer.version == old_name
        logits = world.logits(3, world.ids[:40])
        np.testing.assert_array_equal(answer.ids, world.ids[:40][np.argsort(-logits, kind="stable")[:8]])
        await asyncio.sleep(0.01)
        gc.collect()
        assert engine.metrics()["gauges"]["versions_in_memory"] == 1
        assert old_index() is None


async def test_states_of_an_old_version_are_not_cached_after_a_publish(world):
    new = world.other_params(1)
    new_index = world.index_of(new)
    async with world.engine(buckets=(64,)) as engine:
        engine.feature_delay = 0.1
        under_way = asyncio.create_task(engine.rank(aif.Request(user=3, feature_version=1), 8))
        await asyncio.sleep(0.02)
        await engine.publish(Trained(engine.model, new), new_index)
        await under_way
        assert engine.metrics()["gauges"]["cached_states"] == 0
        engine.feature_delay = 0.0
        answer = await engine.rank(aif.Request(user=3, feature_version=1), 8)
        assert answer.version == new_index.version
        logits = world.logits(3, world.ids[:40], new)
        np.testing.assert_allclose(answer.logits, np.sort(logits)[::-1][:8], rtol=1e-5, atol=1e-5)


def test_an_index_takes_nothing_of_another_version(world, tmp_path):
    """Nor anything of another encoder: `test_one_encoding.py`."""
    world.index.save(tmp_path / "index")
    for params in (world.params, world.other_params(1)):
        trained = Trained(world.model, params)
        if trained.version == world.index.version:
            assert aif.ItemIndex.load(tmp_path / "index", trained).version == trained.version
        else:
            message = f"index in .*: expected .* {trained.version}, got {world.index.version}"
            refused(aif.VersionMismatch, message, aif.ItemIndex.load, tmp_path / "index", trained)
    items = dataclasses.replace(world.take(np.arange(2)), encoding="b" * 64)
    assert len(world.index.upsert(world.ids[:2], items)) == len(world.index)  # of a model without an encoder


def test_an_export_takes_no_index_of_another_version(world, tmp_path):
    """`tests/test_export.py` has the features of another encoder."""
    other = Trained(world.model, world.other_params(1))
    refused(aif.VersionMismatch, "index: expected version", export.save, tmp_path / "model", other, world.index)
    assert not list(tmp_path.iterdir())
