"""Other losses by which a ranker's scores could teach: `ranker_recall` compares them with `losses.distill_listwise`.

pairwise   each pair in the ranker's order, the logistic loss of the difference (RankNet, Burges et al. 2005)
pointwise  each score is taught the ranker's probability
head       listwise, over the ranker's best HEAD of the list alone
lcron      whether the ranker's best HEAD pass this stage and the ranker (LCRON, arXiv 2503.09492, with a fixed ranker)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from optax.losses import sigmoid_binary_cross_entropy

from aif_jax.train import losses

HEAD = 10  # of about 56 candidates of a sample, those that a cut must not lose
TINY = 1e-6  # keeps the logarithm of a probability finite


def above(teacher: jax.Array, where: jax.Array) -> jax.Array:
    """Return bool [..., C, C], true where the ranker has the first candidate of a pair above the second."""
    return (teacher[..., :, None] > teacher[..., None, :]) & where[..., :, None] & where[..., None, :]


def is_head(teacher: jax.Array, where: jax.Array) -> jax.Array:
    """Return bool [..., C], true for the ranker's best HEAD of each list."""
    return where & (above(teacher, where).sum(-2) < HEAD)


@losses.term(losses.lists, targets="teacher_scores")
def pairwise(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return the mean of log(1 + exp(s_j - s_i)) over pairs that the ranker has in the order i, j, of each list."""
    pairs = above(teacher, where)
    lost = jax.nn.softplus(scores[..., None, :] - scores[..., :, None])
    return jnp.where(pairs, lost, 0).sum((-1, -2)) / jnp.maximum(pairs.sum((-1, -2)), 1)


@losses.term(losses.entries, targets="teacher_scores")
def pointwise(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return KL(sigmoid(teacher) || sigmoid(s)) of each entry."""
    probability = jax.nn.sigmoid(teacher)
    return sigmoid_binary_cross_entropy(scores, probability) - sigmoid_binary_cross_entropy(teacher, probability)


@losses.term(losses.lists, targets="teacher_scores")
def head(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return KL of the softmax over the ranker's best HEAD of each list, other candidates in the denominator alone."""
    best, some = is_head(teacher, where), where | ~where.any(-1, keepdims=True)
    wanted = jax.nn.softmax(teacher, where=best | ~where.any(-1, keepdims=True))
    ours = jnp.where(best, jax.nn.log_softmax(scores, where=some), 0)
    return jnp.where(best, wanted * (jnp.log(wanted + TINY) - ours), 0).sum(-1)


@losses.term(losses.lists, targets="teacher_scores")
def lcron(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return BCE(p r, y) + BCE(p, y), the mean of each list: y = 1 for the ranker's best HEAD.

    p and r are the probabilities to be among the first HEAD in a soft order of ours and of the ranker (NeuralSort, arXiv
    1903.08850): softmax((n + 1 - 2 k) s - sum_j |s - s_j|) for places k = 1 to n, its columns scaled to sum 1.
    """

    def passes(values: jax.Array) -> jax.Array:
        both = where[..., :, None] & where[..., None, :]
        apart = jnp.where(both, jnp.abs(values[..., :, None] - values[..., None, :]), 0).sum(-1)
        count, place = where.sum(-1)[..., None, None], jnp.arange(1, values.shape[-1] + 1)[:, None]
        valid = jnp.broadcast_to(where[..., None, :], both.shape) & (place <= count)
        order = jnp.where(valid, (count + 1 - 2 * place) * values[..., None, :] - apart[..., None, :], -1e9)
        order = jnp.where(valid, jax.nn.softmax(order), 0)
        return order[..., :HEAD, :].sum(-2) / jnp.maximum(jax.lax.stop_gradient(order.sum(-2)), TINY)

    def lost(probability: jax.Array) -> jax.Array:
        return -jnp.log(jnp.where(is_head(teacher, where), probability, 1 - probability) + TINY)

    ours = passes(scores)
    each = jnp.where(where, lost(ours * passes(teacher)) + lost(ours), 0)
    return each.sum(-1) / jnp.maximum(where.sum(-1), 1)


def softened(temperature: float) -> losses.Loss:
    """Return listwise distillation at a temperature: t^2 KL(softmax(teacher / t) || softmax(s / t))."""
    divergence = losses.distill_listwise.terms[0][1].values

    @losses.term(losses.lists, targets="teacher_scores")
    def listwise(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
        return temperature**2 * divergence(scores / temperature, teacher / temperature, where, log_q)

    return listwise


LOSSES = {"listwise": losses.distill_listwise, "pairwise": pairwise, "pointwise": pointwise, "head": head, "lcron": lcron}
WEIGHTS = dict.fromkeys(("pairwise", "pointwise", "head"), (4.0, 16.0)) | {"lcron": (0.1, 1.0, 4.0, 16.0)}
