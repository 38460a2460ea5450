"""Schema and Vocabulary: what they hold, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.config import demo_schema
from aif_jax.data.schema import Attribute, Schema, Vocabulary

ITEM, CATEGORY = Attribute(name="item", size=10), Attribute(name="category", size=4)
TAGS = Attribute(name="tags", size=5, length=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "Attribute.name.*non-empty"),
        ({"name": "a/b"}, "Attribute.name.*a/b"),
        ({"size": 1}, "'x'.size: expected at least 2.*got 1"),
        ({"length": 0}, "'x'.length: expected at least 1, got 0"),
    ],
)
def test_attribute_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Attribute(**{"name": "x", "size": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_attributes": (CATEGORY,)}, "single-valued 'item'"),
        ({"item_attributes": (ITEM, Attribute(name="category", size=4, length=2))}, "single-valued 'category'"),
        ({"item_attributes": (ITEM, CATEGORY, ITEM)}, "names must differ"),
        ({"user_attributes": (ITEM,)}, "names must differ"),
        ({"behaviour_fields": ("item",)}, "behaviour_fields: expected 'category'"),
        ({"behaviour_fields": ("item", "category", "tags")}, "behaviour_fields.*got 'tags'"),
        ({"behaviour_fields": ("item", "category", "shop")}, "behaviour_fields.*got 'shop'"),
        ({"actions": 1}, "Schema.actions: expected at least 2.*got 1"),
        ({"user_floats": -1}, "Schema.user_floats.*got -1"),
        ({"item_floats": -2}, "Schema.item_floats.*got -2"),
        ({"content": -3}, "Schema.content.*got -3"),
    ],
)
def test_schema_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Schema(**{"item_attributes": (ITEM, CATEGORY, TAGS), **changes})


def test_schema_survives_json():
    schema = demo_schema()
    read = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert read == schema
    assert hash(read) == hash(schema)
    assert read.item_attributes[2] == Attribute(name="tags", size=9, length=3)


def test_schema_of_a_newer_version_is_refused():
    with pytest.raises(TypeError, match="colour"):
        Schema.from_json({**demo_schema().to_json(), "colour": 1})


def test_attribute_look_up_lists_what_there_is():
    schema = demo_schema()
    assert schema.item_attribute("tags").length == 3
    assert schema.user_attribute("gender").size == 3
    with pytest.raises(KeyError, match="'gender'.*'item', 'category', 'tags'"):
        schema.item_attribute("gender")
    with pytest.raises(KeyError, match="'item'.*'gender', 'interests'"):
        schema.user_attribute("item")


def test_vocabulary_by_hand():
    vocabulary = Vocabulary([30, 10, 20, 10])
    assert len(vocabulary) == 4
    assert vocabulary.raw.tolist() == [10, 20, 30]
    rows = vocabulary.encode(np.array([[10, 30], [31, 9], [25, 20]]))
    assert rows.dtype == np.int32
    assert rows.tolist() == [[1, 3], [0, 0], [0, 2]]


def test_vocabulary_of_strings():
    vocabulary = Vocabulary(["shoe", "hat"])
    assert vocabulary.encode(["hat", "shoes", "", "shoe"]).tolist() == [1, 0, 0, 2]


def test_empty_vocabulary_knows_nothing():
    assert len(Vocabulary([])) == 1
    assert Vocabulary(np.zeros(0, np.int64)).encode([1, 2]).tolist() == [0, 0]
    assert Vocabulary([5]).encode(np.zeros((0, 2), np.int64)).shape == (0, 2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_vocabulary_equals_a_dict(raw, asked):
    rows = {value: row for row, value in enumerate(sorted(set(raw)), start=1)}
    asked = asked + raw
    got = Vocabulary(np.array(raw, np.int64)).encode(np.array(asked, np.int64))
    assert got.tolist() == [rows.get(value, 0) for value in asked]


@pytest.mark.parametrize(
    ("raw", "asked", "message"),
    [
        ([1, 2], ["1"], "expected integers like the vocabulary, got dtype <U1"),
        (["a"], [1], "expected strings like the vocabulary, got dtype int64"),
        ([1, 2], [1.0], "expected integers like the vocabulary, got dtype float64"),
    ],
)
def test_ids_of_another_kind_are_refused(raw, asked, message):
    """They would all be unknown, and nobody would notice."""
    with pytest.raises(TypeError, match=message):
        Vocabulary(raw).encode(asked)


def test_a_vocabulary_of_floats_is_refused():
    with pytest.raises(TypeError, match="expected integers or strings, got dtype float64"):
        Vocabulary([1.0, float("nan")])
