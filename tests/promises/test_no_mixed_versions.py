"""Promise: an answer is of one version; the old one is freed. Under load: `test_service.py`, `reliability/test_storm.py`."""

import asyncio
import dataclasses
import gc
import weakref

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import Trained, export
from tests.refusals import refused
from tests.serving_world import shared


async def test_a_request_ends_on_the_version_it_started_with_and_then_its_memory_goes(world):
    new = world.other_params(1)
    new_index = world.index_of(new)
    begun, go = asyncio.Event(), asyncio.Event()

    async def late():
        begun.set()
        await go.wait()
        yield world.ids[:40]

    async with world.engine(buckets=(64,), index=world.index_of(world.params)) as engine:
        old_name = world.index.version
        old_index = weakref.ref(engine._current.snapshot.index)  # the engine alone holds it
        await engine.rank(aif.Request(user=4, feature_version=1), 8)  # a cached state of the old version
        under_way = asyncio.create_task(engine.rank(aif.Request(user=3, context=late()), 8))
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
    """Not from disk, not by an update."""
    encoder, other = Encoded("a" * 64), Encoded("b" * 64)
    trained = Trained(world.model, world.params, encoder)
    index = aif.ItemIndex.build(trained, [(world.ids, world.features)], batch_size=64, progress=False)
    assert index.version == aif.fingerprint(world.params, world.model.config, encoder) != world.index.version
    index.save(tmp_path / "index")
    assert aif.ItemIndex.load(tmp_path / "index", trained).version == index.version
    for params, used, error in (
        (world.other_params(1), encoder, aif.VersionMismatch),
        (world.params, other, aif.EncodingMismatch),
        (world.params, None, aif.VersionMismatch),
    ):
        trained = Trained(world.model, params, used)
        expected, got = (trained.version, index.version) if used is not other else ("b" * 64, "a" * 64)
        refused(error, f"index in .*: expected .* {expected}, got {got}", aif.ItemIndex.load, tmp_path / "index", trained)
    items = dataclasses.replace(world.take(np.arange(2)), encoding=other.version)
    refused(aif.EncodingMismatch, "ItemFeatures: expected the encoding aaa", index.upsert, world.ids[:2], items)
    assert len(world.index.upsert(world.ids[:2], items)) == len(world.index)  # of a model without an encoder


def test_an_export_takes_no_index_of_another_version(world, tmp_path):
    """`tests/test_export.py` has the features of another encoder."""
    with pytest.raises(aif.VersionMismatch, match="index: expected version"):
        export.save(tmp_path / "model", Trained(world.model, world.other_params(1)), world.index)
    assert not list(tmp_path.iterdir())


class Encoded:
    """What an index reads of an encoder when it gets features."""

    def __init__(self, version):
        self.version, self.schema = version, shared().model.config.schema
