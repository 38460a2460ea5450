"""The question of the whole catalogue: where is the event's item among all that the user has not met?

Two things decide it that sampled candidates do not show. Scores trained against negatives of probability q are log P / q, and
the catalogue asks for log P; and items without a training event are never pushed down, so they fill the best places. So each
model is ranked twice: *as it is*, and *corrected*, with the offset of `blocks.popularity_offset` (items without an event last).
A pre-ranker sees what retrieval found: its hit rate among the best of another model's ranking is the third figure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax.blocks import popularity_offset
from aif_jax.data.dataset import Dataset
from aif_jax.train.evaluate import best_rows, catalogue_scores, rank_of
from aif_jax.types import Params

KS = (10, 50, 100, 500)
RETRIEVED = 1000  # items that a retrieval hands to the pre-ranker


class Asked(NamedTuple):
    """Where the event's item is, for R requests."""

    plain: np.ndarray  # int64 [R] among all items, by the scores as they are; 0 is the best
    corrected: np.ndarray  # int64 [R] by the scores with the offset
    retrieved: np.ndarray | None  # int64 [R] among what was retrieved, by the corrected scores; N where it was not
    top: np.ndarray  # int32 [R, RETRIEVED] the best rows by the corrected scores
    untrained: np.ndarray  # float32 [R] share of items without a training event among the 100 best, scores as they are


def ask(
    model: aif.PreRanker,
    params: Params,
    dataset: Dataset,
    positions: np.ndarray,
    counts: np.ndarray,
    *,
    offset: np.ndarray | None = None,
    retrieved: np.ndarray | None = None,
    repeats: bool = False,
    batch_size: int = 64,
    progress: bool = True,
) -> Asked:
    """Ranks the catalogue for events.

    Args:
      model, params: what scores.
      dataset: the data.
      positions: int64 [R] of the events.
      counts: [N] training events of each item.
      offset: float32 [N] for the corrected scores; None takes `popularity_offset(counts)`, which fits scores trained against
        negatives by count ** 0.75.
      retrieved: int32 [R, n] rows that a retrieval found.
      repeats: whether users come back to items.
      batch_size: requests scored at a time.
      progress: whether to show a bar.
    """
    offset = popularity_offset(counts) if offset is None else offset
    size, items, best = len(positions), len(dataset.catalogue), min(RETRIEVED, len(dataset.catalogue) - 1)
    plain, corrected, within = (np.zeros(size, np.int64) for _ in range(3))
    top, untrained = np.zeros((size, best), np.int32), np.zeros(size, np.float32)
    given = dict(repeats=repeats, batch_size=batch_size, progress=progress)
    for at, scores in catalogue_scores(model, params, dataset, positions, **given):
        target = dataset.log.item[positions[at]]
        plain[at] = rank_of(scores, target)
        untrained[at] = (counts[best_rows(scores, min(100, items - 1))] == 0).mean(1)
        shifted = scores + offset
        corrected[at], top[at] = rank_of(shifted, target), best_rows(shifted, best)
        if retrieved is not None:
            rows = retrieved[at]
            of_target = shifted[np.arange(len(at)), target][:, None]
            ahead = (np.take_along_axis(shifted, rows, 1) >= of_target).sum(1) - 1
            within[at] = np.where((rows == target[:, None]).any(1), ahead, items)
    return Asked(plain, corrected, within if retrieved is not None else None, top, untrained)


def figures(asked: Asked, untrained: np.ndarray) -> dict[str, Any]:
    """Hit rates at KS of all requests, and of those for an item without a training event (`untrained` bool [R])."""
    found: dict[str, Any] = {"plain": hit_rates(asked.plain), "corrected": hit_rates(asked.corrected)}
    if asked.retrieved is not None:
        found["retrieved"] = hit_rates(asked.retrieved)
    if untrained.any():
        found["plain_untrained"] = hit_rates(asked.plain[untrained])
    return found | {
        "requests": len(asked.plain),
        "requests_for_untrained": float(untrained.mean()),
        "untrained_in_top100": float(asked.untrained.mean()),
    }


def hit_rates(ranks: np.ndarray) -> dict[str, float]:
    """HR@k by request."""
    return {f"hr{k}": float((ranks < k).mean()) for k in KS}
