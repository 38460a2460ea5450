"""Catalogue: row 0, look-ups, what it refuses; and the checks of item features against a schema."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.config import demo_schema
from aif_jax.data import validate
from aif_jax.data.catalogue import Catalogue
from aif_jax.data.schema import Attribute, Schema
from aif_jax.data.validate import check_item_features
from aif_jax.types import ItemFeatures

SCHEMA = dataclasses.replace(demo_schema(), content=2)  # item 50, category 6, tags 9 x 3; one float; side "bid"


def parts() -> dict:
    return {
        "schema": SCHEMA,
        "raw": np.array([11, 22, 33]),
        "ids": {
            "item": np.array([0, 1, 2, 3], np.int32),
            "category": np.array([0, 5, 4, 5], np.int32),
            "tags": np.array([[0, 0, 0], [1, 0, 0], [2, 8, 0], [3, 4, 5]], np.int32),
        },
        "floats": np.array([[0], [0.5], [-1], [2]], np.float32),
        "content": np.array([[0, 0], [1, 2], [3, 4], [5, 6]], np.float32),
        "signature": np.array([[9], [1], [2], [3]], np.uint32),
        "side": {"bid": np.array([0, 1, 2, 3], np.float32)},
    }


def test_features_of_rows_by_hand():
    catalogue = Catalogue(**parts())
    assert len(catalogue) == 4
    features = catalogue.features([2, 0])
    assert features.ids["item"].tolist() == [2, 0]
    assert features.ids["category"].tolist() == [4, 0]
    assert features.ids["tags"].tolist() == [[2, 8, 0], [0, 0, 0]]
    assert features.floats.tolist() == [[-1], [0]]
    assert features.content is not None and features.content.tolist() == [[3, 4], [0, 0]]
    assert features.signature is not None and features.signature.tolist() == [[2], [9]]
    assert features.side["bid"].tolist() == [2, 0]
    check_item_features(SCHEMA, features, batched=True)
    check_item_features(SCHEMA, catalogue.features(3), batched=False)
    assert catalogue.features(np.array([[1, 2], [3, 0]])).floats.shape == (2, 2, 1)
    assert catalogue.features([]).floats.shape == (0, 1)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([4], ValueError, r"rows: expected values in \[0, 4\), got 4 at position \[0\]"),
        ([0, -1], ValueError, r"got -1 at position \[1\]"),
        ([1.0], TypeError, "rows: expected integers, got dtype float64"),
        ([True], TypeError, "rows: expected integers, got dtype bool"),
    ],
)
def test_rows_outside_the_catalogue_are_refused(rows, error, message):
    with pytest.raises(error, match=message):
        Catalogue(**parts()).features(rows)


def test_from_items_adds_the_unknown_row():
    known = parts()
    catalogue = Catalogue.from_items(
        SCHEMA,
        known["raw"],
        ids={name: known["ids"][name][1:].tolist() for name in ("category", "tags")},
        floats=known["floats"][1:].astype(np.float64),
        content=known["content"][1:],
        side={"bid": [1, 2, 3]},
    )
    expected = Catalogue(**{**known, "signature": None})
    for name in ("item", "category", "tags"):
        np.testing.assert_array_equal(catalogue.ids[name], expected.ids[name])
    np.testing.assert_array_equal(catalogue.floats, expected.floats)
    np.testing.assert_array_equal(catalogue.content, expected.content)
    np.testing.assert_array_equal(catalogue.side["bid"], expected.side["bid"])


def test_from_items_refuses_what_it_would_have_to_change():
    schema = Schema(item_attributes=(Attribute(name="item", size=4), Attribute(name="category", size=3)))
    with pytest.raises(TypeError, match="ids.'category'.: expected integers, got dtype float64"):
        Catalogue.from_items(schema, [1, 2], ids={"category": [1.5, 2]})
    with pytest.raises(ValueError, match="ids.'category'.: expected values in .0, 2147483648., got 4294967297"):
        Catalogue.from_items(schema, [1, 2], ids={"category": [2**32 + 1, 2]})
    with pytest.raises(ValueError, match=r"ids.'category'.: expected 2 rows like raw, got shape \[3\]"):
        Catalogue.from_items(schema, [1, 2], ids={"category": [1, 2, 1]})
    with pytest.raises(ValueError, match=r"Catalogue.raw: expected integers or strings"):
        Catalogue.from_items(schema, [1.5, 2.5], ids={"category": [1, 2]})
    with pytest.raises(ValueError, match=r"Catalogue.ids\['item'\]: expected values in \[0, 4\), got 4"):
        Catalogue.from_items(schema, [1, 2, 3, 4], ids={"category": [1, 2, 1, 1]})


def wrong(field, value, key=None):
    def change(known):
        if key is not None:
            value_ = (
                {**known[field], key: value(known[field][key])}
                if value
                else {k: v for k, v in known[field].items() if k != key}
            )
            return {**known, field: value_}
        return {**known, field: value(known[field])}

    return change


def at(position, value):
    """A change of one number."""

    def change(array):
        array = array.copy()
        array[position] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (wrong("raw", lambda raw: raw[:2]), ValueError, "ids['item']: expected shape [3], got [4]"),
        (wrong("ids", None, "category"), ValueError, "(missing ['category'], extra [])"),
        (wrong("ids", lambda ids: {**ids, "shop": ids["item"]}), ValueError, "(missing [], extra ['shop'])"),
        (wrong("ids", lambda ids: ids.astype(np.int64), "item"), TypeError, "ids['item']: expected dtype int32, got int64"),
        (wrong("ids", lambda ids: ids[:, :2], "tags"), ValueError, "ids['tags']: expected shape [4, 3], got [4, 2]"),
        (wrong("ids", at((2, 1), 9), "tags"), ValueError, "ids['tags']: expected values in [0, 9), got 9 at position [2, 1]"),
        (wrong("ids", at(3, -1), "category"), ValueError, "ids['category']: expected values in [0, 6), got -1 at position [3]"),
        (wrong("ids", at(0, 1), "category"), ValueError, "ids['category']: expected zeros in row 0"),
        (wrong("floats", lambda x: x[:, :0]), ValueError, "floats: expected shape [4, 1], got [4, 0]"),
        (wrong("floats", at((1, 0), np.nan)), ValueError, "floats: expected finite values, got nan at position [1, 0]"),
        (wrong("floats", at((0, 0), 1)), ValueError, "floats: expected zeros in row 0"),
        (wrong("content", at((3, 1), -np.inf)), ValueError, "content: expected finite values, got -inf at position [3, 1]"),
        (wrong("content", lambda x: x.astype(np.float16)), TypeError, "content: expected dtype float32, got float16"),
        (wrong("content", at((0, 1), 1)), ValueError, "content: expected zeros in row 0"),
        (wrong("signature", lambda x: x.astype(np.int32)), TypeError, "signature: expected dtype uint32, got int32"),
        (wrong("signature", lambda x: x[:, 0]), ValueError, "signature: expected shape [4, any], got [4]"),
        (wrong("signature", lambda x: x[:, :0]), ValueError, "signature: expected at least 1 word, got 0"),
        (wrong("side", None, "bid"), ValueError, "(missing ['bid'], extra [])"),
        (wrong("side", at(2, np.nan), "bid"), ValueError, "side['bid']: expected finite values, got nan at position [2]"),
        (wrong("side", at(0, 1), "bid"), ValueError, "side['bid']: expected zeros in row 0"),
    ],
)
@pytest.mark.parametrize("block", [validate.BLOCK, 2])
def test_a_wrong_table_is_named(monkeypatch, block, change, error, message):
    monkeypatch.setattr(validate, "BLOCK", block)
    with pytest.raises(error, match=re.escape(message)):
        Catalogue(**change(parts()))


def test_content_or_signatures():
    known = parts()
    assert Catalogue(**{**known, "content": None}).features([1]).content is None  # signatures are ready
    with pytest.raises(ValueError, match="content: expected float32 .* or a ready signature, got neither"):
        Catalogue(**{**known, "content": None, "signature": None})
    with pytest.raises(ValueError, match="content: expected None"):
        Catalogue(**{**known, "schema": dataclasses.replace(SCHEMA, content=0)})


def test_with_signatures_and_with_content_leave_the_old_one_alone():
    catalogue = Catalogue(**{**parts(), "signature": None})
    signed = catalogue.with_signatures(np.full([4, 2], 7, np.uint32))
    assert catalogue.signature is None and signed.signature is not None
    richer = signed.with_content(np.pad(np.ones([3, 5], np.float32), ((1, 0), (0, 0))))
    assert richer.schema == dataclasses.replace(SCHEMA, content=5)
    assert richer.signature is None  # they were of the old content
    assert signed.schema == SCHEMA
    with pytest.raises(ValueError, match=r"content: expected shape \[4, E\], got \[4\]"):
        catalogue.with_content(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"content: expected shape \[4, 5\], got \[3, 5\]"):
        catalogue.with_content(np.zeros([3, 5], np.float32))
    with pytest.raises(ValueError, match=r"signature: expected shape \[4, any\], got \[3, 2\]"):
        catalogue.with_signatures(np.zeros([3, 2], np.uint32))


# check_item_features


def test_item_features_may_be_jax_arrays():
    features = Catalogue(**parts()).features(1)
    check_item_features(SCHEMA, dataclasses.replace(features, floats=jnp.ones(1)), batched=False)
    with pytest.raises(ValueError, match="floats: expected finite values, got nan"):
        check_item_features(SCHEMA, dataclasses.replace(features, floats=jnp.full(1, jnp.nan)), batched=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"floats": np.zeros([2, 1])}, TypeError, "ItemFeatures.floats: expected dtype float32, got float64"),
        ({"floats": np.zeros(1, np.float32)}, ValueError, "ItemFeatures.floats: expected shape [any, 1], got [1]"),
        ({"floats": np.zeros([3, 1], np.float32)}, ValueError, "ItemFeatures.ids['item']: expected shape [3], got [2]"),
        ({"ids": {}}, ValueError, "missing ['category', 'item', 'tags']"),
        ({"ids": None}, TypeError, "ItemFeatures.ids: expected a dict with keys"),
        ({"content": np.zeros([2, 3], np.float32)}, ValueError, "ItemFeatures.content: expected shape [2, 2], got [2, 3]"),
        (
            {"content": np.full([2, 2], np.inf, np.float32)},
            ValueError,
            "content: expected finite values, got inf at position [0, 0]",
        ),
        ({"content": None, "signature": None}, ValueError, "ItemFeatures.content: expected float32 [..., 2] or a ready"),
        ({"side": {}}, ValueError, "ItemFeatures.side: expected keys ['bid'], got []"),
        ({"side": {"bid": np.zeros(2, np.int32)}}, TypeError, "ItemFeatures.side['bid']: expected dtype float32, got int32"),
    ],
)
def test_wrong_item_features_are_named(changes, error, message):
    features = Catalogue(**parts()).features([1, 2])
    with pytest.raises(error, match=re.escape(message)):
        check_item_features(SCHEMA, dataclasses.replace(features, **changes), batched=True)


def test_item_features_of_another_type_are_refused():
    with pytest.raises(TypeError, match="expected ItemFeatures, got dict"):
        check_item_features(SCHEMA, {}, batched=True)  # pyright: ignore[reportArgumentType]


def test_one_item_has_no_leading_axis():
    features = Catalogue(**parts()).features([1, 2])
    with pytest.raises(ValueError, match=r"floats: expected shape \[1\], got \[2, 1\]"):
        check_item_features(SCHEMA, features, batched=False)
    bare = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
    one = ItemFeatures(ids={"item": np.int32(9), "category": np.int32(1)}, floats=np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"ids\['item'\]: expected values in \[0, 9\), got 9 at the only position"):
        check_item_features(bare, one, batched=False)
