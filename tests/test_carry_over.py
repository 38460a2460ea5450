"""A model under the vocabularies of newer data: ids come and go, and nothing of an id stays at a row that another one gets."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks
from aif_jax.checks import EncodingMismatch
from aif_jax.encoding.vocabulary import new_rows
from aif_jax.index import ItemIndex
from aif_jax.train.edits import carry_over
from tests import demo
from tests.light import lightly_compiled
from tests.own_block import Decay
from tests.refusals import refused

pytestmark = pytest.mark.lane("standing")
COLUMNS = aif.Columns(
    content="embedding", user_id=True, item_attributes=("brand",), action="event", actions=("view", "buy"), scale=False
)
RAW = {item: ("tea" if item < 6 else "cup", "acme" if item % 2 else "zen") for item in (1, 2, 3, 4, 5, 6, 60, 61)}
RAW |= {60: ("pot", "acme"), 61: ("tea", "new brand")}
BASE = 1_700_000_000


def items_of(names):
    embedding = [np.random.default_rng(name).normal(size=6).tolist() for name in names]
    parts = {"category": [RAW[name][0] for name in names], "brand": [RAW[name][1] for name in names]}
    return {"item": list(names), "embedding": embedding} | parts


def events_of(day, users, names):
    pairs = [(user, item) for user in users for item in names]
    time = [BASE + 1000 * day + 3 * place for place in range(len(pairs))]
    event = ["view", "buy"] * len(pairs)
    return {"user": [u for u, _ in pairs], "item": [i for _, i in pairs], "time": time, "event": event[: len(pairs)]}


DAYS = (events_of(0, ["ann", "bob", "cem"], [1, 2, 3, 4, 5, 6]), events_of(1, ["ann", "bob", "dan"], [1, 2, 3, 4, 5, 60, 61]))
CATALOGUES = (items_of([1, 2, 3, 4, 5, 6]), items_of([1, 2, 3, 4, 5, 60, 61]))
KINDS = (blocks.MatchingStatistics(("item", "category")), blocks.LshDin(), Decay())


def model_of(encoder, data, seed=0):
    sizes = dict(width=8, short_length=4, long_length=8, towers=(8,), head=aif.heads.Mlp((8,)))
    config = aif.Config(schema=data.schema, blocks=KINDS, **sizes)
    params = demo.init(aif.build(config), seed, items=data.catalogue)
    rng = np.random.default_rng(seed)
    size = len(encoder.vocabularies["item"])
    for block, width in ((blocks.PureSvd(width=3), (3,)), (blocks.ItemOffset(), ())):
        params, config = blocks.with_table(params, rng.normal(size=(size, *width)).astype(np.float32), block, config=config)
    return aif.Trained(aif.build(config), params, encoder.with_length(config.history_length))


@pytest.fixture(scope="module")
def world():
    """A model of the first day, the encoder and the data of the second."""
    with lightly_compiled(keep=True):
        days = zip(DAYS, CATALOGUES, strict=True)
        old_data, data = (aif.read(day, items=items, columns=COLUMNS, progress=False) for day, items in days)
        before = model_of(old_data.encoder, old_data)
        yield types.SimpleNamespace(before=before, encoder=data.encoder, data=data, old_data=old_data)


def rows_at(tree, name, size):
    """Leaves of a tree that have a row for each of a vocabulary: path to array."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {path: leaf for path, leaf in flat if np.shape(leaf)[:1] == (size,) and (name == "item" or name in str(path))}


