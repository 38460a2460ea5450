"""The dot product of the two-tower model, by hand; those of other blocks are in test_definitions.py and test_head.py."""

import dataclasses
import math

import jax
import numpy as np

from tests import demo


def test_two_tower_is_a_dot_product_and_a_bias_and_does_not_see_the_long_history():
    model, params = demo.build(**demo.VARIANTS["two_tower"])
    features, items = demo.user(model.config), demo.items(6)

    @jax.jit
    def run(params):
        return (
            model.user(params, features),
            jax.vmap(model.item, (None, 0))(params, items),
            model.joint(params, features, items),
        )

    state, rows, logits = run(params)
    popularity, bias = params["blocks"]["dot_product"]["popularity"], params["head"]["bias"]
    np.testing.assert_allclose(logits, rows.vector @ (state.vector / math.sqrt(8) + popularity) + bias, rtol=1e-5, atol=1e-6)
    assert set(params["head"]) == {"bias"}
    short = model.config.short_length
    other = demo.user(model.config, seed=9).history
    spliced = jax.tree.map(lambda a, b: np.concatenate([a[:short], b[short:]]), features.history, other)
    assert not np.array_equal(spliced.item, features.history.item)
    joint = jax.jit(model.joint)
    changed = dataclasses.replace(features, history=spliced)
    np.testing.assert_array_equal(joint(params, features, items), joint(params, changed, items))
