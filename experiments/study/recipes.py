"""Training recipes: how lists of candidates are made, and the loss. Every recipe trains for the same number of steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.blocks.item_offset import UNTRAINED, popularity_offset
from aif_jax.data import candidates
from aif_jax.data.candidates import CandidateLists, NegativeSampler, SampleKey, SourceFn
from aif_jax.data.dataset import Dataset
from aif_jax.train import losses
from aif_jax.train.fit import teacher_scores
from aif_jax.types import Params

NEGATIVES = 15
POOL = 64  # candidates among which hard negatives are looked for
LIKED = 8  # action row of four stars
DEFAULT = "listwise + pointwise"
"""What models are compared with. A softmax over a list says nothing about the level of the list's scores, which GAUC, pooling
all requests of a user, and log-loss depend on; the pointwise part fixes it."""
MODEL = "+ SimTier"
"""The model that recipes are compared on: the paper's."""
CATALOGUE = "logQ"
"""The recipe for ranking the whole catalogue: the others' scores are likelihoods over those of the sampler."""
MIXED = "NCE, half uniform"
CORRECTED: dict[str, dict[str, Any]] = {CATALOGUE: {}, MIXED: {"uniform": 0.5}}
"""Recipes whose losses are corrected for the sampler, and what else differs in them."""
LARGER = "63 negatives"
FROM_PRESET = "distillation from preset"
FROM_LONGER = "distillation from preset, L=2048"
SHARPER = "listwise at temperature 0.5"
"""The recipe whose listwise loss divides scores by 0.5: that asks more for the top of the list."""
OPTIONS: dict[str, dict[str, Any]] = CORRECTED | {LARGER: {"negatives": 63}}
"""What differs from the default in how candidates of a recipe are drawn."""
HIDDEN = {"item id dropout 0.1": 0.1}
"""Recipes that hide the item id of a share of candidates; items without a training event are scored as the unknown item."""
OF_PRESET = (FROM_PRESET, LARGER, MIXED, SHARPER, *HIDDEN)
"""Recipes that the preset and the two-tower model are compared on, on the validation slice."""
NAMES = (
    DEFAULT, "pointwise", "listwise", SHARPER, *CORRECTED, LARGER, *HIDDEN, "distillation", FROM_PRESET, FROM_LONGER,
    "hard negatives",
)  # fmt: skip
UNTRAINED_OF = {"two_tower": 1.0, "preset": 1.5, "preset, L=2048": 1.0, "streaming": 1.5}
UNTRAINED_ON = {"taobao": 2.0}
"""Offset of items without a training event, by model, and by data set where all models have the same: of -100, 0, 0.5, ..., 3
(0, 1, 2, 3 on Taobao) the one with the best HR@100 on the validation slice, seed 0; of "preset, L=2048" with factors."""
HELPERS = {"distillation": "exact", FROM_PRESET: "preset", FROM_LONGER: "preset, L=2048", "hard negatives": "two_tower"}
"""Recipe to the model whose trained parameters it needs."""


class Helper(NamedTuple):
    """A trained model that a recipe scores candidates with: the teacher, or the one that finds hard negatives."""

    model: aif.PreRanker
    params: Params


def loss(recipe: str) -> losses.Loss:
    """The loss of a recipe; column 0 of every list is the positive.

    - "listwise + pointwise": the sum of the two; "hard negatives" too, over other lists.
    - "logQ": the same; the listwise term is corrected for how often the sampler draws a negative, the pointwise one is not.
    - "NCE, half uniform": the same; half of the negatives are uniform, and both terms are corrected, the positive too
      (noise-contrastive estimation), so both teach log P.
    - "distillation": the same, and the divergence from the teacher's softmax.
    - "63 negatives": the same over longer lists.
    - "listwise at temperature ...": the same, with the listwise term over scores / temperature.
    - "item id dropout ...": the same, where the item id of some candidates is hidden.
    """
    if recipe not in _LOSSES:
        raise ValueError(f"recipe: expected one of {NAMES}, got {recipe!r}")
    return _LOSSES[recipe]


