import jax
import pytest

import aif_jax as aif


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "Config.width: expected at least 1, got 0"),
        ({"architecture": "three_tower"}, "Config.architecture: expected one of"),
        ({"bridges": -1}, "Config.bridges"),
        ({"head_hidden": ()}, "Config.head_hidden"),
        ({"tiers": 1}, "Config.tiers: expected 2 to 64, got 1"),
        ({"tier_windows": (0,)}, "Config.tier_windows: expected ascending numbers of behaviours, at least 1, got \\(0,\\)"),
        ({"tier_windows": (8, 8)}, "Config.tier_windows"),
        ({"sim_fields": ("brand",)}, "Config.sim_fields: expected names among"),
        ({"memory": ("lsh", "attention")}, "Config.memory: expected kinds among"),
        ({"simtier": "fast"}, "Config.simtier"),
        ({"signature_bits": 48}, "Config.signature_bits: expected a multiple of 32"),
        ({"signature_bits": 512}, "Config.signature_bits"),
        ({"codes": 4, "codes_per_item": 5}, "Config.codes_per_item: expected at most codes=4"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        aif.tiny(**change)


def test_signatures_need_content():
    items = (aif.Attribute(name="item", size=5), aif.Attribute(name="category", size=3))
    with pytest.raises(ValueError, match="Config.schema.content: expected a content embedding"):
        aif.Config(schema=aif.Schema(item_attributes=items))
    aif.Config(schema=aif.Schema(item_attributes=items), memory=(), simtier="off")


@pytest.mark.parametrize("config", [aif.tiny(), aif.paper(aif.demo_schema()), aif.tiny(memory=(), simtier="off")])
def test_json_round_trip(config):
    assert aif.Config.from_json(config.to_json()) == config
    assert hash(aif.Config.from_json(config.to_json())) == hash(config)


def test_json_of_a_newer_version_is_refused():
    with pytest.raises(TypeError, match="sharper"):
        aif.Config.from_json(aif.tiny().to_json() | {"sharper": True})


def test_paper_preset_builds():
    config = aif.paper(aif.demo_schema())
    shapes = jax.eval_shape(aif.build(config).init, jax.random.key(0))
    assert shapes["bridge"]["embeddings"].shape == (10, 64)
    assert config.long_length >= 4096
