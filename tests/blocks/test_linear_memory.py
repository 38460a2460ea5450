"""Linear attention over the long history: its form for training; its definition is in test_definitions.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import layers
from aif_jax.blocks.linear_memory import sum_softmax, sum_softmax_trained

L, D, K = 11, 6, 7


@pytest.mark.parametrize("length", [L, 2 * layers.CHUNK + 3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_form_for_training_has_the_same_values_and_gradients(scale, length):
    """For histories of every length down to none; masked places hold zeros, as embeddings do."""
    rng = np.random.default_rng(1)
    kernel, bias, weight = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((D, K), K, (K, D)))
    key = {"kernel": scale * kernel, "bias": bias}
    mask = np.arange(length) < np.array([length, 6, 1, 0])[:, None]
    values = np.where(mask[..., None], rng.normal(size=(4, length, D)), 0).astype(np.float32)

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
