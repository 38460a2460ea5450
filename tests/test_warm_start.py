"""A model under the vocabularies of newer data: ids come and go, rows follow ids, and nothing of an id that went stays."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks
from aif_jax.blocks import Block, LshDin
from aif_jax.checks import EncodingMismatch, VersionMismatch
from aif_jax.encoding.vocabulary import new_rows
from aif_jax.index import ItemIndex
from aif_jax.refreshing import warm_start, with_served_vocabulary
from aif_jax.train.edits import carry_over, grow_vocabulary
from tests import demo
from tests.light import lightly_compiled
from tests.own_block import Decay
from tests.refusals import refused

ITEMS = 50
ATTRIBUTES = aif.Attribute(name="item", size=ITEMS), aif.Attribute(name="category", size=6)
SCHEMA = aif.Schema(item_attributes=ATTRIBUTES, user_attributes=(aif.Attribute(name="gender", size=3),), content=12)
CONFIG = aif.Config(schema=SCHEMA, width=8, blocks=(LshDin(), Decay()))


@blocks.block
class Codes(Block):
    """Fits an array of its own length next to one with a row for each item."""

    per_item = ("of/code",)


def catalogue(raw):
    """Categories and content that depend on the raw id alone."""
    raw = np.asarray(raw)
    content = np.stack([np.random.default_rng(number).normal(size=12) for number in raw]).astype(np.float32)
    item = aif.Attribute(name="item", size=len(raw) + 1)
    schema = dataclasses.replace(SCHEMA, item_attributes=(item, SCHEMA.item_attributes[1]))
    return aif.Catalogue.from_items(schema, raw, ids={"category": raw % 5 + 1}, content=content)


@pytest.fixture(scope="module")
def model():
    """(model, params, raw ids 200, 202, ..., 296)."""
    raw, model = np.arange(200, 298, 2), aif.build(CONFIG)
    return model, demo.init(model, items=catalogue(raw)), raw


def test_new_ids_are_appended_and_old_rows_kept():
    tables = {name: jax.random.normal(jax.random.key(n), (n, 8)) for name, n in (("item", 50), ("gender", 3))}
    params = {"embedding": tables, "fitted": {}}
    grown, config = grow_vocabulary(params, "item", np.arange(ITEMS), 2050, jax.random.key(0), config=CONFIG)
    table = np.asarray(grown["embedding"]["item"])
    np.testing.assert_array_equal(table[:50], params["embedding"]["item"])
    np.testing.assert_allclose(table[50:].std(), np.std(params["embedding"]["item"]), rtol=0.05)
    assert params["embedding"]["item"].shape == (50, 8)
    assert grown["embedding"]["gender"] is params["embedding"]["gender"]
    assert config.schema.table_sizes["item"] == 2050
    assert config.replace(schema=CONFIG.schema) == CONFIG
    _, config = grow_vocabulary(params, "gender", np.arange(3), 4, jax.random.key(0), config=CONFIG)
    assert config.schema.table_sizes["gender"] == 4


def test_a_grown_model_gives_old_items_the_rows_that_they_had(model):
    """Under two new ids, one in the middle."""
    small, params, raw = model
    before, after = aif.Vocabulary(raw), aif.Vocabulary([*raw, 241, 7])
    rows = np.append(0, after.encode(before.raw))
    grown, config = grow_vocabulary(params, "item", rows, len(after), jax.random.key(0), config=CONFIG)
    large = aif.build(config)
    old = catalogue(raw).features(before.encode([246])[0])
    new = catalogue(after.raw).features(after.encode([246])[0])
    expected, got = jax.jit(small.item)(params, old), jax.jit(large.item)(grown, new)
    jax.tree.map(np.testing.assert_array_equal, expected, got)


def test_a_field_that_grows_renames_its_ids(model):
    _, params, _ = model
    rows = np.array([0, 2, 4, 6, 7, 8])
    grown, config = grow_vocabulary(params, "category", rows, 9, jax.random.key(0), config=CONFIG)
    np.testing.assert_array_equal(grown["fitted"]["fields"]["category"], rows[params["fitted"]["fields"]["category"]])
    old, new = ({**p["fitted"], "fields": None} for p in (params, grown))
    jax.tree.map(np.testing.assert_array_equal, old, new)
    assert config.schema.table_sizes["category"] == 9


def test_a_block_says_which_of_its_arrays_are_per_item(model, monkeypatch):
    """As many codes as items: centres stay, where their length alone would move them."""
    _, params, raw = model
    config = CONFIG.replace(blocks=(Codes(),))
    codes = {"centres": jnp.ones((ITEMS, 12)), "of": {"code": jnp.arange(ITEMS)}, "scale": jnp.ones(6)}
    params = params | {"fitted": {"fields": params["fitted"]["fields"], "codes": codes}}
    grown, larger = grow_vocabulary(params, "item", np.arange(ITEMS), 60, jax.random.key(0), config=config)
    assert jax.tree.map(len, grown["fitted"]["codes"]) == {"centres": ITEMS, "of": {"code": 60}, "scale": 6}
    aif.build(larger).init(jax.random.key(0), None, fitted=grown["fitted"])

    monkeypatch.setattr(Codes, "per_item", None)
    for name, size, doubtful in (("item", ITEMS, "'centres', 'of/code'"), ("category", 6, "'scale'")):
        message = rf"block 'codes', per_item: expected names .*; \[{doubtful}\] may have one for each '{name}'"
        given = params, name, np.arange(size), size + 10, jax.random.key(0)
        refused(ValueError, message, grow_vocabulary, *given, config=config)


@pytest.mark.parametrize("size", [ITEMS, 60])
def test_what_is_trained_for_each_id_is_refused_where_its_vocabulary_changes(model, monkeypatch, size):
    """Also where it stays as long, and not for an array that is as long by chance; rows of the head's kernel too."""
    config, given = CONFIG.replace(blocks=(*CONFIG.blocks, Codes())), (model[1], "item", np.arange(ITEMS), size)
    monkeypatch.setattr(Codes, "init", lambda self, key, of: {"of": jnp.ones(ITEMS)})
    grow_vocabulary(*given, jax.random.key(0), config=config)
    message = "block 'codes': expected no width or trained row by 'item', got one: fit it, or read embeddings"
    for part, made in ("init", jnp.ones), ("widths", int):
        with monkeypatch.context() as patch:
            patch.setattr(Codes, part, lambda self, *of, made=made: {"of": made(of[-1].schema.table_sizes["item"])})
            refused(ValueError, message, grow_vocabulary, *given, jax.random.key(0), config=config)


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
    for table, width in ((blocks.PureSvd(width=3), (3,)), (blocks.ItemOffset(), ())):
        params, config = blocks.with_table(params, rng.normal(size=(size, *width)).astype(np.float32), table, config=config)
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


