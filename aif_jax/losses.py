"""What training minimises: pointwise, listwise, and distillation from a ranker's scores.

Every loss is `f(scores, targets, *, where=None, ...)` and returns one float32 number: logits [..., C] of C candidates, targets
of the same shape, and a mask that is true where an entry counts. Masked entries contribute nothing to the value or to the
gradient, whatever stands there (NaN and infinities too), and a batch with nothing valid gives 0 with zero gradients. Valid
entries must be finite: a NaN among them gives NaN, so that training notices. All run under `jit`, `grad` and `vmap`; scores of
half precision are computed with in float32.

Sources: sampled softmax and its logQ correction, Bengio and Senecal 2008, Yi et al. 2019; distillation with temperature, Hinton
et al. 2015 (arXiv 1503.02531); one signature for all, google/rax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from aif_jax.types import Array


class Loss(Protocol):
    """The one signature of this file; `targets` are labels, or a teacher's logits when distilling."""

    def __call__(self, scores: Array, targets: Array, /, *, where: Array | None = None) -> jax.Array:
        """Logits and targets [..., C] with a mask to a scalar."""
        ...


def pointwise_bce(scores: Array, labels: Array, *, where: Array | None = None) -> jax.Array:
    """Binary cross-entropy of logits, the mean over valid entries.

    -[y log sigmoid(s) + (1 - y) log(1 - sigmoid(s))]

    Args:
      scores: logits, any shape.
      labels: 0 or 1, or probabilities in between; bool, integer or float; shape of `scores`.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.

    Returns:
      Scalar in nats; 0 where nothing is valid.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Example:
      >>> round(float(pointwise_bce(jnp.array([0.0, 2.0]), jnp.array([1, 0]))), 4)
      1.41
    """
    scores, valid = _scores_and_mask(scores, where)
    return _mean(_cross_entropy(scores, _like(labels, "labels", scores, valid)), valid)


def listwise_softmax(scores: Array, labels: Array, *, where: Array | None = None, log_q: Array | None = None) -> jax.Array:
    """Softmax cross-entropy over the candidates of each list, the mean over lists that have a positive.

    -sum_c p_c log softmax(s - log q)_c, with p = labels / sum(labels)

    Where candidates are a sample, subtracting log q makes the loss estimate that of the softmax over the whole catalogue;
    without it popular items, sampled often, are pushed down. The correction belongs to training only: serve the raw scores.
    Mask a sampled negative that happens to be the list's positive item.

    Args:
      scores: logits [..., C].
      labels: not negative, graded or 0/1 [..., C]; every list weighs the same, however many positives it has.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.
      log_q: log of the expected number of times that the candidate stands in its list, up to a constant per list: log(n q) for
        each of n draws from q, 0 for a positive that is always put there, log q throughout where the positives are sampled too
        (in-batch negatives). Rank of `scores` and broadcastable to it: [1, C] for candidates that the whole batch shares.

    Returns:
      Scalar in nats. Lists without a valid positive are left out; 0 where none is left.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Example:
      >>> scores = jnp.array([[2.0, 1.0, 0.0]])
      >>> round(float(listwise_softmax(scores, jnp.array([[1, 0, 0]]))), 4)
      0.4076
    """
    scores, valid = _scores_and_mask(scores, where)
    labels = _like(labels, "labels", scores, valid)
    if log_q is not None:
        log_q = _broadcast(jnp.asarray(log_q), "log_q", scores.shape)
        scores = scores - _like(log_q, "log_q", scores, valid)
    total = jnp.sum(labels, axis=-1)
    positive = total > 0
    cross_entropy = -jnp.sum(labels * _log_softmax(scores, valid), axis=-1)
    return _mean(cross_entropy / jnp.where(positive, total, 1), positive)


def distill_pointwise(
    scores: Array, teacher_scores: Array, *, where: Array | None = None, temperature: float = 1.0
) -> jax.Array:
    """Each score is taught the teacher's probability, the mean over valid entries.

    t^2 KL(sigmoid(teacher / t) || sigmoid(s / t))

    The factor t^2 keeps the size of gradients the same for every temperature. The teacher gets no gradient.

    Args:
      scores: the student's logits, any shape.
      teacher_scores: the teacher's logits, shape of `scores`.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.
      temperature: t > 0; above 1 softens the targets.

    Returns:
      Scalar in nats, 0 where the two agree or nothing is valid.

    Raises:
      ValueError: shapes or dtypes do not fit, or the temperature is not a positive finite number.

    Example:
      >>> teacher = jnp.array([1.0, -3.0])
      >>> float(distill_pointwise(teacher, teacher, temperature=2.0))
      0.0
    """
    scores, teacher, valid = _student_and_teacher(scores, teacher_scores, where, temperature)
    probability = jax.nn.sigmoid(teacher)
    divergence = _cross_entropy(scores, probability) - _cross_entropy(teacher, probability)
    return _mean(divergence, valid) * temperature**2


