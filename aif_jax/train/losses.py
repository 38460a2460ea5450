"""What training minimises: pointwise, listwise, and distillation from a ranker's scores, and weighted sums of these.

    loss = losses.listwise_softmax + 0.1 * losses.pointwise_bce
    loss = losses.distill_listwise(temperature=2.0)

A `Loss` is called as `loss(scores, targets, *, where=None, log_q=None)` on logits [..., C] of C candidates, targets of the same
shape and a mask, true where an entry counts, and returns a float32 scalar in nats. Called with options alone it returns the
loss with these options. Masked entries contribute nothing to value or gradient, whatever they hold (NaN too); nothing valid
gives 0 with zero gradients. A NaN among valid entries gives NaN, so that training notices. Shapes or dtypes that do not fit
raise ValueError. Half-precision scores are converted to float32.

Sources: sampled softmax and its logQ correction, Bengio and Senecal 2008, Yi et al. 2019; distillation with temperature, Hinton
et al. 2015 (arXiv 1503.02531); one signature for all, google/rax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax.checks import expect
from aif_jax.train.loss import Loss, as_loss, entries, lists, lists_with_a_positive, term

__all__ = [
    "pointwise_bce", "listwise_softmax", "distill_pointwise", "distill_listwise", "LOSSES", "by_name",
    "Loss", "term", "entries", "lists", "lists_with_a_positive", "as_loss",
]  # fmt: skip


@term(entries)
def pointwise_bce(
    scores: jax.Array, labels: jax.Array, where: jax.Array, log_q: jax.Array, *, corrected: bool = True
) -> jax.Array:
    """Binary cross-entropy of logits, the mean over valid entries.

    -[y log sigmoid(s - log q) + (1 - y) log(1 - sigmoid(s - log q))]

    Args:
      scores: logits, any shape.
      labels: 0 or 1, or probabilities in between.
      where, log_q: as for `listwise_softmax`.
      corrected: whether to subtract `log_q` where it is given, so that both losses teach the same score.

    Example:
      >>> round(float(pointwise_bce(jnp.array([0.0, 2.0]), jnp.array([1, 0]))), 4)
      1.41
    """
    return _cross_entropy(scores - log_q if corrected else scores, labels)


@term(lists_with_a_positive)
def listwise_softmax(
    scores: jax.Array, labels: jax.Array, where: jax.Array, log_q: jax.Array, *, corrected: bool = True
) -> jax.Array:
    """Softmax cross-entropy over the candidates of each list, the mean over lists that have a positive.

    -sum_c p_c log softmax(s - log q)_c, with p = labels / sum(labels)

    Where candidates are a sample, subtracting log q makes the loss estimate that of the softmax over the whole catalogue;
    without it popular items, sampled often, are pushed down. The correction belongs to training only: serve the raw scores.
    Mask a sampled negative that happens to be the list's positive item.

    Args:
      scores: logits [..., C].
      labels: not negative, graded or 0/1 [..., C]; every list weighs the same, however many positives it has.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.
      log_q: log of the expected number of times that the list holds the candidate, up to a constant per list: log(n q) for
        each of n draws from q, 0 for a positive that every list holds, log q throughout where the positives are sampled too
        (in-batch negatives). Rank of `scores` and broadcastable to it: [1, C] for candidates that the whole batch shares.
      corrected: whether to subtract `log_q` where it is given.

    Example:
      >>> scores = jnp.array([[2.0, 1.0, 0.0]])
      >>> round(float(listwise_softmax(scores, jnp.array([[1, 0, 0]]))), 4)
      0.4076
    """
    total = jnp.sum(labels, axis=-1)
    cross_entropy = -jnp.sum(labels * _log_softmax(scores - log_q if corrected else scores, where), axis=-1)
    return cross_entropy / jnp.where(total > 0, total, jnp.ones_like(total))


@term(entries, targets="teacher_scores")
def distill_pointwise(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Each score is taught the teacher's probability, the mean over valid entries.

    t^2 KL(sigmoid(teacher / t) || sigmoid(s / t)); the factor t^2 keeps the size of gradients the same for every temperature.
    The teacher gets no gradient. `log_q` is not read: the teacher's scores are not corrected either.

    Args:
      scores: the student's logits, any shape.
      teacher_scores: the teacher's logits, shape of `scores`.
      where: as for `listwise_softmax`.
      temperature: t > 0 and finite; above 1 softens the targets.

    Example:
      >>> teacher = jnp.array([1.0, -3.0])
      >>> float(distill_pointwise(teacher, teacher, temperature=2.0))
      0.0
    """
    scores, teacher = scores / temperature, jax.lax.stop_gradient(teacher_scores) / temperature
    probability = jax.nn.sigmoid(teacher)
    return (_cross_entropy(scores, probability) - _cross_entropy(teacher, probability)) * temperature**2


@term(lists, targets="teacher_scores")
def distill_listwise(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Each list is taught the teacher's softmax over the same candidates, the mean over lists that are not empty.

    t^2 KL(softmax(teacher / t) || softmax(s / t)): only differences within a list are taught. Arguments as `distill_pointwise`.

    Example:
      >>> teacher = jnp.array([[1.0, -3.0, 0.5]])
      >>> abs(float(distill_listwise(teacher + 4.0, teacher))) < 1e-6
      True
    """
    log_teacher = _log_softmax(jax.lax.stop_gradient(teacher_scores) / temperature, where)
    probability = jnp.where(where, jnp.exp(log_teacher), jnp.zeros_like(log_teacher))
    log_student = _log_softmax(scores / temperature, where)
    return jnp.sum(probability * (log_teacher - log_student), axis=-1) * temperature**2


LOSSES: dict[str, Loss] = {
    "pointwise_bce": pointwise_bce,
    "listwise_softmax": listwise_softmax,
    "distill_pointwise": distill_pointwise,
    "distill_listwise": distill_listwise,
}


def by_name(name: str) -> Loss:
    """The loss that a config or a command line names. Raises ValueError for no such loss."""
    expect(name in LOSSES, "loss", f"one of {sorted(LOSSES)}", repr(name))
    return LOSSES[name]


def _cross_entropy(scores: jax.Array, probability: jax.Array) -> jax.Array:
    # log_sigmoid of both signs, not softplus(s) - s p: that one cancels to 0 in float32 from s = 17 on.
    return -probability * jax.nn.log_sigmoid(scores) - (1 - probability) * jax.nn.log_sigmoid(-scores)


def _log_softmax(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Over the last axis among valid entries; 0 where not valid. `scores` are finite where not valid."""
    zero = jnp.zeros((), scores.dtype)
    highest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf, where=valid)
    shifted = jnp.where(valid, scores - jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), zero, highest)), zero)
    total = jnp.sum(jnp.where(valid, jnp.exp(shifted), zero), axis=-1, keepdims=True)
    # The inner `where` keeps 0 * 1/0 of an empty list out of the backward pass: jax_debug_nans would stop there.
    return jnp.where(valid, shifted - jnp.log(jnp.where(total > 0, total, jnp.ones_like(total))), zero)