def scrambled(world, seed):
    """The model before, with other values in everything that stands at the rows that lose their id."""
    rng, trained = np.random.default_rng(seed), world.before
    params = jax.tree.map(np.array, trained.params)
    old, new = trained.encoder.vocabularies, world.encoder.vocabularies
    for name in ("item", "category", "brand", "user"):
        gone = np.flatnonzero(new_rows(old[name], new[name]) < 0)
        table = params["embedding"][name]
        table[gone] = rng.normal(size=table[gone].shape)
    gone = np.flatnonzero(new_rows(old["item"], new["item"]) < 0)
    for leaf in jax.tree.leaves(params["fitted"]):
        if len(leaf) == len(old["item"]):
            leaf[gone] = rng.integers(0, 2, leaf[gone].shape).astype(leaf.dtype)
    return trained.replace(params=jax.tree.map(jnp.asarray, params))


def test_nothing_of_an_id_stays_at_a_row_that_another_one_gets(world):
    """Two models that differ only in what stood at the rows of ids that went are one model after these went."""
    models = [world.before, scrambled(world, 1), scrambled(world, 2)]
    assert len({each.version for each in models}) == 3
    after = [carry_over(each, world.encoder, key=jax.random.key(3)) for each in models]
    assert len({each.version for each in after}) == 1
    old, new = world.before.encoder.vocabularies["item"], world.encoder.vocabularies["item"]
    row = int(old.encode([6])[0])
    assert row == new.encode([60])[0]  # 6 is gone, a new item has its row
    place = new_rows(old, new)
    kept = np.flatnonzero(place >= 0)
    params, result = world.before.params, after[0].params
    fitted = rows_at(result["fitted"], "item", len(new))
    # the category, the signatures, what `Decay` fits, SVD factors, the correction
    assert len(fitted) == 5, sorted(map(str, fitted))
    before = rows_at(params["fitted"], "item", len(old))
    for path, values in fitted.items():
        np.testing.assert_array_equal(values[row], values[0])
        if "fields" not in str(path):
            np.testing.assert_array_equal(values[place[kept]], before[path][kept])
    table, then = result["embedding"]["item"], params["embedding"]["item"]
    np.testing.assert_array_equal(table[place[kept]], then[kept])
    assert not np.isin(np.asarray(table[row]), np.asarray(then)).any() and np.isfinite(table).all()
    categories = world.before.encoder.vocabularies["category"], world.encoder.vocabularies["category"]
    cup = int(categories[0].encode(["cup"])[0])
    assert cup == categories[1].encode(["pot"])[0]  # a field's row gets another value too
    assert not (np.asarray(result["fitted"]["fields"]["category"]) == cup).any()
    # fitted again on the new catalogue, the row has the new item's values, as in a model that never knew the old one
    again = aif.fit_tables(after[0].config, world.data.catalogue)
    assert again["fields"]["category"][new.encode([60])[0]] == cup
    signature = again["signatures_64"]["table"]
    assert (signature[row] != params["fitted"]["signatures_64"]["table"][row]).any()


def test_indexes_of_the_model_before_are_refused(world, tmp_path):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    refused(EncodingMismatch, "", ItemIndex.build, after, world.old_data.catalogue, progress=False)
    ItemIndex.build(world.before, world.old_data.catalogue, progress=False).save(tmp_path / "index")
    refused(ValueError, "expected config and schema of the model, got others", ItemIndex.load, tmp_path / "index", after)
    assert len(ItemIndex.build(after, world.data.catalogue, progress=False)) == 7


def test_a_history_with_an_item_that_went_meets_no_newcomer(world):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    scores, candidates = [], world.data.catalogue.features(world.encoder.vocabularies["item"].encode([60, 61, 1]))
    for item in (6, 777, 60):
        events = {"item": [item, 2], "time": [BASE, BASE + 5], "event": ["buy", "view"]}
        user = after.encoder.user({"user": "ann"}, events, BASE + 2000)
        scores.append(np.asarray(jax.jit(after.model.joint)(after.params, user, candidates)))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()


def test_other_encoders_are_refused(world):
    other = aif.read(DAYS[1], items=CATALOGUES[1], columns=dataclasses.replace(COLUMNS, scale=True), progress=False)
    refused(ValueError, "columns, actions and scales", carry_over, world.before, other.encoder, key=jax.random.key(0))