@pytest.mark.lane("standing")
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
    assert (again["signatures_64"]["table"][row] != params["fitted"]["signatures_64"]["table"][row]).any()


@pytest.mark.lane("standing")
def test_indexes_of_the_model_before_are_refused(world, tmp_path):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    refused(EncodingMismatch, "", ItemIndex.build, after, world.old_data.catalogue, progress=False)
    ItemIndex.build(world.before, world.old_data.catalogue, progress=False).save(tmp_path / "index")
    refused(VersionMismatch, after.version, ItemIndex.load, tmp_path / "index", after)
    assert len(ItemIndex.build(after, world.data.catalogue, progress=False)) == 7


@pytest.mark.lane("standing")
def test_a_history_with_an_item_that_went_meets_no_newcomer(world):
    after = carry_over(world.before, world.encoder, key=jax.random.key(3))
    scores, candidates = [], world.data.catalogue.features(world.encoder.vocabularies["item"].encode([60, 61, 1]))
    for item in (6, 777, 60):
        events = {"item": [item, 2], "time": [BASE, BASE + 5], "event": ["buy", "view"]}
        user = after.encoder.user({"user": "ann"}, events, BASE + 2000)
        scores.append(np.asarray(jax.jit(after.model.joint)(after.params, user, candidates)))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()


@pytest.mark.lane("standing")
def test_other_encoders_are_refused(world):
    """Of other columns; of other actions, as many as the model's."""
    other = aif.read(DAYS[1], items=CATALOGUES[1], columns=dataclasses.replace(COLUMNS, scale=True), progress=False)
    refused(ValueError, r"got other \['columns'\]", carry_over, world.before, other.encoder, key=jax.random.key(0))
    days = DAYS[1], DAYS[1] | {"event": [name.replace("view", "cart") for name in DAYS[1]["event"]]}
    columns = dataclasses.replace(COLUMNS, actions=())
    known, renamed = (aif.read(day, items=CATALOGUES[1], columns=columns, progress=False) for day in days)
    refused(ValueError, r"got other \['actions'\]", with_served_vocabulary, model_of(known.encoder, known), renamed.encoder)


@pytest.mark.lane("standing")
def test_where_all_tables_are_fitted_again_no_block_need_say_which_are_per_item(world, monkeypatch):
    monkeypatch.setattr(Decay, "per_item", None)
    refused(ValueError, "block 'decay', per_item", carry_over, world.before, world.encoder, key=jax.random.key(0))
    warm_start(world.before, world.encoder, world.data.catalogue, forget=True)
