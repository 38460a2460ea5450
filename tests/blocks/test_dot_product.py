"""The dot products added to the logit: by hand, in every block that has one, and in the two-tower model."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import aif_jax as aif
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


EXACT = [dataclasses.replace(b, dot_product=True) if hasattr(b, "dot_product") else b for b in demo.VARIANTS["exact"]["blocks"]]


@pytest.mark.parametrize("blocks", [demo.VARIANTS["dot products"]["blocks"], tuple(EXACT)], ids=["approximate", "exact"])
def test_each_is_added_to_the_logits_of_the_same_head(blocks):
    """A block without its dot product gives the same logits less what the dot product added."""
    model, params = demo.build(blocks=blocks)
    features, items = demo.user(model.config), demo.items(5)
    dotted = [block for block in blocks if getattr(block, "dot_product", False)]
    assert len(dotted) == 2

    def without(block):
        changed = dataclasses.replace(block, dot_product=False)
        return aif.build(model.config.replace(blocks=tuple(changed if b is block else b for b in blocks)))

    @jax.jit
    def run(params):
        state, rows = model.user(params, features), jax.vmap(model.item, (None, 0))(params, items)
        kernels = params["head"]["first"]["kernels"]
        added = [b.score(params["blocks"][b.name], state, rows, kernels[b.name]).logit for b in dotted]
        others = [without(b).interaction(params, state, rows) for b in dotted]
        return model.interaction(params, state, rows), added, others, rows.vector.sum(-1)

    logits, added, others, total = run(params)
    for part, other in zip(added, others, strict=True):
        assert np.ptp(np.asarray(part)) > 1e-3
        np.testing.assert_allclose(logits - other, part, atol=1e-5)
    popularity = params["blocks"]["dot_product"]["popularity"]
    shifted = params | {"blocks": params["blocks"] | {"dot_product": {"popularity": popularity + 0.5}}}
    np.testing.assert_allclose(run(shifted)[0] - logits, 0.5 * total, atol=1e-5)
