"""BEA: both halves against the formulas, and the empty history."""

import jax
import numpy as np
import pytest

from aif_jax import bridge
from tests.reference import bridge as reference

M, S, D = 4, 6, 8


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    params = bridge.init(jax.random.key(0), bridges=M, width=D)
    return params, rng.normal(size=(3, S, D)).astype(np.float32), rng.normal(size=(3, D)).astype(np.float32)


def test_parameters():
    made = bridge.init(jax.random.key(1), bridges=M, width=D)
    assert made["embeddings"].shape == (M, D)
    assert not np.array_equal(made["embeddings"], bridge.init(jax.random.key(2), bridges=M, width=D)["embeddings"])


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_both_halves_match_the_formulas(case, kept):
    params, sequences, queries = case
    bridges, mask = np.asarray(params["embeddings"]), np.arange(S) < kept
    values = bridge.user_half(params, sequences[0], mask)
    np.testing.assert_allclose(values, reference.user_half(bridges, sequences[0], mask), rtol=1e-4, atol=1e-5)
    weights = bridge.item_half(params, queries)
    np.testing.assert_allclose(weights, [reference.item_half(bridges, q) for q in queries], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), np.ones(3), rtol=1e-6)
    expected = [sum(w * v for w, v in zip(row, np.asarray(values), strict=True)) for row in np.asarray(weights)]
    np.testing.assert_allclose(bridge.combine(weights, values), expected, rtol=1e-5, atol=1e-6)


def test_one_behaviour_is_read_whole_by_every_item(case):
    """Where the history has one entry the approximation is exact: every bridge reads it, weights sum to 1."""
    params, sequences, queries = case
    mask = np.arange(S) < 1
    read = bridge.combine(bridge.item_half(params, queries), bridge.user_half(params, sequences[0], mask))
    exact = [reference.attend(q, sequences[0], mask) for q in queries]
    np.testing.assert_allclose(read, exact, rtol=1e-5, atol=1e-6)


def test_a_bridge_equal_to_the_query_gives_full_attention(case):
    """One bridge, and the item's query is that bridge: w = [1] and V is the full cross-attention."""
    _, sequences, queries = case
    mask = np.arange(S) < 5
    params = {"embeddings": queries[:1]}
    read = bridge.combine(bridge.item_half(params, queries[:1]), bridge.user_half(params, sequences[0], mask))
    np.testing.assert_allclose(read[0], reference.attend(queries[0], sequences[0], mask), rtol=1e-4, atol=1e-5)


def test_padding_does_not_leak(case):
    params, sequences, _ = case
    mask = np.arange(S) < 3
    dirty = np.where(mask[:, None], sequences[0], 1e30).astype(np.float32)
    np.testing.assert_array_equal(bridge.user_half(params, sequences[0], mask), bridge.user_half(params, dirty, mask))


def test_under_vmap_jit_and_grad(case):
    params, sequences, queries = case
    masks = np.arange(S) < np.array([[0], [3], [6]])

    def read(params, sequence, mask, query):
        return bridge.combine(bridge.item_half(params, query[None]), bridge.user_half(params, sequence, mask))[0]

    many = jax.jit(jax.vmap(read, (None, 0, 0, 0)))(params, sequences, masks, queries)
    for b in range(3):
        np.testing.assert_allclose(many[b], read(params, sequences[b], masks[b], queries[b]), rtol=1e-5, atol=1e-6)
    total = lambda p, s: jax.vmap(read, (None, 0, 0, 0))(p, s, masks, queries).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total, (0, 1)))(params, sequences)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert np.all(gradient[1][~masks] == 0) and np.any(gradient[1][masks] != 0)


def test_combine_is_linear_in_the_values(case):
    """So the head may give V times its kernel."""
    params, sequences, queries = case
    kernel = np.random.default_rng(2).normal(size=(D, 5)).astype(np.float32)
    weights, values = bridge.item_half(params, queries), bridge.user_half(params, sequences[0], np.ones(S, bool))
    np.testing.assert_allclose(
        bridge.combine(weights, values @ kernel), bridge.combine(weights, values) @ kernel, rtol=1e-4, atol=1e-5
    )
