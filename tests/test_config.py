"""Config: every refusal names the field and the way out; JSON there and back."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, serving, train
from aif_jax.config import BLOCKS, block_from_json, register
from tests import demo

BARE = aif.Schema(item_attributes=(aif.Attribute(name="item", size=5), aif.Attribute(name="category", size=3)))


@pytest.mark.parametrize(("changes", "message"), [
    ({"width": 0}, "Config.width: expected at least 1, got 0"),
    ({"short_length": 0}, "Config.short_length: expected at least 1, got 0"),
    ({"long_length": -4}, "Config.long_length: expected at least 1, got -4"),
    ({"width": 2.5}, "Config.width: expected int, got 2.5"),
    ({"width": np.int64(8)}, "Config.width: expected int, got np.int64(8)"),
    ({"long_length": True}, "Config.long_length: expected int, got True"),
    ({"sequence": "no"}, "Config.sequence: expected bool, got 'no'"),
    ({"objectives": "click"}, "Config.objectives: expected a tuple of names, got 'click'"),
    ({"towers": (16, 0)}, "Config.towers: expected a tuple of widths of at least 1, got (16, 0)"),
    ({"towers": 16}, "Config.towers: expected a tuple of widths of at least 1, got 16"),
    ({"head": [16]}, "Config.head: expected a tuple of widths of at least 1, got [16]"),
    ({"head": None}, "Config.head: expected a tuple of widths of at least 1, got None"),
    ({"head": (2.5,)}, "Config.head: expected a tuple of widths of at least 1, got (2.5,)"),
    ({"blocks": (blocks.Bea(), blocks.Bea(bridges=4))},
     "Config.blocks: expected blocks of different names, got ['bea', 'bea']"),
    ({"blocks": (blocks.Sim("category"), blocks.Sim("category", slots=2))},
     "Config.blocks: expected blocks of different names, got ['sim_category', 'sim_category']"),
    ({"head": (), "blocks": (blocks.DotProduct(), blocks.Bea(bridges=4))},
     "Config.head: expected hidden widths for the inputs of Bea(bridges=4, dot_product=False), got (): " "give head=(64, 32)"),
    ({"towers": None, "blocks": ()}, "Config.blocks: expected at least one block in a model without towers, got none"),
    ({"blocks": (blocks.Sim("brand"),)},
     "Sim.field: expected one of schema.behaviour_fields ('item', 'category'), got 'brand'"),
    ({"head": (), "blocks": ()}, "Config.blocks: expected at least one block in a model without a head, got none"),
])  # fmt: skip
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        demo.config(**changes)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: blocks.Bea(bridges=2.5), "Bea.bridges: expected int, got 2.5"),
    (lambda: blocks.Sim(7), "Sim.field: expected str, got 7"),
    (lambda: blocks.SimTier(length=512.0), "SimTier.length: expected int or None, got 512.0"),
    (lambda: blocks.SimTier(windows=(4, 8.0)), "SimTier.windows: expected tuple[int, ...], got (4, 8.0)"),
    (lambda: blocks.DecayedSim("item", half_life="day"), "DecayedSim.half_life: expected float, got 'day'"),
    (lambda: aif.Attribute(name="item", size="9"), "Attribute.size: expected int, got '9'"),
    (lambda: dataclasses.replace(BARE, content=4.0), "Schema.content: expected int, got 4.0"),
    (lambda: serving.ServingConfig(buckets=512), "ServingConfig.buckets: expected tuple[int, ...], got 512"),
    (lambda: serving.ServingConfig(budget="1s"), "ServingConfig.budget: expected float or None, got '1s'"),
    (lambda: train.NextItem(negatives="15"), "NextItem.negatives: expected int, got '15'"),
    (lambda: train.Liked(threshold=3.5), "Liked.threshold: expected int, got 3.5"),
    (lambda: train.SparseConfig(min_rows=1e6), "SparseConfig.min_rows: expected int, got 1000000.0"),
])  # fmt: skip
def test_a_value_of_another_type_is_refused_where_it_is_given(make, message):
    """And not where the model is built, or where the config cannot be written as JSON."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
    assert blocks.DecayedSim("item", half_life=3).half_life == 3  # a float may be written without its point


def test_blocks_of_yours_are_checked_as_far_as_their_types_are_known():
    class Curve:
        pass

    annotations = {"size": "int", "curve": "Curve | None"}  # a module knows no `Curve`
    made = {}
    for name, types in (("Known", {"size": "int"}), ("Unknown", annotations)):
        fields = {"__annotations__": types, "__module__": __name__, "size": 3, "curve": None}
        made[name] = blocks.block(type(name, (blocks.Block,), fields))
    with pytest.raises(ValueError, match="Known.size: expected int, got 2.5"):
        made["Known"](size=2.5)
    assert made["Unknown"](size=2.5, curve=Curve()).size == 2.5
    for name in made:
        del BLOCKS[name]


@pytest.mark.parametrize(
    "block",
    [blocks.Bea(), blocks.Sim(), blocks.LinearMemory(), blocks.DotProduct(), blocks.CrossAttention(), blocks.TargetAttention()],
    ids=lambda block: type(block).__name__,
)
def test_a_block_that_reads_the_item_vector_needs_towers(block):
    name = type(block).__name__
    with pytest.raises(ValueError, match=f"{name}: expected Config.towers, got None: the block reads the item vector"):
        demo.config(towers=None, blocks=(block,))


