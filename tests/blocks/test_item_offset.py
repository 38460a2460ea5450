"""The offset of items: by hand, and from a trained run through index, engine and export."""

from __future__ import annotations

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import ItemOffset, popularity_offset
from aif_jax.blocks.block import ItemView
from aif_jax.data.candidates import counts_before
from aif_jax.store.version import VersionMismatch
from aif_jax.train.tasks import NextItem
from tests import demo
from tests.blocks import parts

pytestmark = pytest.mark.usefixtures("light_compilation")


def test_by_hand():
    block, params = ItemOffset(), {"table": jnp.array([-100.0, 0.5, 2.0])}
    config = demo.config(blocks=(block,))

    def row(item: int) -> float:
        features = jax.tree.map(lambda leaf: leaf[0], aif.empty_items(config.schema, 1))
        features.ids["item"] = np.int32(item)
        return float(block.item(params, ItemView(config=config, params={}, features=features, vector=jnp.zeros(8)))["offset"])

    assert [row(item) for item in (0, 1, 2, 3, -1)] == [-100.0, 0.5, 2.0, -100.0, -100.0]  # newer ones: as the unknown item
    terms = block.score(params, parts.state(block, {}), parts.rows(block, {"offset": jnp.array([0.5, -100.0])}), {})
    assert terms.logit.tolist() == [0.5, -100.0] and terms.pairs == ()


def test_offsets_by_popularity():
    np.testing.assert_allclose(popularity_offset([3, 1, 16], power=0.5), np.log([3, 1, 16]) / 2, rtol=1e-6)
    assert popularity_offset([0, 2]).dtype == np.float32


def test_a_run_for_the_catalogue_adds_the_offset_to_every_score(data, run):
    catalogue = run.with_popularity_correction(data)
    counts = counts_before(data, run.settings.first_validation)
    offset = popularity_offset(counts)
    assert (counts[1:] == 0).any() and (counts > 5).any()
    assert catalogue.config.blocks == (*run.config.blocks, ItemOffset())
    rows = np.arange(len(data.catalogue))
    items = data.catalogue.features(rows)
    users = jax.tree.map(lambda leaf: leaf[0], data.user_features(np.array([300]), length=run.config.history_length))
    before, after = (np.asarray(jax.jit(one.model.joint)(one.params, users, items)) for one in (run, catalogue))
    np.testing.assert_allclose(after, before + offset, rtol=1e-6, atol=1e-5)
    again = catalogue.with_popularity_correction(data, untrained=None)
    assert again.config == catalogue.config
    np.testing.assert_array_equal(again.params["fitted"]["item_offset"]["table"], popularity_offset(counts, untrained=None))


def test_index_engine_and_export_have_the_offset(data, run, tmp_path):
    catalogue = run.with_popularity_correction(data)
    index, old = catalogue.index(data.catalogue, progress=False), run.index(data.catalogue, progress=False)
    ids, encode = np.asarray(data.items.raw), data.encoder.with_length(run.config.history_length)

    async def scores(one, index):
        engine = one.serve(index, features=lambda request: encode(request.user, None, now=10**9))
        async with engine:
            return (await engine.score(int(np.asarray(data.users.raw)[0]), ids)).logits

    offset = popularity_offset(counts_before(data, run.settings.first_validation))
    plain, shifted = asyncio.run(scores(run, old)), asyncio.run(scores(catalogue, index))
    np.testing.assert_allclose(shifted, plain + offset[1:], rtol=1e-6, atol=1e-5)
    with pytest.raises(VersionMismatch):
        asyncio.run(scores(catalogue, old))
    catalogue.export(tmp_path / "export", index=index)
    assert aif.export.verify(tmp_path / "export", trusted=True)


def test_what_an_offset_does_not_fit_is_refused(data, run):
    params, config = run.params, run.config
    with pytest.raises(ValueError, match="table: expected shape"):
        aif.blocks.with_item_offset(params, np.zeros(3, np.float32), config=config)
    with pytest.raises(ValueError, match="table: expected finite values"):
        aif.blocks.with_item_offset(params, np.full(len(data.catalogue), np.inf, np.float32), config=config)
    with pytest.raises(TypeError, match="table: expected dtype float32"):
        aif.blocks.with_item_offset(params, np.zeros(len(data.catalogue)), config=config)
    corrected = NextItem(negatives=3, evaluated=9, logq_correction=True)
    model = aif.build(config)
    trained = aif.fit(model, data, batch_size=64, task=corrected, requests=20, k=None, progress=False)
    with pytest.raises(
        ValueError, match="with_popularity_correction: expected a NextItem task with candidates by popularity, not corrected"
    ):
        trained.with_popularity_correction(data)
