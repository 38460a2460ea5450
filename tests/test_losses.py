"""Losses: hand-computed values, the plain reference, masks that hide NaN from value and gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aif_jax.train import losses
from tests.reference import losses as reference
from tests.refusals import refused

SHAPE = (3, 5)  # one shape for all random tests: one compilation each
ALL = {
    "pointwise_bce": losses.pointwise_bce,
    "listwise_softmax": losses.listwise_softmax,
    "listwise_softmax_log_q": lambda s, y, *, where=None: losses.listwise_softmax(s, y, where=where, log_q=-y),
    "distill_listwise": losses.distill_listwise,
}
COMPILED = {name: jax.jit(jax.value_and_grad(lambda s, y, w, f=f: f(s, y, where=w))) for name, f in ALL.items()}


def logits(limit=6.0):
    return hnp.arrays(np.float32, SHAPE, elements=st.floats(-limit, limit, width=32))


def masks():
    return hnp.arrays(np.bool_, SHAPE)


def labels():
    return hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 1.0]))


def test_pointwise_bce_of_a_soft_label_and_of_confident_scores():
    # sigmoid(log 3) = 3/4: a positive costs log(4/3), a negative log 4; a label of 1/2 costs the mean of the two.
    half = losses.pointwise_bce(jnp.array([math.log(3)]), jnp.array([0.5]))
    np.testing.assert_allclose(half, (math.log(4 / 3) + math.log(4)) / 2, rtol=1e-6)
    np.testing.assert_allclose(losses.pointwise_bce(jnp.array([30.0]), jnp.array([1])), math.exp(-30), rtol=1e-5)
    np.testing.assert_allclose(losses.pointwise_bce(jnp.array([-500.0]), jnp.array([True])), 500.0, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(logits(), logits(), labels(), masks())
def test_equal_to_the_reference(scores, other, y, where):
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    close(losses.pointwise_bce(scores, y, where=where), reference.pointwise_bce(scores, y, where))
    close(losses.listwise_softmax(scores, y, where=where, log_q=other), reference.listwise_softmax(scores, y, where, other))
    close(losses.distill_listwise(scores, other, where=where), reference.distill_listwise(scores, other, where))


def test_distillation_from_labels_has_the_gradient_of_the_label_loss():
    """KL and cross-entropy to the same targets differ by a constant."""
    scores, teacher = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    expected = jax.grad(losses.listwise_softmax)(scores, jax.nn.softmax(teacher))
    of_scores, of_teacher = jax.grad(losses.distill_listwise, argnums=(0, 1))(scores, teacher)
    np.testing.assert_allclose(of_scores, expected, atol=1e-6)
    assert np.asarray(of_scores).any() and not np.asarray(of_teacher).any()  # the teacher gets none


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(logits(), labels(), masks(), st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_masked_entries_contribute_nothing(name, scores, y, where, junk):
    f = COMPILED[name]
    value, grad = f(scores, y, where)
    dirty_value, dirty_grad = f(np.where(where, scores, junk), np.where(where, y, junk), where)
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert value == dirty_value
    np.testing.assert_array_equal(grad, dirty_grad)
    assert not np.asarray(grad)[~where].any()


@pytest.mark.parametrize("name", ALL)
def test_nothing_valid_gives_zero_with_zero_gradient(name):
    value, grad = COMPILED[name](np.full(SHAPE, np.nan, np.float32), np.ones(SHAPE, np.float32), np.zeros(SHAPE, bool))
    assert value == 0 and not np.asarray(grad).any()
    assert ALL[name](jnp.zeros((2, 0)), jnp.zeros((2, 0))) == 0


@pytest.mark.parametrize("name", ALL)
def test_no_nan_on_the_way_either(name):
    """Value and gradient run under `jax_debug_nans`, which stops at the first NaN inside: an empty list, large logits."""
    where = np.ones(SHAPE, bool)
    where[1] = False
    large = np.where(np.arange(15).reshape(SHAPE) % 2, 1e4, -1e4)
    for scores, y in ((np.where(where, 0.5, 7.0), np.ones(SHAPE)), (large, large < 0)):
        with jax.debug_nans(True):
            value, grad = jax.value_and_grad(ALL[name])(np.float32(scores), np.float32(y), where=where)
        assert np.isfinite(value) and np.isfinite(grad).all() and not np.asarray(grad)[1].any()


@pytest.mark.parametrize("name", ALL)
def test_a_valid_nan_is_not_hidden(name):
    good, bad = np.ones(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    bad[0, 1] = np.nan
    assert np.isnan(ALL[name](bad, good)) and np.isnan(ALL[name](good, bad))


def test_a_broadcast_mask_equals_the_full_one():
    scores, y = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    row = np.array([[True, False, True, True, False]])
    whole = losses.pointwise_bce(scores, y, where=np.broadcast_to(row, SHAPE))
    np.testing.assert_array_equal(losses.pointwise_bce(scores, y, where=row), whole)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_scores_give_float32_losses(name):
    scores = np.linspace(-3, 3, 15, dtype=np.float32).reshape(SHAPE)
    y = (scores > 1).astype(np.float32)
    half = ALL[name](jnp.asarray(scores, jnp.bfloat16), y)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, ALL[name](scores, y), rtol=0.02)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_lists_by_vmap(name):
    y = jnp.ones((2, *SHAPE)).at[:, :, 1:].set(0)
    values = jax.vmap(ALL[name])(jnp.zeros((2, *SHAPE)), y)
    np.testing.assert_allclose(values, [ALL[name](jnp.zeros(SHAPE), y[0])] * 2, rtol=1e-6)


def test_losses_are_values_that_add_and_scale():
    scores, y = jnp.array([[2.0, 1.0, 0.0], [0.5, -1.0, 3.0]]), jnp.array([[1, 0, 0], [0, 0, 0]])
    loss = losses.listwise_softmax + 0.1 * losses.pointwise_bce
    expected = losses.listwise_softmax(scores, y) + 0.1 * losses.pointwise_bce(scores, y)
    np.testing.assert_allclose(loss(scores, y), expected, rtol=1e-6)
    np.testing.assert_allclose((loss * 2.0)(scores, y), 2 * expected, rtol=1e-6)
    assert loss == losses.listwise_softmax + losses.pointwise_bce * 0.1 and hash(loss) == hash(loss * 1.0)
    assert repr(loss) == "listwise_softmax + 0.1 * pointwise_bce" != repr(loss * 2.0)


def test_values_of_another_shape_than_the_term_counts_are_refused():
    for counts, axis, keepdims in ((losses.lists, -1, True), (losses.lists, None, False), (losses.entries, -1, False)):
        wrong = losses.term(counts)(lambda s, *_, axis=axis, keepdims=keepdims: jnp.sum(s, axis, keepdims=keepdims))
        refused(ValueError, "lambda>: expected a value for each it counts", wrong, jnp.ones((3, 3)), jnp.ones((3, 3)))


def test_a_pointwise_correction_is_that_of_the_scores():
    """Both terms of a sum read one score: s - log q."""
    scores, y = jnp.array([[math.log(3), 0.0]]), jnp.array([[1, 0]])
    log_q = jnp.array([[0.0, math.log(3)]])
    # s - log q = log 3, -log 3: both cost log(4/3)
    np.testing.assert_allclose(losses.pointwise_bce(scores, y, log_q=log_q), math.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(losses.listwise_softmax(scores, y, log_q=log_q), math.log(10 / 9), rtol=1e-6)
    distill = losses.distill_listwise  # student and teacher are compared as they are
    np.testing.assert_array_equal(distill(scores, -scores, log_q=log_q), distill(scores, -scores))
