"""Long memory: the linear form, the direct form and the plain sum over the history agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import lsh, memory
from aif_jax.types import UnfoldedMemory
from tests.reference import lsh as lsh_reference
from tests.reference import memory as reference

C, L, D, H = 5, 11, 6, 3


def case(kind, *, seed=0, kept=None):
    """Queries, keys, values, mask and a kernel; `kept` behaviours, the rest is padding."""
    rng = np.random.default_rng(seed)
    if kind == "lsh":
        query, keys = (rng.integers(0, 2**32, (n, 2), dtype=np.uint32) for n in (C, L))
    else:
        query, keys = (rng.normal(size=(n, 7)).astype(np.float32) for n in (C, L))
    values = rng.normal(size=(L, D)).astype(np.float32)
    mask = rng.random(L) < 0.7 if kept is None else np.arange(L) < kept
    return query, keys, values, mask, rng.normal(size=(D, H)).astype(np.float32)


def floats(kind, keys):
    return np.array([lsh_reference.signs(k) for k in keys]) if kind == "lsh" else keys


fold, deviation, mean = jax.jit(memory.fold), jax.jit(memory.deviation), jax.jit(memory.mean)


def folded(keys, values, mask):
    return fold(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(mask))


def unfolded(keys, values, mask):
    return UnfoldedMemory(keys=jnp.asarray(keys), values=jnp.asarray(values), mask=jnp.asarray(mask))


FORMS = [folded, unfolded]
KINDS = ["lsh", "learned"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_deviation_and_mean_match_the_plain_sum(form, kind):
    query, keys, values, mask, project = case(kind)
    history = form(keys, values, mask)
    expected = reference.deviation(floats(kind, query), floats(kind, keys), values, mask) @ project
    np.testing.assert_allclose(deviation(history, jnp.asarray(query), project), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean(history), reference.mean(values, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_mean_and_deviation_give_the_similarity_weighted_mean(form):
    """DIN on LSH is (b / 2 + s A / (2 K)) / n, exactly linear."""
    query, keys, values, mask, _ = case("lsh")
    history = form(keys, values, mask)
    made = mean(history) / 2 + deviation(history, jnp.asarray(query), np.eye(D)) / (2 * np.sqrt(64))
    np.testing.assert_allclose(made, reference.din(query, keys, values, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_leak(form, kind):
    query, keys, values, mask, project = case(kind, kept=6)
    other_keys, other_values = keys.copy(), values.copy()
    other_keys[6:] = 77 if kind == "lsh" else 1e30
    other_values[6:] = np.nan if form is folded else 1e30

    def outputs(keys, values, mask):
        history = form(keys, values, mask)
        return deviation(history, jnp.asarray(query), project), mean(history)

    for clean, dirty, short in zip(
        outputs(keys, values, mask),
        outputs(other_keys, other_values, mask),
        outputs(keys[:6], values[:6], mask[:6]),
        strict=True,
    ):
        np.testing.assert_array_equal(clean, dirty)
        np.testing.assert_allclose(clean, short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_history_gives_zeros_and_finite_gradients(form, kind):
    query, keys, values, mask, project = case(kind, kept=0)

    def total(values, project):
        history = form(keys, values, mask)
        return (deviation(history, jnp.asarray(query), project) ** 2).sum() + (mean(history) ** 2).sum()

    assert total(values, project) == 0
    assert all(np.all(g == 0) for g in jax.grad(total, (0, 1))(values, project))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_forms_agree(kind):
    query, keys, values, mask, project = case(kind, seed=3)
    weights = np.random.default_rng(1).normal(size=(C, H)).astype(np.float32)

    def loss(form, values, project, query, keys):
        return (weights * deviation(form(keys, values, mask), query, project)).sum()

    by = (0, 1) if kind == "lsh" else (0, 1, 2, 3)
    one, two = (
        jax.jit(jax.grad(lambda *a, form=form: loss(form, *a), by))(values, project, jnp.asarray(query), jnp.asarray(keys))
        for form in FORMS
    )
    for a, b in zip(one, two, strict=True):
        assert np.any(np.asarray(a) != 0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_by_values_by_hand():
    """d (f A w / (sqrt(K) n)) / d v_j = (f . g_j) w / (sqrt(K) n): one bit of 32 differs, so f . g = 30."""
    keys = np.array([[0], [1]], np.uint32)
    mask, project = np.array([True, True]), np.ones((1, 1), np.float32)

    def loss(values):
        return deviation(folded(keys, values, mask), jnp.zeros((1, 1), jnp.uint32), project).sum()

    gradient = jax.grad(loss)(jnp.zeros((2, 1)))
    np.testing.assert_allclose(gradient[:, 0], np.array([32, 30]) / (np.sqrt(32) * 2), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_under_vmap_and_jit(form, kind):
    cases = [case(kind, seed=seed) for seed in range(3)]
    query, keys, values, mask, project = (np.stack(x) for x in zip(*cases, strict=True))

    def run(query, keys, values, mask):
        return deviation(form(keys, values, mask), query, project[0])

    many = jax.jit(jax.vmap(run))(query, keys, values, mask)
    for b in range(3):
        alone = run(jnp.asarray(query[b]), keys[b], values[b], mask[b])
        np.testing.assert_allclose(many[b], alone, rtol=1e-5, atol=1e-5)


def test_few_candidates_take_the_direct_form():
    assert memory.cheaper_unfolded(1, 64)
    assert not memory.cheaper_unfolded(1000, 64)


def test_a_folded_history_does_not_grow_with_its_length():
    rng = np.random.default_rng(0)
    shapes = set()
    for length in (4, 40):
        keys = rng.integers(0, 2**32, (length, 2), dtype=np.uint32)
        made = folded(keys, rng.normal(size=(length, D)), np.ones(length, bool))
        shapes.add(tuple(x.shape for x in jax.tree.leaves(made)))
        assert made.count == length
    assert shapes == {((64, D), (D,), ())}


def test_lsh_keys_fold_as_signs():
    query, keys, values, mask, _ = case("lsh")
    np.testing.assert_allclose(
        folded(keys, values, mask).moments, folded(lsh.signs(jnp.asarray(keys)), values, mask).moments, atol=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_folding_a_softmax_is_folding_its_shares(scale):
    """Values and gradients, for histories of every length down to none; padding holds keys beyond all others."""
    rng = np.random.default_rng(0)
    keys = (scale * rng.normal(size=(4, L, 7))).astype(np.float32)
    values = rng.normal(size=(4, L, D)).astype(np.float32)
    mask = np.arange(L) < np.array([L, 6, 1, 0])[:, None]
    keys[~mask] = 1e30
    weight = jnp.asarray(rng.normal(size=(7, D)).astype(np.float32))

    def shares(keys, values, mask):
        return memory.fold(memory.softmax_keys(keys, mask), values, mask)

    def outputs(fold):
        loss = lambda keys, values: (jnp.tanh(jax.vmap(fold)(keys, values, mask).moments) * weight).sum()  # noqa: E731
        return jax.jit(jax.vmap(fold))(keys, values, mask), jax.jit(jax.grad(loss, (0, 1)))(keys, values)

    (expected, wanted), (got, found) = outputs(shares), outputs(memory.fold_softmax)
    for ours, plain in zip(jax.tree.leaves((got, found)), jax.tree.leaves((expected, wanted)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert not got.moments[3].any()
