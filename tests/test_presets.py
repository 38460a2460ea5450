"""Presets: which blocks, with and without content, and that each builds, fits and round trips."""

import dataclasses
import json
import logging

import jax
import pytest

import aif_jax as aif
from aif_jax import blocks, presets
from tests import demo
from tests.refusals import refused

SCHEMA = demo.schema()
BARE = dataclasses.replace(SCHEMA, content=0)


@pytest.mark.parametrize("schema", [SCHEMA, BARE], ids=["content", "no content"])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_builds_and_round_trips(name, schema):
    config = presets.PRESETS[name](schema)
    assert aif.Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    model = aif.build(config)
    shapes = jax.eval_shape(lambda key: model.init(key, None, fitted={}), jax.random.key(0))
    assert set(shapes) == {"embedding", "user", "item", "blocks", "head", "fitted"}
    assert hash(config) == hash(presets.PRESETS[name](schema)) and presets.PRESETS[name].__name__ == name


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
    shapes = jax.eval_shape(lambda key: aif.build(config).init(key, None, fitted={}), jax.random.key(0))
    assert shapes["blocks"]["bea"]["bridges"].shape == (10, 64)


def kinds(config: aif.Config) -> list[type]:
    return [type(block) for block in config.blocks]


def test_baselines():
    two_tower, full = presets.two_tower(SCHEMA), presets.full_attention(SCHEMA)
    matching = presets.two_tower_matching(SCHEMA)
    assert two_tower.head == aif.heads.LogitSum() and two_tower.blocks == (blocks.DotProduct(),)
    assert matching.head == aif.heads.Mlp((64, 32)) and kinds(matching) == [blocks.MatchingStatistics, blocks.DotProduct]
    attention = [blocks.CrossAttention, blocks.TargetAttention]
    assert kinds(full) == [blocks.MatchingStatistics, *attention, blocks.DotProduct]


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
