"""How a ranker's scores may be taught: the losses that `experiments.ranker_recall` compares."""

import jax
import jax.numpy as jnp
from optax.losses import sigmoid_binary_cross_entropy

from aif_jax.train.losses import distill_listwise, entries, lists, term


@term(entries, targets="teacher_scores")
def pointwise(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return cross-entropy against the ranker's probability of each candidate."""
    return sigmoid_binary_cross_entropy(scores, jax.nn.sigmoid(teacher))


@term(lists, targets="teacher_scores")
def pairwise(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return logistic loss of the pairs that the ranker orders, the mean over those of each list (RankNet)."""
    above = (teacher[..., :, None] > teacher[..., None, :]) & where[..., :, None] & where[..., None, :]
    each = jax.nn.softplus(scores[..., None, :] - scores[..., :, None])
    return jnp.where(above, each, 0).sum((-2, -1)) / jnp.maximum(above.sum((-2, -1)), 1)


@term(lists, targets="teacher_scores")
def head(scores: jax.Array, teacher: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return listwise divergence of the ranker's best 10 of each list, all others as good as nothing to the ranker."""
    least = jax.lax.top_k(jnp.where(where, teacher, -jnp.inf), min(10, teacher.shape[-1]))[0][..., -1:]
    wanted = jax.nn.log_softmax(teacher, where=where & (teacher >= least))
    given = jax.nn.log_softmax(scores, where=where)
    return jnp.where(where & (teacher >= least), jnp.exp(wanted) * (wanted - given), 0).sum(-1)


LOSSES = {
    "listwise": distill_listwise(), "temperature 0.5": distill_listwise(temperature=0.5),
    "temperature 2": distill_listwise(temperature=2.0),
    "head of the list": head(), "pairwise": pairwise(), "pointwise": pointwise(),
}  # fmt: skip
"""By name. Temperatures are of the listwise loss: what the best candidates of a list weigh."""
