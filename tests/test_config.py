"""Config: refusals name the field and the way out, JSON there and back; presets: their blocks; each builds and is fitted."""

import dataclasses
import json
import logging
from functools import partial

import jax
import pytest

import aif_jax as aif
from aif_jax import blocks, presets
from aif_jax.registry import BLOCKS
from tests import demo
from tests.refusals import refused

ITEMS_ALONE = aif.Schema(item_attributes=(aif.Attribute(name="item", size=5), aif.Attribute(name="category", size=3)))


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
    for curve in (Curve(), ((1, 2), (3, 4))):  # would train, and could not be saved or opened
        refused(ValueError, "Unknown.curve: expected a number", demo.config, blocks=(made["Unknown"](curve=curve),))
    for name in made:
        del BLOCKS[name]


def test_history_and_content_of_a_config():
    config = aif.Config(schema=ITEMS_ALONE)
    assert not config.reads_content and config.tables == ()
    config = demo.config(short_length=30, long_length=24)
    assert config.history_length == 30 and demo.config().history_length == 24
    assert config.reads_content and not demo.config(item_content=False).reads_content


def test_json_by_hand():
    value = aif.Config(schema=ITEMS_ALONE, blocks=(blocks.Bea(4),)).to_json()
    assert value["blocks"] == [{"block": "Bea", "bridges": 4, "dot_product": False}]
    assert value["towers"] == [64] and value["head"] == {"head": "Mlp", "widths": [64, 32]} and value["sequence"] is True
    assert aif.Schema.from_json(value["schema"]) == ITEMS_ALONE
    fields = demo.config(blocks=(blocks.MatchingStatistics(("item", "category")),))
    assert fields.to_json()["blocks"][0]["fields"] == ["item", "category"]
    config = aif.Config.from_json({"schema": ITEMS_ALONE.to_json(), "blocks": [{"block": "Sim"}]})  # without its defaults
    assert config == aif.Config(schema=ITEMS_ALONE, blocks=(blocks.Sim(),))
    assert blocks.PureSvd(decay=1).decay == 1  # a float may be written without its point


def test_two_classes_of_one_name_and_a_subclass_that_is_not_registered_are_refused():
    Wider = type("Wider", (blocks.Bea,), {})  # which the decorator has not seen: no JSON could name it
    refused(TypeError, "a class made by the decorator `block`", demo.config, blocks=(Wider(),))
    refused(ValueError, r"Config.blocks: expected a tuple, such as \(Bea\(\),\), got Bea\(", demo.config, blocks=blocks.Bea())
    Bea = type("Bea", (blocks.Block,), {"__module__": "somewhere.else"})
    refused(ValueError, "block 'Bea': expected a new name, got one that aif_jax.blocks.bea has registered", blocks.block, Bea)
    assert BLOCKS["Bea"] is blocks.Bea
    assert blocks.block(blocks.Bea) is blocks.Bea  # a module that is imported again
    older, _ = (blocks.block(type("Rerun", (blocks.Block,), {})) for _ in range(2))  # a cell of a notebook that runs again
    refused(TypeError, r"expected a value of Rerun as it was defined last; .* got Rerun\(\)", demo.config, blocks=(older(),))


SCHEMA = demo.schema()
BARE = dataclasses.replace(SCHEMA, content=0)


CONFIGS = {name: partial(demo.config, **changes) for name, changes in demo.VARIANTS.items()}
for name, preset in presets.PRESETS.items():
    CONFIGS |= {name: partial(preset, SCHEMA), f"{name}, no content": partial(preset, BARE)}


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_every_config_builds_and_round_trips(make):
    config = make()
    text = json.dumps(config.to_json())
    read = aif.Config.from_json(json.loads(text))
    assert read == config and hash(read) == hash(config) and json.dumps(read.to_json()) == text
    shapes = jax.eval_shape(lambda key: aif.build(read).init(key, None, fitted={}), jax.random.key(0))
    assert set(shapes) == {"embedding", "user", "item", "blocks", "head", "fitted"}


def test_aif_is_the_model_of_the_study():
    config = presets.aif(SCHEMA)
    assert config.blocks == (
        blocks.MatchingStatistics(("item", "category")),
        blocks.Bea(dot_product=True),
        blocks.LinearMemory(dot_product=True),
        blocks.DotProduct(),
    )
    assert config.long_length == 512 and config.head == aif.heads.Mlp((64, 32)) and config.towers == (64,)


def test_paper_has_the_paper_s_blocks_alone():
    config = presets.paper(SCHEMA)
    assert kinds(config) == [blocks.Bea, blocks.Sim, blocks.LshDin, blocks.SimTier]
    assert config.blocks[0] == blocks.Bea(bridges=10) and not any(getattr(one, "dot_product", False) for one in config.blocks)
    assert config.long_length == 4096 and config.width == 64


def kinds(config: aif.Config) -> list[type]:
    return [type(block) for block in config.blocks]


def test_baselines():
    two_tower, matching, full = (of(SCHEMA) for of in (presets.two_tower, presets.two_tower_matching, presets.full_attention))
    assert two_tower.head == aif.heads.LogitSum() and two_tower.blocks == (blocks.DotProduct(),)
    assert matching.head == aif.heads.Mlp((64, 32)) and kinds(matching) == [blocks.MatchingStatistics, blocks.DotProduct]
    assert kinds(full) == [blocks.MatchingStatistics, blocks.CrossAttention, blocks.TargetAttention, blocks.DotProduct]


def test_without_content_a_line_says_what_is_left_out(caplog):
    with caplog.at_level(logging.WARNING, logger="aif_jax.presets"):
        config, whole = presets.paper(BARE), presets.paper(SCHEMA)
    (record,) = caplog.records
    left_out = "presets.paper: the schema has no content embedding, so the model goes without LshDin, SimTier"
    assert record.getMessage() == left_out
    assert config.blocks == tuple(part for part in whole.blocks if not isinstance(part, blocks.LshDin | blocks.SimTier))


def test_changes_reach_any_field():
    config = presets.aif(SCHEMA, width=16, long_length=64, head=aif.heads.Mlp((8,)))
    assert (config.width, config.long_length, config.head) == (16, 64, aif.heads.Mlp((8,)))
    assert presets.two_tower(SCHEMA, head=aif.heads.Mlp((4,)), blocks=()).head == aif.heads.Mlp((4,))
    refused(ValueError, "Config: expected the fields schema, width, .*, got 'depth'", presets.aif, SCHEMA, depth=3)


def test_every_behaviour_field_is_matched():
    wider = dataclasses.replace(SCHEMA, item_attributes=(*SCHEMA.item_attributes, aif.Attribute(name="brand", size=5)),
                                behaviour_fields=("item", "category", "brand"))  # fmt: skip
    for name in ("aif", "two_tower_matching", "full_attention"):
        assert presets.PRESETS[name](wider).blocks[0] == blocks.MatchingStatistics(("item", "category", "brand"))
