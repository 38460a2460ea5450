"""Warm start of a grown vocabulary."""

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.warm_start import grow_vocabulary

CONFIG = aif.tiny()


@pytest.fixture
def params(getkey):
    return {"embedding": {name: jax.random.normal(getkey(), (size, 8)) for name, size in (("item", 50), ("gender", 3))}}


def test_new_ids_are_appended_and_old_rows_kept(params, getkey):
    grown, config = grow_vocabulary(params, "item", 2050, getkey(), config=CONFIG)
    table = np.asarray(grown["embedding"]["item"])
    np.testing.assert_array_equal(table[:50], params["embedding"]["item"])
    np.testing.assert_allclose(table[50:].std(), np.std(params["embedding"]["item"]), rtol=0.05)
    assert params["embedding"]["item"].shape == (50, 8)
    assert grown["embedding"]["gender"] is params["embedding"]["gender"]
    assert config.schema.item_attribute("item").size == 2050
    assert config.replace(schema=CONFIG.schema) == CONFIG


def test_user_attributes_grow_too(params, getkey):
    _, config = grow_vocabulary(params, "gender", 4, getkey(), config=CONFIG)
    assert config.schema.user_attribute("gender").size == 4


def test_ids_that_move_take_their_rows_along(params, getkey):
    """A vocabulary sorts its raw ids, so a new id in the middle moves the ones after it."""
    before, after = aif.Vocabulary(range(200, 298, 2)), aif.Vocabulary([*range(200, 298, 2), 241, 7])
    rows = np.append(0, after.encode(before.raw))
    grown, _ = grow_vocabulary(params, "item", len(after), getkey(), config=CONFIG, rows=rows)
    for raw in (200, 240, 242, 296):
        old, new = before.encode([raw])[0], after.encode([raw])[0]
        np.testing.assert_array_equal(grown["embedding"]["item"][new], params["embedding"]["item"][old])
    np.testing.assert_array_equal(grown["embedding"]["item"][0], params["embedding"]["item"][0])


def test_a_grown_model_gives_old_items_the_rows_that_they_had(tiny_model, getkey):
    model, params = tiny_model
    grown, config = grow_vocabulary(params, "item", 60, getkey(), config=model.config)
    item = aif.ItemFeatures(
        ids={"item": np.int32(7), "category": np.int32(2), "tags": np.zeros(3, np.int32)},
        floats=np.ones(1, np.float32),
        content=np.ones(12, np.float32),
        side={"bid": np.float32(1)},
    )
    before, after = jax.jit(model.item)(params, item), jax.jit(aif.build(config).item)(grown, item)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
    "name, size, rows, error, words",
    [
        ("colour", 60, None, KeyError, "no attribute 'colour'"),
        ("item", 49, None, ValueError, "expected a size of at least the old 50, got 49"),
        ("item", 60, np.arange(49), ValueError, "expected 50 distinct rows below 60"),
        ("item", 60, np.arange(1, 51), ValueError, "with row 0 first"),
        ("item", 60, np.arange(50) % 49, ValueError, "distinct"),
        ("item", 50, np.append(0, np.arange(2, 51)), ValueError, "below 50"),
    ],
)
def test_what_makes_no_sense_is_refused(params, getkey, name, size, rows, error, words):
    with pytest.raises(error, match=words):
        grow_vocabulary(params, name, size, getkey(), config=CONFIG, rows=rows)
