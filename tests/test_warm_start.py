"""Warm start of a grown vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import Block, LshDin, block
from aif_jax.train.edits import grow_vocabulary
from tests import demo
from tests.own_block import Decay

ITEMS = 50
SCHEMA = aif.Schema(
    item_attributes=(aif.Attribute(name="item", size=ITEMS), aif.Attribute(name="category", size=6)),
    user_attributes=(aif.Attribute(name="gender", size=3),),
    content=12,
)
CONFIG = aif.Config(schema=SCHEMA, width=8, blocks=(LshDin(), Decay()))


@block
class Codes(Block):
    """Fits an array of its own length next to one with a row for each item."""

    per_item = ("code",)


def catalogue(raw):
    """Categories and content that depend on the raw id alone."""
    raw = np.asarray(raw)
    content = np.stack([np.random.default_rng(number).normal(size=12) for number in raw]).astype(np.float32)
    return aif.Catalogue.from_items(SCHEMA_OF[len(raw) + 1], raw, ids={"category": raw % 5 + 1}, content=content)


def with_items(size):
    item = aif.Attribute(name="item", size=size)
    return aif.Schema(item_attributes=(item, SCHEMA.item_attributes[1]), user_attributes=SCHEMA.user_attributes, content=12)


SCHEMA_OF = {size: with_items(size) for size in (ITEMS, ITEMS + 2)}


@pytest.fixture(scope="module")
def model():
    """(model, params, raw ids 200, 202, ..., 296)."""
    raw = np.arange(200, 298, 2)
    model = aif.build(CONFIG)
    return model, demo.init(model, items=catalogue(raw)), raw


@pytest.fixture
def params():
    tables = {name: jax.random.normal(jax.random.key(n), (n, 8)) for name, n in (("item", 50), ("gender", 3))}
    return {"embedding": tables, "fitted": {}}


@pytest.fixture
def larger(model):
    """Vocabularies before and after two new ids, one in the middle; where old ids went; parameters and config."""
    _, params, raw = model
    before, after = aif.Vocabulary(raw), aif.Vocabulary([*raw, 241, 7])
    rows = np.append(0, after.encode(before.raw))
    return before, after, rows, *grow_vocabulary(params, "item", rows, len(after), jax.random.key(0), config=CONFIG)


def test_new_ids_are_appended_and_old_rows_kept(params):
    grown, config = grow_vocabulary(params, "item", np.arange(ITEMS), 2050, jax.random.key(0), config=CONFIG)
    table = np.asarray(grown["embedding"]["item"])
    np.testing.assert_array_equal(table[:50], params["embedding"]["item"])
    np.testing.assert_allclose(table[50:].std(), np.std(params["embedding"]["item"]), rtol=0.05)
    assert params["embedding"]["item"].shape == (50, 8)
    assert grown["embedding"]["gender"] is params["embedding"]["gender"]
    assert config.schema.item_attribute("item").size == 2050
    assert config.replace(schema=CONFIG.schema) == CONFIG
    _, config = grow_vocabulary(params, "gender", np.arange(3), 4, jax.random.key(0), config=CONFIG)
    assert config.schema.table_sizes["gender"] == 4


def test_a_grown_model_gives_old_items_the_rows_that_they_had(model, larger):
    small, params, raw = model
    before, after, _, grown, config = larger
    large = aif.build(config)
    old = catalogue(raw).features(before.encode([246])[0])
    new = catalogue(after.raw).features(after.encode([246])[0])
    expected, got = jax.jit(small.item)(params, old), jax.jit(large.item)(grown, new)
    jax.tree.map(np.testing.assert_array_equal, expected, got)


def test_fitted_values_are_fitted_again(model):
    _, params, raw = model
    grown, config = grow_vocabulary(params, "item", np.arange(ITEMS), ITEMS + 2, jax.random.key(0), config=CONFIG)
    new = aif.fit_tables(config, catalogue(np.append(raw, [300, 301])))
    shapes = jax.tree.map(jnp.shape, grown["fitted"])
    assert jax.tree.map(jnp.shape, new) == shapes


def test_a_field_that_grows_renames_its_ids(model):
    _, params, _ = model
    rows = np.array([0, 2, 4, 6, 7, 8])
    grown, config = grow_vocabulary(params, "category", rows, 9, jax.random.key(0), config=CONFIG)
    np.testing.assert_array_equal(grown["fitted"]["fields"]["category"], rows[params["fitted"]["fields"]["category"]])
    old, new = ({**p["fitted"], "fields": None} for p in (params, grown))
    jax.tree.map(np.testing.assert_array_equal, old, new)
    assert config.schema.item_attribute("category").size == 9


def test_a_block_says_which_of_its_arrays_are_per_item(model):
    """As many codes as items: centres stay, where their length alone would move them."""
    _, params, raw = model
    config = CONFIG.replace(blocks=(Codes(),))
    codes = {"centres": jnp.ones((ITEMS, 12)), "code": jnp.arange(ITEMS)}
    fitted = {"fields": params["fitted"]["fields"], "codes": codes}
    place = np.arange(ITEMS)
    grown, _ = grow_vocabulary(params | {"fitted": fitted}, "item", place, 60, jax.random.key(0), config=config)
    sizes = {name: len(array) for name, array in grown["fitted"]["codes"].items()}
    assert sizes == {"centres": ITEMS, "code": 60}

    undeclared = dataclasses.make_dataclass("Undeclared", [], bases=(Block,), frozen=True)()
    unsure = CONFIG.replace(blocks=())
    object.__setattr__(unsure, "blocks", (undeclared,))
    with pytest.raises(ValueError, match=r"block 'undeclared', per_item: expected names .* \['level'\] may be such"):
        fitted = {"fields": params["fitted"]["fields"], "undeclared": {"level": jnp.ones(ITEMS), "scale": jnp.ones(3)}}
        grow_vocabulary(params | {"fitted": fitted}, "item", place, 60, jax.random.key(0), config=unsure)
