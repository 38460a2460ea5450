"""Schema: what it holds, what it refuses."""

from __future__ import annotations

import json

import pytest

from aif_jax.schema import Attribute, Schema
from tests import demo

ITEM, CATEGORY = Attribute(name="item", size=10), Attribute(name="category", size=4)
TAGS = Attribute(name="tags", size=5, length=3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": ""}, "Attribute.name.*non-empty"),
    ({"name": "a/b"}, "Attribute.name.*a/b"),
    ({"size": 1}, "'x'.size: expected at least 2.*got 1"),
    ({"length": 0}, "'x'.length: expected at least 1, got 0"),
])  # fmt: skip
def test_attribute_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Attribute(**{"name": "x", "size": 3, **changes})


@pytest.mark.parametrize(("changes", "message"), [
    ({"item_attributes": (CATEGORY,)}, "single-valued 'item'"),
    ({"item_attributes": (ITEM, Attribute(name="category", size=4, length=2))}, "single-valued 'category'"),
    ({"item_attributes": (ITEM, CATEGORY, ITEM)}, "names that differ"),
    ({"user_attributes": (ITEM,)}, "names that differ"),
    ({"behaviour_fields": ("item",)}, "behaviour_fields: expected 'category'"),
    ({"behaviour_fields": ("item", "category", "tags")}, "behaviour_fields.*got 'tags'"),
    ({"behaviour_fields": ("item", "category", "shop")}, "behaviour_fields.*got 'shop'"),
    ({"actions": 1}, "Schema.actions: expected at least 2.*got 1"),
    ({"user_floats": -1}, "Schema.user_floats.*got -1"),
    ({"item_floats": -2}, "Schema.item_floats.*got -2"),
    ({"content": -3}, "Schema.content.*got -3"),
])  # fmt: skip
def test_schema_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Schema(**{"item_attributes": (ITEM, CATEGORY, TAGS), **changes})


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (
            Attribute(name="last", size=9, table="item"),
            "'last'.table: expected one of size 9 that shares no table, among {'item': 10, 'category': 4, 'tags': 5}, "
            "got 'item'",
        ),
        (Attribute(name="last", size=10, table="shop"), "'last'.table: expected one of size 10 .* got 'shop'"),
    ],
)
def test_a_shared_table_must_fit(attribute, message):
    with pytest.raises(ValueError, match=message):
        Schema(item_attributes=(ITEM, CATEGORY, TAGS), user_attributes=(attribute,))


def test_tables_may_be_shared_but_not_by_behaviour_fields():
    last, bought = Attribute(name="last", size=10, table="item"), Attribute(name="bought", size=10, length=3, table="item")
    schema = Schema(item_attributes=(ITEM, CATEGORY), user_attributes=(last, bought))
    assert schema.table_sizes == {"item": 10, "category": 4}
    assert (last.table_name, ITEM.table_name) == ("item", "item")
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    brand = Attribute(name="brand", size=10, table="item")
    with pytest.raises(ValueError, match="Attribute 'brand'.table: expected None for a behaviour field, got 'item'"):
        Schema(item_attributes=(ITEM, CATEGORY, brand), behaviour_fields=("item", "category", "brand"))
    with pytest.raises(ValueError, match="'again'.table: expected one of size 10 that shares no table"):
        Schema(item_attributes=(ITEM, CATEGORY), user_attributes=(last, Attribute(name="again", size=10, table="last")))


def test_schema_survives_json():
    schema = demo.schema()
    read = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert read == schema
    assert hash(read) == hash(schema)
    assert read.item_attributes[2] == Attribute(name="tags", size=9, length=3)


def test_schema_of_a_newer_version_is_refused():
    with pytest.raises(TypeError, match="colour"):
        Schema.from_json({**demo.schema().to_json(), "colour": 1})


def test_attribute_look_up_lists_what_there_is():
    schema = demo.schema()
    assert schema.item_attribute("tags").length == 3
    assert schema.user_attribute("gender").size == 3
    with pytest.raises(KeyError, match="'item', 'category', 'tags'.*got 'gender'"):
        schema.item_attribute("gender")
    with pytest.raises(KeyError, match="'gender', 'interests'.*got 'item'"):
        schema.user_attribute("item")
