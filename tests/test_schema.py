"""Schema: what it holds, what it refuses."""

import json

import pytest

from aif_jax import Config
from aif_jax.schema import Attribute, Schema
from tests import demo

ITEM, CATEGORY = Attribute(name="item", size=10), Attribute(name="category", size=4)


def test_tables_may_be_shared_but_not_by_behaviour_fields():
    last, bought = Attribute(name="last", size=10, table="item"), Attribute(name="bought", size=10, length=3, table="item")
    schema = Schema(item_attributes=(ITEM, CATEGORY), user_attributes=(last, bought))
    assert schema.table_sizes == {"item": 10, "category": 4}
    assert (last.table_name, ITEM.table_name) == ("item", "item")
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert "table" not in str(demo.schema().to_json())  # schemas without one keep their fingerprint
    config = demo.config(schema=schema, blocks=())
    assert Config.from_json(config.to_json()) == config
    brand = Attribute(name="brand", size=10, table="item")
    with pytest.raises(ValueError, match="Attribute 'brand'.table: expected None for a behaviour field, got 'item'"):
        Schema(item_attributes=(ITEM, CATEGORY, brand), behaviour_fields=("item", "category", "brand"))
    with pytest.raises(ValueError, match="'again'.table: expected one of size 10 that shares no table"):
        Schema(item_attributes=(ITEM, CATEGORY), user_attributes=(last, Attribute(name="again", size=10, table="last")))


def test_attribute_look_up_lists_what_there_is():
    schema = demo.schema()
    assert schema.item_attribute("tags").length == 3
    assert schema.user_attribute("gender").size == 3
    with pytest.raises(KeyError, match="'item', 'category', 'tags'.*got 'gender'"):
        schema.item_attribute("gender")
    with pytest.raises(KeyError, match="'gender', 'interests'.*got 'item'"):
        schema.user_attribute("item")
