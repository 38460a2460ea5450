"""COLD: its inputs are the features themselves, next to each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import layers
from aif_jax.blocks import Concatenation
from tests import demo
from tests.blocks import parts


@pytest.fixture(scope="module")
def cold():
    """The model without towers, and its jitted joint function."""
    model, params = demo.build(**demo.VARIANTS["cold"])
    return model, params, jax.jit(model.joint)


def test_the_order_of_the_short_history_does_not_matter(cold):
    model, params, joint = cold
    features, items = demo.user(model.config, events=6), demo.items(6)
    order = np.array([3, 1, 0, 2, 5, 4, *range(6, 24)])
    shuffled = dataclasses.replace(features, history=jax.tree.map(lambda x: x[order], features.history))
    np.testing.assert_allclose(joint(params, shuffled, items), joint(params, features, items), atol=1e-6)


@pytest.mark.parametrize("item_content", [True, False])
def test_head_inputs_are_the_features(item_content):
    block = Concatenation()
    model, params = demo.build(towers=None, blocks=(block,), item_content=item_content)
    config, features, items = model.config, demo.user(model.config, events=9), demo.items(3)

    @jax.jit
    def run(params):
        state, rows = model.user(params, features), jax.vmap(model.item, (None, 0))(params, items)
        embedded = layers.embed_behaviours(params, config.schema, features.history)
        return parts.first_layer(block.score({}, state, rows, parts.identity(block, config))), embedded

    inputs, embedded = jax.tree.map(np.asarray, run(params))
    tables, mask = jax.tree.map(np.asarray, params["embedding"]), features.history.mask
    short, long = embedded[:6][mask[:6]].mean(0), embedded[mask].mean(0)
    interests = tables["interests"][2]  # of (2, 0) the 0 is padding
    user = np.concatenate([tables["gender"][1], interests, features.floats, short, long])
    for c in range(3):
        item, category, tags = (items.ids[name][c] for name in ("item", "category", "tags"))
        bag = tables["tags"][tags[tags > 0]]
        own = [tables["item"][item], tables["category"][category], bag.mean(0) if len(bag) else np.zeros(8)]
        content = [items.content[c]] if item_content else []
        product = short * (tables["item"][item] + tables["category"][category])
        expected = np.concatenate([user, *own, items.floats[c], *content, product])
        np.testing.assert_allclose(inputs[c], expected, rtol=1e-4, atol=1e-5)


def test_it_needs_no_towers(cold):
    model, params, _ = cold
    assert params["user"] == params["item"] == params["blocks"] == {}
    state = jax.eval_shape(model.user, params, demo.user(model.config))
    rows = jax.eval_shape(jax.vmap(model.item, (None, 0)), params, demo.items(4))
    assert state.vector.shape == (0,) and rows.vector.shape == (4, 0)


def test_next_to_towers_both_enter_the_head():
    model, params = demo.build(blocks=(Concatenation(),))
    assert set(params["head"]["first"]["kernels"]) == {"tower", "concatenation"}
    features, items = demo.user(model.config), demo.items(4)
    joint, kernels = jax.jit(model.joint), params["head"]["first"]["kernels"]
    scores = joint(params, features, items)
    for name in kernels:
        silent = kernels | {name: jax.tree.map(jnp.zeros_like, kernels[name])}
        changed = params | {"head": params["head"] | {"first": params["head"]["first"] | {"kernels": silent}}}
        assert np.abs(joint(changed, features, items) - scores).max() > 1e-4
