"""What is fitted after training, popularity and co-engagement: by hand, and through index, engine and export."""

import asyncio
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks
from aif_jax.blocks import ItemOffset, PureSvd, popularity_offset, with_table
from aif_jax.blocks.block import ItemView
from aif_jax.checks import VersionMismatch
from aif_jax.data.negatives import counts_before
from aif_jax.serving import ServingConfig
from aif_jax.train.edits import DEVIATION, svd_factors
from aif_jax.train.tasks import NextItem
from tests import demo
from tests.blocks import parts
from tests.refusals import refused

TABLE = np.array([[0, 0], [1, 0], [0, 2], [3, 3]], np.float32)


def offset(data, run, made, users):
    """The same for every user."""
    counts = counts_before(data, run.settings.first_validation)
    assert (counts[1:] == 0).any() and (counts > 5).any()
    return popularity_offset(counts)


def svd_term(data, run, made, users):
    """By the factors of the user's items, the latest first."""
    table, history = np.asarray(made.params["fitted"]["pure_svd"]["table"]), np.asarray(users.history.item)
    history = history[np.asarray(users.history.mask)]
    term = (1.0 + np.arange(len(history))) ** -0.7 @ table[history] @ table.T
    assert np.abs(term).max() > 0.1
    return term


POPULARITY = lambda run, data: run.with_popularity_correction(data), ItemOffset(), offset
ADDED = {"popularity": POPULARITY, "svd": (lambda run, data: run.with_svd(data), PureSvd(), svd_term)}


@pytest.mark.parametrize("name", ADDED)
def test_a_term_is_added_to_every_score_through_index_engine_and_export(data, run, tmp_path, name):
    add, block, term = ADDED[name]
    made = add(run, data)
    assert made.config.blocks == (*run.config.blocks, block)
    users = jax.tree.map(lambda leaf: leaf[0], data.user_features(np.array([25]), length=run.config.history_length))
    items = data.catalogue.features(np.arange(len(data.catalogue)))
    before, after = (np.asarray(jax.jit(one.model.joint)(one.params, users, items)) for one in (run, made))
    np.testing.assert_allclose(after, before + term(data, run, made, users), rtol=1e-5, atol=1e-5)
    index, ids = made.index(data.catalogue, progress=False), np.asarray(data.items.raw)

    async def served(index):
        async with made.serve(index, features=lambda request: users, config=ServingConfig(buckets=(128,))) as engine:
            return (await engine.score(1, ids)).logits

    np.testing.assert_allclose(asyncio.run(served(index)), after[1:], rtol=1e-5, atol=1e-5)
    refused(VersionMismatch, "", asyncio.run, served(run.index(data.catalogue, progress=False)))
    made.export(tmp_path / "export", index=index, platforms=("cpu",))
    assert aif.export.verify(tmp_path / "export")


@pytest.mark.parametrize(("block", "width"), [(ItemOffset(), ()), (PureSvd(width=2), (2,))])
def test_a_table_that_does_not_fit_is_refused(data, run, block, width):
    size = len(data.catalogue), *width
    for table, error, message in (
        (np.zeros((3, *width), np.float32), ValueError, "table: expected shape"),
        (np.full(size, np.nan, np.float32), ValueError, "table: expected finite values"),
        (np.zeros(size), TypeError, "table: expected dtype float32"),
    ):
        refused(error, message, with_table, run.params, table, block, config=run.config)


def half_of(block, params, item: int) -> list | float:
    """The value of an item's half, by its row."""
    config = demo.config(blocks=(block,))
    features = jax.tree.map(lambda leaf: leaf[0], aif.empty_items(config.schema, 1))
    features.ids["item"] = np.int32(item)
    (value,) = block.item(params, ItemView(config=config, params={}, features=features, vector=jnp.zeros(8))).values()
    return value.tolist()


def of(block, half):
    """A state, or rows, of which one block's half is known."""
    return types.SimpleNamespace(blocks={block.name: half})


