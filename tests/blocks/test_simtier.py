"""SimTier: the block's inputs, from content to the head."""

import jax
import numpy as np
import pytest

from aif_jax.blocks import SimTier
from aif_jax.export.functions import axis_bounds
from aif_jax.trees import leaves_by_path
from tests import demo
from tests.blocks import parts
from tests.reference import lsh
from tests.reference import simtier as reference

MODELS = {
    "all behaviours": SimTier(tiers=5, bits=64),
    "the last behaviours": SimTier(tiers=4, bits=32, length=9),
}


@pytest.mark.parametrize("name", MODELS)
def test_head_inputs_are_those_of_the_definition(name):
    """Signatures of candidates and behaviours by their definition, one pair compared at a time."""
    block = MODELS[name]
    model, params = demo.build(blocks=(block,))
    features, items, config = demo.user(model.config, events=19), demo.items(7), model.config

    words = lsh.signed(demo.catalogue().content, params["fitted"][f"signatures_{block.bits}"])
    history = features.history
    mask = history.mask & (np.arange(config.long_length) < (block.length or 24))
    counts = reference.histogram(words[items.ids["item"]], words[history.item], mask, block.tiers)
    assert counts.sum() == 7 * (block.length or 19)
    inputs = jax.jit(lambda params: parts.head_inputs(block, model, params, features, items)[-1])(params)
    np.testing.assert_allclose(inputs, np.log1p(counts), rtol=1e-6)


def test_an_exported_function_takes_the_places_that_count():
    config = demo.config()
    assert SimTier(length=9).least_history(config) == 9 < config.long_length
    assert SimTier(length=config.long_length).least_history(config) == SimTier().least_history(config) == 1
    model, params = demo.build(blocks=(SimTier(tiers=4, bits=32, length=9),))
    assert axis_bounds(model, leaves_by_path(params))["l"] == (9, config.history_length)
