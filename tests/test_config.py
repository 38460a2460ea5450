"""Config: every refusal names the field and the way out; JSON there and back."""

import json

import jax
import pytest

import aif_jax as aif
from aif_jax import blocks
from aif_jax.registry import BLOCKS
from tests import demo
from tests.refusals import refused

BARE = aif.Schema(item_attributes=(aif.Attribute(name="item", size=5), aif.Attribute(name="category", size=3)))


def test_blocks_of_yours_are_checked_as_far_as_their_types_are_known():
    class Curve:
        pass

    annotations = {"size": "int", "curve": "Curve | None"}  # a module knows no `Curve`
    made = {}
    for name, types in (("Known", {"size": "int"}), ("Unknown", annotations)):
        fields = {"__annotations__": types, "__module__": __name__, "size": 3, "curve": None}
        made[name] = blocks.block(type(name, (blocks.Block,), fields))
    refused(ValueError, "Known.size: expected int, got 2.5", made["Known"], size=2.5)
    assert made["Unknown"](size=2.5, curve=Curve()).size == 2.5
    for name in made:
        del BLOCKS[name]


def test_history_and_content_of_a_config():
    config = aif.Config(schema=BARE)
    assert not config.reads_content and config.tables == ()
    jax.eval_shape(lambda key: aif.build(config).init(key, None, fitted={}), jax.random.key(0))
    config = demo.config(short_length=30, long_length=24)
    assert config.history_length == 30 and demo.config().history_length == 24
    assert config.reads_content and not demo.config(item_content=False).reads_content


def test_a_subclass_that_is_not_registered_is_refused():
    class Wider(blocks.Bea):
        """A block that the decorator has not seen, so that no JSON could name it."""

    refused(TypeError, "classes made by the decorator `block`", demo.config, blocks=(Wider(),))


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_json_round_trip(name):
    config = demo.config(**demo.VARIANTS[name])
    text = json.dumps(config.to_json())
    read = aif.Config.from_json(json.loads(text))
    assert read == config and hash(read) == hash(config)
    assert json.dumps(read.to_json()) == text


def test_json_by_hand():
    value = aif.Config(schema=BARE, blocks=(blocks.Bea(4),)).to_json()
    assert value["blocks"] == [{"block": "Bea", "bridges": 4, "dot_product": False}]
    assert value["towers"] == [64] and value["head"] == {"head": "Mlp", "widths": [64, 32]} and value["sequence"] is True
    assert aif.Schema.from_json(value["schema"]) == BARE
    fields = demo.config(blocks=(blocks.MatchingStatistics(("item", "category")),))
    assert fields.to_json()["blocks"][0]["fields"] == ["item", "category"]
    config = aif.Config.from_json({"schema": BARE.to_json(), "blocks": [{"block": "Sim"}]})  # without its defaults
    assert config == aif.Config(schema=BARE, blocks=(blocks.Sim(),))
    assert blocks.PureSvd(decay=1).decay == 1  # a float may be written without its point


def test_two_classes_of_one_name_are_refused():
    Bea = type("Bea", (), {"__module__": "somewhere.else"})
    refused(ValueError, "block 'Bea': expected a new name, got one that aif_jax.blocks.bea has registered", BLOCKS.add, Bea)
    assert BLOCKS["Bea"] is blocks.Bea
    assert BLOCKS.add(blocks.Bea) is blocks.Bea  # a module that is imported again
