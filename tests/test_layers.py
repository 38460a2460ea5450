import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import layers


def test_attention_by_hand():
    keys = jnp.array([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    values = jnp.array([[1.0], [5.0], [100.0]])
    query = jnp.array([jnp.log(3.0), 0.0, 0.0, 0.0])  # scores log 3 and 0: weights 3/4 and 1/4
    got = layers.attention(query, keys, values, jnp.array([True, True, False]))
    np.testing.assert_allclose(got, [0.75 * 1 + 0.25 * 5], rtol=1e-6)


def test_attention_over_nothing_is_zero_with_finite_gradients():
    keys = jnp.ones((3, 2))
    value, gradient = jax.value_and_grad(lambda q: layers.attention(q, keys, keys, jnp.zeros(3, bool)).sum())(jnp.ones(2))
    assert value == 0 and not gradient.any()


def test_masked_softmax_of_large_scores():
    got = layers.masked_softmax(jnp.array([1e30, 1e30, -1e30, 5.0]), jnp.array([True, True, True, False]))
    np.testing.assert_allclose(got, [0.5, 0.5, 0.0, 0.0])


def test_masked_mean():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 7.0]])
    np.testing.assert_allclose(layers.masked_mean(values, jnp.array([True, True, False])), [2.0, 3.0])
    np.testing.assert_allclose(layers.masked_mean(values, jnp.zeros(3, bool)), [0.0, 0.0])


def test_embedding_lookup_out_of_range_reads_row_0():
    table = jnp.arange(6.0).reshape(3, 2)
    got = jax.jit(layers.embedding_lookup)(table, jnp.array([2, 3, -1, 1]))
    np.testing.assert_array_equal(got, [[4, 5], [0, 1], [0, 1], [2, 3]])


def test_embed_attributes_averages_the_known_ids_of_a_bag():
    embedding = {"tags": jnp.array([[9.0], [1.0], [3.0]])}
    tags = aif.Attribute(name="tags", size=3, length=3)
    (got,) = layers.embed_attributes(embedding, (tags,), {"tags": jnp.array([1, 2, 0])})
    np.testing.assert_allclose(got, [2.0])
    (empty,) = layers.embed_attributes(embedding, (tags,), {"tags": jnp.zeros(3, jnp.int32)})
    np.testing.assert_allclose(empty, [0.0])


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0, 0), (0.9, 0), (1, 1), (3, 2), (86400, 16), (2.0**31, 31), (2.0**40, 31), (-5, 0), (np.nan, 0)]
)
def test_age_bucket(seconds, bucket):
    assert int(layers.age_bucket(jnp.float32(seconds))) == bucket


def test_mlp_by_hand():
    params = {
        "layer_0": {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.0, 0.5])},
        "layer_1": {"kernel": jnp.array([[2.0], [10.0]]), "bias": jnp.array([1.0])},
    }
    np.testing.assert_allclose(layers.mlp(params, jnp.array([[3.0], [-2.0]])), [[7.0], [26.0]])  # relu, then 2a + 10b + 1