def test_offsets_of_items_by_hand():
    block, params = ItemOffset(), {"table": jnp.array([-100.0, 0.5, 2.0])}
    offsets = [half_of(block, params, item) for item in (0, 1, 2, 3, -1)]
    assert offsets == [-100.0, 0.5, 2.0, -100.0, -100.0]  # newer ones: as the unknown item
    terms = block.score(params, of(block, {}), of(block, {"offset": jnp.array([0.5, -100.0])}), {})
    assert terms.offset.tolist() == [0.5, -100.0] and terms.pairs == ()


def test_items_without_training_events_may_keep_their_place(data, run):
    catalogue = run.with_popularity_correction(data)
    again = catalogue.with_popularity_correction(data, untrained=None)
    assert again.config == catalogue.config
    wanted = popularity_offset([0, *counts_before(data, run.settings.first_validation)[1:]], untrained=None)
    np.testing.assert_array_equal(again.params["fitted"]["item_offset"]["table"], wanted)


def test_a_corrected_training_is_not_corrected_again(data, run):
    settings = dataclasses.replace(run.settings, task=NextItem(logq_correction=True))
    expected = "with_popularity_correction: expected a NextItem task, not corrected, got NextItem"
    refused(ValueError, expected, dataclasses.replace(run, settings=settings).with_popularity_correction, data)


def test_halves_by_hand():
    block, params = PureSvd(width=2, length=3, decay=1.0), {"table": jnp.array(TABLE)}
    config = demo.config(blocks=(block,))
    half = block.user(params, parts.user(config, [True, True, True, True], item=np.array([1, 2, 9, 3], np.int32)))
    np.testing.assert_allclose(half["sum"], TABLE[1] + TABLE[2] / 2, rtol=1e-6)  # 9 is newer than the fit, 3 is past the length
    gap = parts.user(config, [True, False, True, False], item=np.array([1, 2, 2, 3], np.int32))
    np.testing.assert_allclose(block.user(params, gap)["sum"], TABLE[1] + TABLE[2] / 3, rtol=1e-6)

    assert [half_of(block, params, item) for item in (0, 1, 3, 4, -1)] == [[0, 0], [1, 0], [3, 3], [0, 0], [0, 0]]
    terms = block.score(params, of(block, half), of(block, {"factor": jnp.array(TABLE)}), {})
    np.testing.assert_allclose(terms.offset, TABLE @ half["sum"], rtol=1e-6)
    assert terms.pairs == ()


@pytest.mark.parametrize("users, width", [(40, 5), (6, 64)])  # by iteration, and where the rank is below the width
def test_factors_are_the_leading_singular_vectors(users, width):
    rng, size = np.random.default_rng(3), 30
    user, item = np.sort(rng.integers(0, users, 500)), rng.integers(0, size - 2, 500)
    met = np.zeros((users, size))
    met[user[item > 0], item[item > 0]] = 1
    expected = np.linalg.svd(met, full_matrices=False)[2][:width]
    block = PureSvd(width=width, length=7, decay=0.5)
    factors = svd_factors(user, item, size=size, block=block)
    assert factors.shape == (size, width) and factors.dtype == np.float32
    assert not factors[[0, size - 2, size - 1]].any()  # the unknown item, and those without an event
    similar, wanted = factors @ factors.T, expected.T @ expected
    np.testing.assert_allclose(similar / similar[1, 1], wanted / wanted[1, 1], atol=2e-4)
    terms = []
    for who in range(users):
        last = item[(user == who) & (item > 0)][::-1][:7]
        terms.append((1.0 + np.arange(len(last))) ** -0.5 @ similar[last][:, np.unique(item[item > 0])])
    assert np.std(terms) == pytest.approx(DEVIATION, rel=1e-3)
    np.testing.assert_array_equal(factors, svd_factors(user, item, size=size, block=block))
    repeated = svd_factors(np.repeat(user, 2), np.repeat(item, 2), size=size, block=PureSvd(width=width, length=1))
    once = svd_factors(user, item, size=size, block=PureSvd(width=width, length=1))
    np.testing.assert_allclose(repeated @ repeated.T, once @ once.T, atol=1e-4)  # an event that repeats counts once


