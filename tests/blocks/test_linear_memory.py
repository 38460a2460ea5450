"""Linear attention over the long history: its sums against the plain sum over the history; with it, DIN on LSH."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import layers
from aif_jax.blocks import LinearMemory, LshDin
from aif_jax.blocks.linear_memory import mean, sum_events, sum_softmax, sum_softmax_trained
from aif_jax.blocks.signatures import signs
from tests import demo
from tests.blocks import parts
from tests.reference import lsh as lsh_reference
from tests.reference import memory as reference

C, L, D, H, K = 5, 11, 6, 3, 7
BLOCKS = {"lsh": LshDin(bits=64), "learned": LinearMemory(width=K, keys="linear", dot_product=True)}
DRAWN = np.random.default_rng(7).normal(size=(D + 1, K)).astype(np.float32)
QUERY = {"kernel": DRAWN[:D], "bias": DRAWN[D]}
"""Parameters of the learned queries, which are an affine map of the item vector."""


@pytest.mark.parametrize("kept", [L, 6, 0])
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_head_gets_mean_and_deviation_of_the_plain_sum(kind, kept):
    """Candidates are signatures or item vectors; padding holds NaN and has no share; an empty history gives zeros."""
    rng, lsh, block = np.random.default_rng(0), kind == "lsh", BLOCKS[kind]
    if lsh:
        query, keys = (rng.integers(0, 2**32, (n, 2), dtype=np.uint32) for n in (C, L))
        queries, plain = ([lsh_reference.signs(row) for row in words] for words in (query, keys))
    else:
        query, keys = (rng.normal(size=shape).astype(np.float32) for shape in ((C, D), (L, K)))
        queries, plain = query @ QUERY["kernel"] + QUERY["bias"], keys
    mask, values = np.arange(L) < kept, rng.normal(size=(L, D)).astype(np.float32)
    values[kept:] = np.nan
    kernel = rng.normal(size=(D, H)).astype(np.float32)
    rows = parts.rows(block, vector=jnp.asarray(query), fitted={"signatures_64": jnp.asarray(query)})
    kernels = {"mean": jnp.asarray(2.0 * kernel), "deviation": jnp.asarray(kernel)}

    @jax.jit
    def run(keys, values):
        past = sum_events((signs(keys) if lsh else keys).T, values, jnp.asarray(mask))
        terms = block.score({"query": QUERY}, parts.state(block, past), rows, kernels)
        return mean(past), parts.first_layer(terms, query), terms.logit

    average, inputs, logit = run(jnp.asarray(keys), jnp.asarray(values))
    read = reference.deviation(np.array(queries), np.array(plain), values, mask) if kept else np.zeros((C, D))
    np.testing.assert_allclose(average, reference.mean(values, mask), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inputs, 2 * (average @ kernel)[None] + read @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logit, 0 if lsh else (read * query).sum(-1) / D**0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [LshDin(bits=32), LinearMemory(width=32), LinearMemory(width=32, keys="linear")], ids=repr)
def test_training_and_serving_give_a_candidate_the_same(block):
    """Softmax keys have a form for training."""
    model, params = demo.build(blocks=(block,))
    own = params["blocks"].get(block.name, {}) | params["fitted"].get(block.name, {})
    kernels = dict.fromkeys(("mean", "deviation"), jnp.asarray(np.random.default_rng(0).normal(size=(8, H)), jnp.float32))

    @jax.jit
    def shares(params):
        row = jax.vmap(model.item, (None, 0))(params, demo.items(4))
        states = (model.user(params, demo.user(model.config), candidates=hint) for hint in (None, 40))
        return [parts.first_layer(block.score(own, state, row, kernels), row.vector) for state in states]

    np.testing.assert_allclose(*shares(params), rtol=1e-6, atol=1e-6)


def test_softmax_keys_by_hand():
    """n = 2 times the shares 1/4, 3/4 and 1/2, 1/2; masked behaviours have none."""
    keys = jnp.log(jnp.array([[1.0, 3.0, 99.0], [1.0, 1.0, 99.0]]))
    summed = sum_softmax(keys, jnp.eye(3), jnp.array([True, True, False]))
    np.testing.assert_allclose(summed.moments, [[0.5, 1.5, 0.0], [1.0, 1.0, 0.0]], rtol=1e-6)
    assert not sum_softmax(keys, jnp.eye(3), jnp.zeros(3, bool)).moments.any()


@pytest.mark.parametrize("length", [L, 2 * layers.CHUNK + 3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_form_for_training_has_the_same_values_and_gradients(scale, length):
    """For histories of every length down to none; masked places hold zeros, as embeddings do."""
    rng = np.random.default_rng(1)
    key = {
        "kernel": jnp.asarray(scale * rng.normal(size=(D, K)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=K), jnp.float32),
    }
    mask = np.arange(length) < np.array([length, 6, 1, 0])[:, None]
    values = np.where(mask[..., None], rng.normal(size=(4, length, D)), 0).astype(np.float32)
    weight = jnp.asarray(rng.normal(size=(K, D)), jnp.float32)

    def plain(key, values, mask):
        return sum_softmax(key["kernel"].T @ values.T + key["bias"][:, None], values, mask)

    def outputs(summed):
        def loss(key, values):
            made = jax.vmap(summed, (None, 0, 0))(key, values, mask)
            return (jnp.tanh(made.moments) * weight[None]).sum() + (made.total**2).sum()

        return jax.jit(jax.vmap(summed, (None, 0, 0)))(key, values, mask), jax.jit(jax.grad(loss, (0, 1)))(key, values)

    (expected, wanted), (got, gradient) = outputs(plain), outputs(sum_softmax_trained)
    for ours, usual in zip(jax.tree.leaves((got, gradient)), jax.tree.leaves((expected, wanted)), strict=True):
        kept = mask[..., None] if ours.shape == values.shape else True  # embeddings of masked places take no gradient
        np.testing.assert_allclose(np.where(kept, ours, 0), np.where(kept, usual, 0), rtol=1e-3, atol=1e-4)
    assert np.all(np.isfinite(gradient[1])) and not got.moments[3].any()