def source(recipe: str, dataset: Dataset, *, counts: np.ndarray, helper: Helper | None = None) -> SourceFn:
    """Candidates of the next-item task, drawn by the training counts [N] of items. Labels are 0 and 1, or the teacher's logits
    in "distillation".

    Raises:
      ValueError: an unknown recipe, or a helper that is missing.
    """
    if recipe not in NAMES:
        raise ValueError(f"recipe: expected one of {NAMES}, got {recipe!r}")
    if recipe in HELPERS and helper is None:
        raise ValueError(f"recipe {recipe!r}: expected a trained {HELPERS[recipe]} as helper, got none")
    hard = recipe == "hard negatives"
    options = OPTIONS.get(recipe, {})
    sampler = NegativeSampler(counts, uniform=options.get("uniform", 0.0))
    negatives = POOL if hard else options.get("negatives", NEGATIVES)
    drawn = candidates.sampled_negatives(  # met items too, as in all records of this study; `question` follows the data
        dataset, sampler=sampler, negatives=negatives, logq_correction=recipe in CORRECTED, repeats=True
    )
    if recipe == CATALOGUE:
        return candidates.CandidateSource(
            lambda positions, draw: _sampled_softmax(drawn(positions, draw)), drawn.description | {"positive": "held"}
        )
    if helper is None:
        return drawn

    def scored(positions: np.ndarray, draw: SampleKey) -> CandidateLists:
        rows, labels, _ = drawn(positions, draw)
        scores = teacher_scores(*helper, dataset, positions, rows)
        return CandidateLists(hardest(rows, scores), labels[:, : 1 + NEGATIVES]) if hard else CandidateLists(rows, scores)

    return scored


def shorter(longest: int) -> tuple[int, ...]:
    """Lengths of histories below the longest one that batches may have: each is half of the next."""
    return tuple(longest >> n for n in (4, 3, 2, 1) if longest >> n >= 64)


def offset(recipe: str, counts: np.ndarray, *, model: str, dataset: str) -> np.ndarray:
    """What makes log P of a recipe's scores, float32 [N]: nothing but the place of items without a training event in recipes
    that are corrected, nothing at all where training draws those too.
    """
    if recipe not in CORRECTED:
        return popularity_offset(counts, untrained=UNTRAINED_ON.get(dataset, UNTRAINED_OF.get(model, UNTRAINED)))
    return popularity_offset(counts, power=0.0, untrained=0.0 if CORRECTED[recipe].get("uniform") else UNTRAINED)


def labelled(dataset: Dataset, labels: np.ndarray) -> SourceFn:
    """Each event's item as the only candidate, with the event's label, float32 [events]."""
    return lambda positions, draw: CandidateLists(dataset.log.item[positions][:, None], labels[positions][:, None])


def hardest(rows: np.ndarray, scores: np.ndarray, count: int = NEGATIVES) -> np.ndarray:
    """The positive and `count` of the negatives: half are those that score highest, half the first ones drawn of the rest.

    Only hard ones would teach the model nothing about easy ones, and many of the hardest are positives yet to come.

    Args:
      rows: int32 [B, 1 + n], the positive first.
      scores: [B, 1 + n] of the model that judges.
      count: of negatives to keep, at most n.
    """
    order = np.argsort(-scores[:, 1:], axis=1, kind="stable")
    hard = order[:, : count // 2]
    left = np.ones(order.shape, bool)
    np.put_along_axis(left, hard, False, axis=1)
    easy = np.argsort(~left, axis=1, kind="stable")[:, : count - count // 2]
    chosen = np.take_along_axis(rows[:, 1:], np.concatenate([hard, easy], axis=1), axis=1)
    return np.concatenate([rows[:, :1], chosen], axis=1)


def _sampled_softmax(lists: CandidateLists) -> CandidateLists:
    """The correction of negatives alone: every list holds its positive."""
    assert lists.log_q is not None  # of a corrected source
    log_q = lists.log_q.copy()
    log_q[:, 0] = 0
    return lists._replace(log_q=log_q)


def _first(targets: jax.Array) -> jax.Array:
    """Label 1 for the positive, in column 0."""
    return jnp.zeros_like(targets).at[..., 0].set(1)


_BOTH = losses.listwise_softmax + losses.pointwise_bce
_LOSSES: dict[str, losses.Loss] = {
    DEFAULT: _BOTH,
    "pointwise": losses.pointwise_bce,
    "listwise": losses.listwise_softmax,
    SHARPER: losses.listwise_softmax(temperature=0.5) + losses.pointwise_bce,
    **dict.fromkeys(CORRECTED, _BOTH),
    CATALOGUE: losses.listwise_softmax + losses.pointwise_bce(logq_correction=False),
    **dict.fromkeys((LARGER, *HIDDEN), _BOTH),
    **dict.fromkeys(("distillation", FROM_PRESET, FROM_LONGER), _BOTH.of(_first) + losses.distill_listwise),
    "hard negatives": _BOTH,
}
