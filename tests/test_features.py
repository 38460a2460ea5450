"""The layout of features: specs, empty features, checks and packing are what it says; and the catalogue that holds them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import check_item_features, check_user_features, checks, empty_items, empty_user
from aif_jax.catalogue import Catalogue
from aif_jax.features import UserPacker, behaviours, item_specs, pack, unpack, user_specs
from aif_jax.types import ItemFeatures
from tests import demo
from tests.refusals import refused

SCHEMA = demo.schema()  # item 50, category 6, tags 9 x 3; gender 3, interests 7 x 2; 4 actions; floats 2 and 1; content 12; bid
BARE = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
CONFIG = demo.config()


def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.dtype.name, leaf.shape) for path, leaf in leaves}


def test_specs_by_hand():
    assert shapes(user_specs(SCHEMA, length=7, lead=(5,))) == {
        ".ids['gender']": ("int32", (5,)), ".ids['interests']": ("int32", (5, 2)), ".floats": ("float32", (5, 2)),
        ".history.item": ("int32", (5, 7)), ".history.action": ("int32", (5, 7)), ".history.age": ("float32", (5, 7)),
        ".history.mask": ("bool", (5, 7)),
    }  # fmt: skip
    assert shapes(item_specs(SCHEMA, lead=(2, 3))) == {
        ".ids['item']": ("int32", (2, 3)), ".ids['category']": ("int32", (2, 3)), ".ids['tags']": ("int32", (2, 3, 3)),
        ".floats": ("float32", (2, 3, 1)), ".content": ("float32", (2, 3, 12)), ".side['bid']": ("float32", (2, 3)),
    }  # fmt: skip
    one = {".ids['item']": ("int32", ()), ".ids['category']": ("int32", ()), ".floats": ("float32", (0,))}
    assert shapes(item_specs(BARE)) == one


@pytest.mark.parametrize("schema", [SCHEMA, BARE], ids=["demo", "bare"])
def test_real_features_have_the_specs(schema):
    assert shapes(empty_user(schema, length=24)) == shapes(user_specs(schema, length=24))
    assert shapes(empty_items(schema, 3)) == shapes(item_specs(schema, lead=(3,)))
    if schema is SCHEMA:
        assert shapes(demo.user(CONFIG)) == shapes(user_specs(schema, length=24))
        assert shapes(demo.items(3)) == shapes(item_specs(schema, lead=(3,)))
        assert shapes(demo.catalogue().items) == shapes(item_specs(schema, lead=(50,)))


def test_behaviours_by_hand():
    made = behaviours(np.int64([5, 7, 9]), np.int8([1, 2, 3]), np.int64([60, 90, 120]), np.array([True, False, True]))
    assert made.item.tolist() == [5, 0, 9] and made.action.tolist() == [1, 0, 3]
    assert made.age.tolist() == [60, 0, 120] and made.mask.tolist() == [True, False, True]
    assert [leaf.dtype.name for leaf in jax.tree.leaves(made)] == ["int32", "int32", "float32", "bool"]
    mask = np.zeros((2, 3), bool)  # what is where the mask is false does not matter
    made = behaviours(np.full((2, 3), -7), np.full((2, 3), 2**20), np.full((2, 3), np.nan), mask)
    assert not any(leaf.any() for leaf in jax.tree.leaves(made))
    assert not np.signbit(behaviours(np.int32([1]), np.int32([1]), np.float64([-3]), np.array([False])).age).any()
    item, action, age = np.ones((3, 4), np.int32), np.ones((3, 4), np.int32), np.ones((3, 4), np.float32)
    mask = np.ones((3, 8), bool)[:, ::2]
    made = behaviours(item, action, age, mask)
    for leaf, argument in zip(jax.tree.leaves(made), (item, action, age, mask), strict=True):
        assert leaf.flags.c_contiguous and not np.shares_memory(leaf, argument)  # memory of its own


def user(**changes):
    return dataclasses.replace(demo.user(CONFIG, events=20), **changes)


def history(**changes):
    return user(history=dataclasses.replace(user().history, **changes))


def put(array, position, value):
    array = np.array(array)
    array[position] = value
    return array


def batch(features, size=2):
    return jax.tree.map(lambda x: np.stack([x] * size), features)


def test_good_features_and_empty_ones_which_are_zeros_pass():
    hole, empty = history(mask=put(user().history.mask, 3, False)), empty_user(SCHEMA, length=24)
    for features in (user(), jax.tree.map(jnp.asarray, user()), hole, user(encoding="of some encoder"), empty):
        check_user_features(SCHEMA, features, batched=False)
        check_user_features(SCHEMA, batch(features), batched=True)
        check_user_features(SCHEMA, jax.tree.map(lambda x: x[:0], batch(features)), batched=True)
    check_user_features(BARE, empty_user(BARE, length=5), batched=False)
    check_user_features(SCHEMA, empty_user(SCHEMA, length=0, lead=(3,)), batched=True)
    for features in (items(), jax.tree.map(jnp.asarray, items()), empty_items(SCHEMA, 2), empty_items(SCHEMA)):
        check_item_features(SCHEMA, features, batched=True)
    assert all(isinstance(leaf, np.ndarray) and not leaf.any() for leaf in jax.tree.leaves((empty, empty_items(SCHEMA, 2))))
    check_item_features(SCHEMA, demo.catalogue().features(3), batched=False)
    check_item_features(BARE, empty_items(BARE, 2), batched=True)


@pytest.mark.parametrize(("features", "error", "message"), [
    ({}, TypeError, "UserFeatures: expected UserFeatures, got dict"),
    (demo.items(1), TypeError, "UserFeatures: expected UserFeatures, got ItemFeatures"),
    (user(history=None), TypeError, "UserFeatures.history: expected Behaviours, got NoneType"),
    (user(ids=None), TypeError, "UserFeatures.ids: expected a dict with keys ['gender', 'interests'], got NoneType"),
    (user(ids={"gender": np.int32(1)}), ValueError,
     "UserFeatures.ids: expected keys ['gender', 'interests'], got ['gender'] (missing ['interests'], extra [])"),
    (user(ids=user().ids | {"age": np.int32(1)}), ValueError, "(missing [], extra ['age'])"),
    (user(ids=user().ids | {"gender": np.int64(1)}), TypeError, "UserFeatures.ids['gender']: expected dtype int32, got int64"),
    (user(ids=user().ids | {"gender": np.int32(3)}), ValueError,
     "UserFeatures.ids['gender']: expected values in [0, 3), got 3 at the only position"),
    (user(ids=user().ids | {"interests": np.int32([1, -1])}), ValueError,
     "UserFeatures.ids['interests']: expected values in [0, 7), got -1 at position [1]"),
    (user(ids=user().ids | {"interests": np.int32([1])}), ValueError, "ids['interests']: expected shape [2], got [1]"),
    (user(floats=np.zeros(2)), TypeError, "UserFeatures.floats: expected dtype float32, got float64"),
    (user(floats=np.zeros(3, np.float32)), ValueError, "UserFeatures.floats: expected shape [2], got [3]"),
    (user(floats=np.float32([0, np.nan])), ValueError, "UserFeatures.floats: expected finite values, got nan at position [1]"),
    (history(item=put(user().history.item, 2, 50)), ValueError,
     "history.item: expected values in [0, 50), got 50 at position [2]"),
    (history(item=user().history.item[:5]), ValueError, "UserFeatures.history.item: expected shape [24], got [5]"),
    (history(action=put(user().history.action, 0, 4)), ValueError, "history.action: expected values in [0, 4), got 4"),
    (history(age=put(user().history.age, 1, -0.5)), ValueError,
     "UserFeatures.history.age: expected finite values of at least 0, got -0.5 at position [1]"),
    (history(age=put(user().history.age, 23, np.nan)), ValueError, "of at least 0, got nan at position [23]"),
    (history(mask=user().history.mask.astype(np.int32)), TypeError, "history.mask: expected dtype bool, got int32"),
    (history(mask=user().history.mask[:23]), ValueError, "UserFeatures.history.item: expected shape [23], got [24]"),
    (history(mask=np.True_), ValueError, "UserFeatures.history.mask: expected shape [any], got []"),
])  # fmt: skip
def test_wrong_users_are_named(features, error, message):
    """Ages in padding too."""
    refused(error, re.escape(message), check_user_features, SCHEMA, features, batched=False)
    refused(error, re.escape(message), UserPacker(SCHEMA, 24), features)


MANY = batch(user())


def of_many(**changes):
    return dataclasses.replace(MANY, history=dataclasses.replace(MANY.history, **changes))


@pytest.mark.parametrize(("features", "batched", "message"), [
    (dataclasses.replace(MANY, floats=np.zeros([2, 3], np.float32)), True, "floats: expected shape [2, 2], got [2, 3]"),
    (of_many(mask=MANY.history.mask[0]), True, "UserFeatures.history.mask: expected shape [2, 24], got [24]"),
    (of_many(mask=MANY.history.mask[:, :4]), True, "UserFeatures.history.item: expected shape [2, 4], got [2, 24]"),
    (of_many(item=put(MANY.history.item, (1, 2), 50)), True, "expected values in [0, 50), got 50 at position [1, 2]"),
    (dataclasses.replace(MANY, ids=MANY.ids | {"gender": np.zeros(3, np.int32)}), True,
     "UserFeatures.ids['interests']: expected shape [3, 2], got [2, 2]"),
    (user(), True, "UserFeatures.ids['gender']: expected shape [any], got []"),
    (MANY, False, "UserFeatures.ids['gender']: expected shape [], got [2]"),
])  # fmt: skip
def test_wrong_users_of_a_batch_are_named(features, batched, message):
    """The first array tells the batch; a check may name what it checks."""
    refused(ValueError, re.escape(message), check_user_features, SCHEMA, features, batched=batched)
    message = re.escape(message.replace("UserFeatures", "request 7"))
    refused(ValueError, message, check_user_features, SCHEMA, features, batched=batched, name="request 7")


def items(**changes):
    return dataclasses.replace(demo.items(2), **changes)


@pytest.mark.parametrize(("features", "error", "message"), [
    ({}, TypeError, "ItemFeatures: expected ItemFeatures, got dict"),
    (items(floats=np.zeros([2, 1])), TypeError, "ItemFeatures.floats: expected dtype float32, got float64"),
    (items(floats=np.zeros([2, 2], np.float32)), ValueError, "ItemFeatures.floats: expected shape [2, 1], got [2, 2]"),
    (items(floats=np.float32([[0], [np.inf]])), ValueError, "floats: expected finite values, got inf at position [1, 0]"),
    (items(ids={}), ValueError, "ItemFeatures.ids: expected keys ['category', 'item', 'tags'], got []"),
    (items(ids=items().ids | {"tags": put(items().ids["tags"], (1, 2), 9)}), ValueError,
     "ItemFeatures.ids['tags']: expected values in [0, 9), got 9 at position [1, 2]"),
    (items(ids=items().ids | {"item": np.zeros(2, np.uint32)}), TypeError, "ids['item']: expected dtype int32, got uint32"),
    (items(content=None), ValueError, "ItemFeatures.content: expected float32 [..., 12], got None"),
    (items(content=np.zeros([2, 3], np.float32)), ValueError, "ItemFeatures.content: expected shape [2, 12], got [2, 3]"),
    (items(side={}), ValueError, "ItemFeatures.side: expected keys ['bid'], got [] (missing ['bid'], extra [])"),
    (items(side={"bid": np.zeros(2, np.int32)}), TypeError, "ItemFeatures.side['bid']: expected dtype float32, got int32"),
    (items(side={"bid": np.float32([0, np.nan])}), ValueError, "side['bid']: expected finite values, got nan at position [1]"),
])  # fmt: skip
def test_wrong_items_are_named(features, error, message):
    refused(error, re.escape(message), check_item_features, SCHEMA, features, batched=True)


def test_content_that_the_schema_does_not_have_and_leading_axes_of_one_item_are_refused():
    content = dataclasses.replace(empty_items(BARE, 2), content=np.zeros((2, 4), np.float32))
    message = re.escape("ItemFeatures.content: expected None (schema.content is 0), got an array")
    refused(ValueError, message, check_item_features, BARE, content, batched=True)
    message = re.escape("ItemFeatures.ids['category']: expected shape [], got [2]")
    refused(ValueError, message, check_item_features, SCHEMA, items(), batched=False)


def test_a_user_is_packed_where_the_check_passes():
    packer, zero = UserPacker(SCHEMA, 24), history(age=put(user().history.age, 23, -0.0))
    largest = user(ids={"gender": np.int32(2), "interests": np.int32([6, 0])}, floats=np.float32([-0.0, -3e38]))
    for features in (user(), user(encoding="monday"), zero, largest, empty_user(SCHEMA, length=24)):
        np.testing.assert_array_equal(packer(features), pack(features))
        np.testing.assert_array_equal(packer(jax.tree.map(jnp.asarray, features)), pack(features))
    refused(ValueError, "UserFeatures.history: expected L=24, got L=7; see Encoder", packer, empty_user(SCHEMA, length=7))


BITS = {
    "float": np.float32([[np.nan, -0.0], [np.inf, 1e-45]]),
    "int": np.int32([-1, 2**31 - 1]),
    "uint": np.uint32([2**32 - 1]),
    "bool": np.array([True, False]),
    "scalar": np.array(-7, np.int32),
}


@pytest.mark.parametrize(("tree", "specs"), [
    (demo.user(CONFIG), user_specs(SCHEMA, length=24)),
    (batch(demo.user(CONFIG, events=3), 4), user_specs(SCHEMA, length=24, lead=(4,))),
    (demo.items(5), item_specs(SCHEMA, lead=(5,))),
    (empty_items(BARE, 0), item_specs(BARE, lead=(0,))),
    (BITS, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), BITS)),
], ids=["user", "users", "items", "no items", "bits"])  # fmt: skip
def test_packed_features_come_back_under_jit_with_every_bit(tree, specs):
    words = pack(tree)
    assert words.dtype == np.int32 and words.shape == (sum(leaf.size for leaf in jax.tree.leaves(specs)),)
    assert demo.same(jax.jit(lambda words: unpack(words, specs))(words), tree)


def test_encoding_belongs_to_the_structure():
    """It is no leaf: it survives tree functions, jit and vmap, and features of two encoders cannot be put together."""
    features = batch(user(encoding="monday"))
    assert jax.tree.structure(features) != jax.tree.structure(batch(user(encoding="tuesday")))
    assert len(jax.tree.leaves(features)) == len(jax.tree.leaves(batch(user())))
    assert jax.tree.map(lambda x: x[0], features).encoding == "monday"
    assert jax.jit(lambda x: x)(features).encoding == "monday"
    assert jax.vmap(lambda x: x)(features).encoding == "monday"
    with pytest.raises(ValueError, match="(?s)metadata.*monday.*tuesday"):
        jax.tree.map(lambda *x: np.stack(x), user(encoding="monday"), user(encoding="tuesday"))
    assert user().encoding == "" and demo.items(1).encoding == ""


CATALOGUE = dataclasses.replace(demo.schema(), content=2)  # item 50, category 6, tags 9 x 3; one float; side "bid"


def parts() -> dict:
    return {
        "schema": CATALOGUE,
        "raw": np.array([11, 22, 33]),
        "ids": {
            "item": np.array([0, 1, 2, 3], np.int32),
            "category": np.array([0, 5, 4, 5], np.int32),
            "tags": np.array([[0, 0, 0], [1, 0, 0], [2, 8, 0], [3, 4, 5]], np.int32),
        },
        "floats": np.array([[0], [0.5], [-1], [2]], np.float32),
        "content": np.array([[0, 0], [1, 2], [3, 4], [5, 6]], np.float32),
        "side": {"bid": np.array([0, 1, 2, 3], np.float32)},
    }


def catalogue_of(schema, raw, **features) -> Catalogue:
    return Catalogue(schema=schema, raw=raw, items=ItemFeatures(**features, encoding="kept by the schema alone"))


def test_features_of_rows_by_hand():
    catalogue = catalogue_of(**parts())
    assert len(catalogue) == 4
    features = catalogue.features([2, 0])
    assert features.ids["item"].tolist() == [2, 0]
    assert features.ids["category"].tolist() == [4, 0]
    assert features.ids["tags"].tolist() == [[2, 8, 0], [0, 0, 0]]
    assert features.floats.tolist() == [[-1], [0]]
    assert features.content is not None and features.content.tolist() == [[3, 4], [0, 0]]
    assert features.side["bid"].tolist() == [2, 0]
    check_item_features(CATALOGUE, features, batched=True)
    check_item_features(CATALOGUE, catalogue.features(3), batched=False)
    assert catalogue.features(np.array([[1, 2], [3, 0]])).floats.shape == (2, 2, 1)
    assert catalogue.features([]).floats.shape == (0, 1)
    check_item_features(CATALOGUE, catalogue.items, batched=True)


def test_from_items_adds_the_unknown_row():
    known = parts()
    ids = {name: known["ids"][name][1:].tolist() for name in ("category", "tags")}
    given = dict(floats=known["floats"][1:].astype(np.float64), content=known["content"][1:], side={"bid": [1, 2, 3]})
    catalogue = Catalogue.from_items(CATALOGUE, known["raw"], ids=ids, **given)
    jax.tree.map(np.testing.assert_array_equal, catalogue.items, catalogue_of(**known).items)


def spoilt(field, position, value, key=None):
    """The parts with one number changed."""
    known = parts()
    (known[field] if key is None else known[field][key])[position] = value
    return known


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (parts() | {"raw": parts()["raw"][:2]}, ValueError, "floats: expected 3 rows (raw ids and the unknown item), got 4"),
    (parts() | {"raw": parts()["raw"][:, None]}, ValueError, "raw: expected integers or strings [N - 1], got int64 [3, 1]"),
    (parts() | {"schema": dataclasses.replace(CATALOGUE, content=0)}, ValueError,
     "Catalogue.content: expected None (schema.content is 0), got an array"),
    (spoilt("ids", (2, 1), 9, "tags"), ValueError, "ids['tags']: expected values in [0, 9), got 9 at position [2, 1]"),
    (spoilt("ids", 3, -1, "category"), ValueError, "ids['category']: expected values in [0, 6), got -1 at position [3]"),
    (spoilt("ids", 0, 1, "category"), ValueError, "ids['category']: expected zeros in row 0"),
    (spoilt("floats", (0, 0), 1), ValueError, "floats: expected zeros in row 0"),
    (spoilt("content", (3, 1), -np.inf), ValueError, "content: expected finite values, got -inf at position [3, 1]"),
    (spoilt("content", (0, 1), 1), ValueError, "content: expected zeros in row 0"),
    (spoilt("side", 0, 1, "bid"), ValueError, "side['bid']: expected zeros in row 0"),
])  # fmt: skip
@pytest.mark.parametrize("block", [checks.BLOCK, 2])
def test_a_wrong_table_is_named(monkeypatch, block, wrong, error, message):
    monkeypatch.setattr(checks, "BLOCK", block)
    refused(error, re.escape(message), catalogue_of, **wrong)