@pytest.mark.parametrize(("block", "name"), [
    (blocks.LshDin(), "Signatures"),
    (blocks.SimTier(), "Signatures"),
    (blocks.CosineTiers(), "UnitContent"),
    (blocks.SimTierCodes(), "SimTierCodes"),
])  # fmt: skip
def test_a_block_on_content_needs_content(block, name):
    message = f"{name}: expected schema.content > 0, got 0: give the data a content embedding, or leave the block out"
    with pytest.raises(ValueError, match=re.escape(message)):
        aif.Config(schema=BARE, blocks=(block,))
    with_content = dataclasses.replace(BARE, content=4)
    assert aif.Config(schema=with_content, blocks=(block,)).blocks == (block,)


def test_the_default_config_needs_no_content():
    config = aif.Config(schema=BARE)
    assert not config.reads_content and config.tables == ()
    jax.eval_shape(lambda key: aif.build(config).init(key, None, fitted={}), jax.random.key(0))


@pytest.mark.parametrize("value", ["bea", blocks.Bea, blocks.Signatures(), None], ids=repr)
def test_what_is_no_block_is_refused(value):
    message = "Config.blocks: expected values of classes made by the decorator `block`, got "
    with pytest.raises(TypeError, match=re.escape(message + repr(value))):
        demo.config(blocks=(value,))


def test_a_subclass_that_is_not_registered_is_refused():
    class Wider(blocks.Bea):
        """A block that the decorator has not seen, so that no JSON could name it."""

    with pytest.raises(TypeError, match="classes made by the decorator `block`"):
        demo.config(blocks=(Wider(),))


def test_models_without_towers_or_head():
    cold = demo.config(towers=None, blocks=(blocks.Concatenation(),))
    assert cold.head == (16, 8) and cold.towers is None
    two_tower = demo.config(head=(), blocks=(blocks.DotProduct(),))
    assert two_tower.head == ()


def test_history_tables_and_content():
    config = demo.config(short_length=30, long_length=24)
    assert config.history_length == 30 and demo.config().history_length == 24
    shared = demo.config(blocks=(blocks.LshDin(bits=64), blocks.SimTier(bits=64), blocks.CosineTiers()))
    assert [table.name for table in shared.tables] == ["signatures_64", "unit_content"]
    apart = demo.config(blocks=(blocks.LshDin(bits=64), blocks.SimTier(bits=32)))
    assert [table.name for table in apart.tables] == ["signatures_64", "signatures_32"]
    assert config.reads_content and not demo.config(item_content=False).reads_content


def test_replace_checks_again():
    config = demo.config()
    assert config.replace(width=16).width == 16 and config.width == 8
    with pytest.raises(ValueError, match="Config.width"):
        config.replace(width=0)


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_json_round_trip(name):
    config = demo.config(**demo.VARIANTS[name])
    text = json.dumps(config.to_json())
    read = aif.Config.from_json(json.loads(text))
    assert read == config and hash(read) == hash(config)
    assert json.dumps(read.to_json()) == text


def test_json_by_hand():
    value = aif.Config(schema=BARE, blocks=(blocks.Bea(4), blocks.SimTierCodes(windows=(2, 6)))[:1]).to_json()
    assert value["blocks"] == [{"block": "Bea", "bridges": 4, "dot_product": False}]
    assert value["towers"] == [64] and value["head"] == [64, 32] and value["sequence"] is True
    assert aif.Schema.from_json(value["schema"]) == BARE
    assert aif.Config(schema=BARE, towers=None, blocks=(blocks.Concatenation(),)).to_json()["towers"] is None
    windows = demo.config(blocks=(blocks.SimTier(windows=(2, 6)),))
    assert windows.to_json()["blocks"][0]["windows"] == [2, 6]


def test_json_may_leave_defaults_out():
    config = aif.Config.from_json({"schema": BARE.to_json(), "blocks": [{"block": "Sim"}]})
    assert config == aif.Config(schema=BARE, blocks=(blocks.Sim(),))


def test_json_of_a_newer_version_is_refused():
    value = demo.config().to_json()
    with pytest.raises(ValueError, match=r"config: expected fields among \['blocks', .*'width'\], got \['sharper'\]"):
        aif.Config.from_json(value | {"sharper": True})
    with pytest.raises(ValueError, match=r"block 'Bea': expected fields among \['bridges', 'dot_product'\], got \['sharper'\]"):
        aif.Config.from_json(value | {"blocks": [{"block": "Bea", "sharper": True}]})


@pytest.mark.parametrize("wrong", [{"blocks": [None]}, {"schema": None}, {"schema": {"sharper": True}}, {"width": {}}])
def test_what_is_no_record_of_a_config_is_refused(wrong):
    with pytest.raises(ValueError, match="config|Config.width: expected int, got {}"):
        aif.Config.from_json(demo.config().to_json() | wrong)
    with pytest.raises(ValueError, match="config: expected a record that `to_json` made, got another: KeyError"):
        aif.Config.from_json({})


def test_an_unknown_block_says_what_to_import():
    message = r"block: expected one of \['Bea', .*'TargetAttention'.*\], got 'Mine'; import the module"
    with pytest.raises(ValueError, match=message):
        aif.Config.from_json(demo.config().to_json() | {"blocks": [{"block": "Mine"}]})
    with pytest.raises(ValueError, match="block: expected one of .*got None"):
        block_from_json({})


def test_a_wrong_field_of_a_block_in_json_is_named():
    with pytest.raises(ValueError, match="Bea.bridges: expected at least 1, got 0"):
        block_from_json({"block": "Bea", "bridges": 0})


def test_two_classes_of_one_name_are_refused():
    Bea = type("Bea", (), {"__module__": "somewhere.else"})
    with pytest.raises(ValueError, match="block 'Bea': expected a new name, got one that aif_jax.blocks.bea has registered"):
        register(Bea)
    assert BLOCKS["Bea"] is blocks.Bea
    assert register(blocks.Bea) is blocks.Bea  # a module that is imported again