def distill_listwise(
    scores: Array, teacher_scores: Array, *, where: Array | None = None, temperature: float = 1.0
) -> jax.Array:
    """Each list is taught the teacher's softmax over the same candidates, the mean over lists that are not empty.

    t^2 KL(softmax(teacher / t) || softmax(s / t))

    Only differences within a list are taught: a constant added to a list's scores changes nothing. The teacher gets no
    gradient. Both softmaxes see the same candidates, so no logQ correction is needed.

    Args:
      scores: the student's logits [..., C].
      teacher_scores: the teacher's logits [..., C].
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.
      temperature: t > 0; above 1 softens the targets.

    Returns:
      Scalar in nats, 0 where the two agree or nothing is valid.

    Raises:
      ValueError: shapes or dtypes do not fit, or the temperature is not a positive finite number.

    Example:
      >>> teacher = jnp.array([[1.0, -3.0, 0.5]])
      >>> abs(float(distill_listwise(teacher + 4.0, teacher))) < 1e-6
      True
    """
    scores, teacher, valid = _student_and_teacher(scores, teacher_scores, where, temperature)
    log_teacher = _log_softmax(teacher, valid)
    probability = jnp.where(valid, jnp.exp(log_teacher), 0)
    divergence = jnp.sum(probability * (log_teacher - _log_softmax(scores, valid)), axis=-1)
    return _mean(divergence, jnp.any(valid, axis=-1)) * temperature**2


LOSSES: dict[str, Loss] = {
    "pointwise_bce": pointwise_bce,
    "listwise_softmax": listwise_softmax,
    "distill_pointwise": distill_pointwise,
    "distill_listwise": distill_listwise,
}


def _entries(targets: Array, where: Array) -> jax.Array:
    return jnp.sum(jnp.broadcast_to(jnp.asarray(where), jnp.shape(targets)))


def _lists(targets: Array, where: Array) -> jax.Array:
    return jnp.sum(jnp.any(jnp.broadcast_to(jnp.asarray(where), jnp.shape(targets)), axis=-1))


def _lists_with_a_positive(targets: Array, where: Array) -> jax.Array:
    return _lists(targets, jnp.asarray(where) & (jnp.asarray(targets) > 0))


TERMS: dict[Loss, Callable[[Array, Array], jax.Array]] = {
    pointwise_bce: _entries,
    listwise_softmax: _lists_with_a_positive,
    distill_pointwise: _entries,
    distill_listwise: _lists,
}
"""How many terms a loss is the mean of: (targets [..., C], where) -> []. It is known before the scores are, so a batch may be
taken in parts that are scored once: its loss is the sum of the parts' losses, each weighted by its share of the terms."""


def by_name(name: str) -> Loss:
    """The loss that a config or a command line names.

    Raises:
      ValueError: no such loss; names those that exist.

    Example:
      >>> by_name("pointwise_bce") is pointwise_bce
      True
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {sorted(LOSSES)}, got {name!r}")
    return LOSSES[name]


def _cross_entropy(scores: jax.Array, probability: jax.Array) -> jax.Array:
    # log_sigmoid of both signs, not softplus(s) - s p: that one cancels to 0 in float32 from s = 17 on.
    return -probability * jax.nn.log_sigmoid(scores) - (1 - probability) * jax.nn.log_sigmoid(-scores)


def _log_softmax(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Over the last axis among valid entries; 0 where not valid. `scores` are finite where not valid."""
    highest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf, where=valid)
    shifted = jnp.where(valid, scores - jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0, highest)), 0)
    total = jnp.sum(jnp.where(valid, jnp.exp(shifted), 0), axis=-1, keepdims=True)
    # The inner `where` keeps 0 * 1/0 of an empty list out of the backward pass: jax_debug_nans would stop there.
    return jnp.where(valid, shifted - jnp.log(jnp.where(total > 0, total, 1)), 0)


def _mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid, values, 0)) / jnp.maximum(jnp.sum(valid.astype(values.dtype)), 1)


def _scores_and_mask(scores: Array, where: Array | None) -> tuple[jax.Array, jax.Array]:
    """Scores in float32 or wider with 0 in masked places, and the mask in full shape.

    Replacing the masked scores *before* the arithmetic is what keeps their NaN out of the gradient: the derivative of a `where`
    after the arithmetic is 0 * NaN.
    """
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores: expected floating-point logits, got dtype {scores.dtype}")
    valid = jnp.asarray(True) if where is None else jnp.asarray(where)
    if valid.dtype != jnp.bool_:
        raise ValueError(f"where: expected a bool mask, got dtype {valid.dtype}")
    valid = jnp.broadcast_to(valid, scores.shape) if where is None else _broadcast(valid, "where", scores.shape)
    return jnp.where(valid, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), 0), valid


def _broadcast(value: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    # The same rank is required: a mask [B] against scores [B, B] would fit silently along the wrong axis.
    if value.ndim != len(shape) or any(have not in (1, want) for have, want in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape of the same rank that broadcasts to scores {shape}, got {value.shape}")
    return jnp.broadcast_to(value, shape)


def _like(values: Array, name: str, scores: jax.Array, valid: jax.Array) -> jax.Array:
    values = jnp.asarray(values)
    if values.shape != scores.shape:
        raise ValueError(f"{name}: expected the shape of scores {scores.shape}, got {values.shape}")
    return jnp.where(valid, values.astype(scores.dtype), 0)


def _student_and_teacher(
    scores: Array, teacher_scores: Array, where: Array | None, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a positive finite number, got {temperature!r}")
    scores, valid = _scores_and_mask(scores, where)
    teacher = jax.lax.stop_gradient(_like(teacher_scores, "teacher_scores", scores, valid))
    return scores / temperature, teacher / temperature, valid
