"""Losses that teach a pre-ranker the choice of the ranker behind it, from logged scores and stages; see `losses` for the form.

    loss = Goals(
        Goal(pointwise_bce, "click"),
        Goal(0.5 * pairwise_ndcg(k=100), "ranker"),      # the ranker's scores
        Goal(0.2 * margin_info_nce(margin=0.5), "stage"),  # how far each candidate came
    )

`losses.distill_listwise` is the third of them. All read a target for each candidate: the ranker's score, or the stage.

Sources: the weights of pairs are LambdaRank's, Burges 2010; InfoNCE, van den Oord et al. 2018 (arXiv 1807.03748), with an
additive margin, Wang et al. 2018 (arXiv 1801.05599).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax.train.losses import lists, term


@term(lists, targets="teacher_scores")
def pairwise_ndcg(
    scores: jax.Array,
    teacher_scores: jax.Array,
    where: jax.Array,
    log_q: jax.Array,
    *,
    k: int = 100,
    temperature: float = 1.0,
) -> jax.Array:
    """Pairs in the ranker's order, each weighed by what NDCG@k loses if they swap places; the mean over lists.

    sum over pairs i above j of |G_i - G_j| |D_i - D_j| log(1 + exp(-(s_i - s_j) / t)) / sum of the same weights

    The ranker's own order gives gain and discount: G_i = 2^(-r_i / k), D_i = 1 / log2(2 + r_i) for ranks r_i < k, 0 from k on.
    So pairs across the cut and near the top count, and pairs below it not at all. C^2 pairs a list.

    Args:
      scores: the student's logits [..., C].
      teacher_scores: the ranker's scores, higher is better [..., C]; ties are no pair.
      where: bool, true where a candidate counts.
      log_q: not read.
      k: places that the ranker fills.
      temperature: t > 0.

    Example:
      >>> teacher = jnp.array([[3.0, 2.0, 1.0]])
      >>> bool(pairwise_ndcg(teacher * 9, teacher) < 0.01 < pairwise_ndcg(-teacher, teacher))
      True
    """
    teacher = jax.lax.stop_gradient(teacher_scores)
    above = (teacher[..., :, None] > teacher[..., None, :]) & where[..., :, None] & where[..., None, :]
    rank = jnp.sum(above, axis=-2).astype(scores.dtype)  # how many the ranker has above
    inside = (rank < k) & where
    zero = jnp.zeros_like(rank)
    gain = jnp.where(inside, jnp.exp2(-rank / k), zero)
    discount = jnp.where(inside, 1 / jnp.log2(2 + rank), zero)
    change = jnp.abs(gain[..., :, None] - gain[..., None, :]) * jnp.abs(discount[..., :, None] - discount[..., None, :])
    weight = jnp.where(above, change, jnp.zeros_like(change))
    gap = (scores[..., :, None] - scores[..., None, :]) / temperature
    total = jnp.sum(weight, axis=(-1, -2))
    lost = jnp.sum(weight * -jax.nn.log_sigmoid(gap), axis=(-1, -2))
    return lost / jnp.where(total > 0, total, jnp.ones_like(total))


@term(lists, targets="stages")
def margin_info_nce(
    scores: jax.Array,
    stages: jax.Array,
    where: jax.Array,
    log_q: jax.Array,
    *,
    margin: float = 0.0,
    temperature: float = 1.0,
    logq_correction: bool = True,
) -> jax.Array:
    """Every candidate against all that came less far, with a margin: the mean over the candidates of a list, then over lists.

    -log( e^((s_i - m) / t) / (e^((s_i - m) / t) + sum over j of a later stage of e^(s_j / t)) )

    Args:
      scores: logits [..., C].
      stages: how far each came, 0 the furthest, as `data.STAGES` counts [..., C].
      where: bool, true where a candidate counts; the last stage of a list is negatives alone.
      log_q: subtracted from the scores where the candidates are sampled, see `losses.listwise_softmax`.
      margin: m, in logits: how far ahead a candidate must be.
      temperature: t > 0.
      logq_correction: whether to subtract `log_q`.

    Example:
      >>> round(float(margin_info_nce(jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 1.0]]))), 4)
      0.5514
    """
    s = (scores - log_q if logq_correction else scores) / temperature
    behind = (stages[..., None, :] > stages[..., :, None]) & where[..., None, :] & where[..., :, None]
    has_any = jnp.any(behind, axis=-1)
    others = jnp.where(behind, jnp.broadcast_to(s[..., None, :], behind.shape), jnp.full_like(s[..., None, :], -1e30))
    own = s - margin / temperature
    lost = jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own
    count = jnp.sum(has_any, axis=-1).astype(s.dtype)
    total = jnp.sum(jnp.where(has_any, lost, jnp.zeros_like(lost)), axis=-1)
    return total / jnp.maximum(count, jnp.ones_like(count))