def test_factors_of_a_run_are_those_of_its_training_events(data, run):
    block = PureSvd(width=6, length=3)
    params, config = with_table(run.params, np.zeros((len(data.catalogue), 6), np.float32), block, config=run.config)
    made = dataclasses.replace(run, trained=run.trained.replace(model=aif.build(config), params=params)).with_svd(data)
    assert made.config == config  # keeps the block that is there
    before = data.log.time < run.settings.first_validation
    table = svd_factors(data.log.user[before], data.log.item[before], size=len(data.catalogue), block=block)
    np.testing.assert_array_equal(made.params["fitted"]["pure_svd"]["table"], table)
    assert not table[~np.isin(np.arange(len(table)), data.log.item[before])].any() and table.any()
    assert not svd_factors([], [], size=4, block=PureSvd(width=2)).any()
    assert not svd_factors([1, 1], [0, 0], size=4, block=PureSvd(width=2)).any()


def test_a_run_whose_unseen_items_are_the_unknown_one(data, run):
    refused(ValueError, "with_unseen_items: expected a run with id_dropout", run.with_unseen_items, data)
    options = dict(epochs=1, batch_size=64, task=NextItem(negatives=3, evaluated=9), requests=20, k=None, progress=False)
    trained = demo.fit(aif.build(run.config), data, id_dropout=0.3, **options)
    shared = trained.with_unseen_items(data)
    before, after = (np.asarray(one.params["embedding"]["item"]) for one in (trained, shared))
    unseen = ~np.isin(np.arange(len(before)), data.log.item[data.log.time < run.settings.first_validation])
    assert 1 < unseen.sum() < len(unseen) / 2
    np.testing.assert_array_equal(after[unseen], np.broadcast_to(before[0], after[unseen].shape))
    np.testing.assert_array_equal(after[~unseen], before[~unseen])
    assert np.abs(before[0] - np.asarray(run.params["embedding"]["item"])[0]).max() > 1e-3  # the unknown item was trained


@blocks.block
class TwoArrays(blocks.Block):
    """Fits a table, from the items, and something else."""

    table: str = "table"

    def fit(self, items, config, *, seed):
        return {self.table: jnp.asarray(items.ids["category"], jnp.float32), "centres": jnp.ones(3)}


def test_a_table_leaves_the_other_arrays_of_its_block(monkeypatch):
    model, params = demo.build(blocks=(TwoArrays(),))
    table = np.arange(model.config.schema.table_sizes["item"], dtype=np.float32)
    changed, config = with_table(params, table, TwoArrays(), config=model.config)
    assert config == model.config
    np.testing.assert_array_equal(changed["fitted"]["two_arrays"]["table"], table)
    np.testing.assert_array_equal(changed["fitted"]["two_arrays"]["centres"], np.ones(3))
    monkeypatch.setattr(TwoArrays, "fit", lambda self, items, config, *, seed: {"table": np.log1p(items.ids["category"])})
    new, _ = with_table({"fitted": {}}, table, TwoArrays(), config=demo.config(blocks=()))
    np.testing.assert_array_equal(new["fitted"]["two_arrays"]["table"], table)
    monkeypatch.undo()
    monkeypatch.setattr(TwoArrays, "init", lambda self, key, config: {"centres": jnp.ones(2)})
    message = r"two_arrays: expected `init` of other names than `fit`, got \['centres'\]"
    refused(ValueError, message, demo.build, blocks=(TwoArrays(),))
    monkeypatch.undo()
    alone = r"""TwoArrays.fit: expected an array "table", alone where params lack it, got \['centres', 'table'\]"""
    refused(ValueError, alone, with_table, {"fitted": {}}, table, TwoArrays(), config=demo.config(blocks=()))
    other = demo.config(blocks=(TwoArrays("other"),))
    for there in ({}, aif.fit_tables(other, demo.catalogue())):
        expected = r'TwoArrays.fit: expected an array "table", alone where params lack it, got \[\'centres\', \'other\'\]'
        refused(ValueError, expected, with_table, {"fitted": there}, table, other.blocks[0], config=other)
