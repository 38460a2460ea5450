"""Training recipes: how lists of candidates are made and which loss they meet. Every recipe trains for the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import losses, train
from aif_jax.data.batches import Batch, make_batch
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, epoch_batches, lists
from aif_jax.types import Params

NEGATIVES = 15
POOL = 64  # candidates among which hard negatives are looked for
LIKED = 8  # action row of four stars
DEFAULT = "listwise + pointwise"
"""What arms are compared with. A softmax over a list says nothing about the level of the list's scores, which GAUC, pooling all
requests of a user, and log-loss ask for; the pointwise part fixes it."""
ARM = "+ SimTier"
"""The model that recipes are compared on: the paper's."""
CATALOGUE = "logQ"
"""The recipe for the question that asks the whole catalogue: the others' scores are likelihoods over those of the sampler."""
NAMES = (DEFAULT, "pointwise", "listwise", CATALOGUE, "distillation", "hard negatives")


class Helper(NamedTuple):
    """A trained model that a recipe asks: the teacher, or who finds hard negatives."""

    model: aif.PreRanker
    params: Params
    dataset: Dataset


HELPERS = {"distillation": "exact", "hard negatives": "two_tower"}
"""Recipe to the arm whose trained model it needs."""


def loss(recipe: str) -> train.LossFn:
    """The loss of a recipe; column 0 of every list is the positive.

    - "listwise + pointwise": the sum of the two; "hard negatives" too, over other lists.
    - "logQ": the same with the correction for how often the sampler draws a candidate.
    - "distillation": the same, and the divergence from the teacher's softmax.
    """
    if recipe not in _LOSSES:
        raise ValueError(f"recipe: expected one of {NAMES}, got {recipe!r}")
    return _LOSSES[recipe]


def batches(
    recipe: str,
    dataset: Dataset,
    positions: np.ndarray,
    *,
    config: aif.Config,
    sampler: NegativeSampler,
    batch_size: int,
    seed: int,
    epoch: int,
    helper: Helper | None = None,
) -> Iterator[Batch]:
    """One epoch of the next-item task. Labels are 0 and 1; or what the recipe's own loss reads: the teacher's logits, log q.

    Args:
      recipe: one of NAMES.
      dataset, positions, config, sampler, batch_size, seed, epoch: as `next_item_batches`.
      helper: of the recipes in HELPERS.

    Raises:
      ValueError: an unknown recipe, or a helper that is missing.
    """
    if recipe not in NAMES:
        raise ValueError(f"recipe: expected one of {NAMES}, got {recipe!r}")
    if recipe in HELPERS and helper is None:
        raise ValueError(f"recipe {recipe!r}: expected a trained {HELPERS[recipe]} as helper, got none")
    ask = _asking(helper) if helper is not None else None
    log_q = np.log(np.maximum(NEGATIVES * sampler.probabilities, 1e-12)).astype(np.float32)
    drawn = POOL if recipe == "hard negatives" else NEGATIVES
    for step, at in enumerate(epoch_batches(positions, batch_size, seed=seed, epoch=epoch)):
        rows, labels = lists(dataset, at, sampler=sampler, negatives=drawn, seed=seed, epoch=epoch, step=step)
        if recipe == "hard negatives" and ask is not None:
            rows = hardest(rows, ask(at, rows))
            labels = labels[:, : rows.shape[1]]
        elif recipe == "distillation" and ask is not None:
            labels = ask(at, rows)
        elif recipe == "logQ":
            labels = log_q[rows]
            labels[:, 0] = 0
        yield make_batch(dataset, at, rows, labels, config=config)


def labelled_batches(
    dataset: Dataset, positions: np.ndarray, labels: np.ndarray, *, config: aif.Config, batch_size: int, seed: int, epoch: int
) -> Iterator[Batch]:
    """One epoch of samples with a label of their own [n]: each event's item is the only candidate."""
    for at in epoch_batches(np.arange(len(positions)), batch_size, seed=seed, epoch=epoch):
        rows = dataset.log.item[positions[at]][:, None]
        yield make_batch(dataset, positions[at], rows, labels[at, None], config=config)


def hardest(rows: np.ndarray, scores: np.ndarray, count: int = NEGATIVES) -> np.ndarray:
    """The positive and `count` of the negatives: half are those that score highest, half the first ones drawn of the rest.

    Only hard ones would teach the model nothing about easy ones, and many of the hardest are positives yet to come.

    Args:
      rows: int32 [B, 1 + n], the positive first.
      scores: [B, 1 + n] of whoever judges.
      count: of negatives to keep, at most n.
    """
    order = np.argsort(-scores[:, 1:], axis=1, kind="stable")
    hard = order[:, : count // 2]
    left = np.ones(order.shape, bool)
    np.put_along_axis(left, hard, False, axis=1)
    easy = np.argsort(~left, axis=1, kind="stable")[:, : count - count // 2]
    chosen = np.take_along_axis(rows[:, 1:], np.concatenate([hard, easy], axis=1), axis=1)
    return np.concatenate([rows[:, :1], chosen], axis=1)


def _asking(helper: Helper) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    scores = jax.jit(partial(train.score, helper.model))

    def ask(at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        empty = np.zeros(rows.shape, np.float32)
        return np.array(scores(helper.params, make_batch(helper.dataset, at, rows, empty, config=helper.model.config)))

    return ask


def _first(targets: jax.Array) -> jax.Array:
    return jnp.zeros_like(targets).at[..., 0].set(1)


def _both(scores: Any, labels: Any, *, where: Any = None, log_q: Any = None) -> jax.Array:
    pointwise = losses.pointwise_bce(scores, labels, where=where)
    return losses.listwise_softmax(scores, labels, where=where, log_q=log_q) + pointwise


def _distilled(scores: Any, teacher: Any, *, where: Any = None) -> jax.Array:
    return _both(scores, _first(teacher), where=where) + losses.distill_listwise(scores, teacher, where=where)


def _corrected(scores: Any, log_q: Any, *, where: Any = None) -> jax.Array:
    return _both(scores, _first(log_q), where=where, log_q=log_q)


_LOSSES: dict[str, train.LossFn] = {
    DEFAULT: _both,
    "pointwise": losses.pointwise_bce,
    "listwise": losses.listwise_softmax,
    "logQ": _corrected,
    "distillation": _distilled,
    "hard negatives": _both,
}
