"""BEA: both halves against the formulas, and the empty history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.blocks import Bea
from tests.blocks import parts
from tests.reference import bridge as reference

M, S, D = 4, 6, 8
BLOCK = Bea(bridges=M)
CONFIG = parts.config(BLOCK)
PLAIN = {"kernel": jnp.eye(D), "bias": jnp.zeros(D)}


@pytest.fixture
def case():
    """Bridges, three short sequences, and three queries."""
    rng = np.random.default_rng(0)
    bridges, sequences, queries = (rng.normal(size=shape).astype(np.float32) for shape in ((M, D), (3, S, D), (3, D)))
    return {"bridges": jnp.asarray(bridges), "query": PLAIN}, sequences, queries


def user_half(params, sequence, mask):
    return BLOCK.user(params, parts.user(CONFIG, mask, sequence=sequence))


def item_half(params, queries):
    return jax.vmap(lambda query: BLOCK.item(params, parts.item(CONFIG, query)))(queries)


def combine(weights, values):
    return parts.first_layer(BLOCK.score({}, parts.state(BLOCK, values), parts.rows(BLOCK, weights), {"read": jnp.eye(D)}))


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_both_halves_match_the_formulas(case, kept):
    params, sequences, queries = case
    bridges, mask = np.asarray(params["bridges"]), np.arange(S) < kept
    values = user_half(params, sequences[0], mask)
    np.testing.assert_allclose(values, reference.user_half(bridges, sequences[0], mask), rtol=1e-4, atol=1e-5)
    weights = item_half(params, queries)
    np.testing.assert_allclose(weights, [reference.item_half(bridges, q) for q in queries], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), np.ones(3), rtol=1e-6)
    expected = [sum(w * v for w, v in zip(row, np.asarray(values), strict=True)) for row in np.asarray(weights)]
    np.testing.assert_allclose(combine(weights, values), expected, rtol=1e-5, atol=1e-6)


def test_the_query_is_a_trained_map_of_the_item_vector(case):
    params, _, queries = case
    rng = np.random.default_rng(3)
    query = {"kernel": rng.normal(size=(D, D)).astype(np.float32), "bias": rng.normal(size=D).astype(np.float32)}
    weights = item_half(params | {"query": query}, queries)
    mapped = queries @ query["kernel"] + query["bias"]
    np.testing.assert_allclose(weights, item_half(params, mapped), rtol=1e-4, atol=1e-6)


def test_the_dot_product_is_that_of_the_read_and_the_item(case):
    params, sequences, queries = case
    block = Bea(bridges=M, dot_product=True)
    weights, values = item_half(params, queries), user_half(params, sequences[0], np.ones(S, bool))
    rows, kernels = parts.rows(block, weights, vector=queries), {"read": jnp.eye(D)}
    terms = block.score({}, parts.state(block, values), rows, kernels)
    np.testing.assert_allclose(terms.logit, (weights @ values * queries).sum(-1) / D**0.5, rtol=1e-4, atol=1e-5)
    assert BLOCK.score({}, parts.state(BLOCK, values), rows, kernels).logit == 0.0
