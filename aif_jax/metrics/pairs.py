"""AUC and GAUC: over all pairs of a positive and a negative."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from aif_jax.checks import expect
from aif_jax.metrics.entries import Averaged, grouped_entries, ratio, valid_entries

Weighting = Literal["impressions", "mean"]
_WEIGHTINGS = get_args(Weighting)


def auc(scores: Any, labels: Any, *, where: Any = None) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half; O(n log n).

    (pairs won + pairs tied / 2) / (positives * negatives)

    Args:
      scores, labels: numbers and 0 or 1, of one shape.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.

    Returns:
      A number in [0, 1]; NaN where there are not both classes.

    Raises:
      ValueError: NaN scores, other labels than 0 and 1, shapes that do not fit.

    Example:
      >>> auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
      0.75
    """
    scores, positive = valid_entries(scores, labels, where)
    won_twice, positives, negatives = _pairs(scores, positive, None)
    return ratio(won_twice.sum(), 2 * positives.sum() * negatives.sum())


def gauc(scores: Any, labels: Any, groups: Any, *, where: Any = None, weighting: Weighting = "impressions") -> Averaged:
    """Group AUC: the mean of the AUC within each group, as a rule a user or a request.

    sum_g w_g AUC_g / sum_g w_g, over groups with both classes; w_g = entries of g ("impressions") or 1 ("mean")

    Args:
      scores, labels, where: as in `auc`.
      groups: integers or strings; rank of `scores` and broadcastable to it, such as [B, 1] for candidates [B, C].
      weighting: "impressions" (each group by its valid entries, as the papers report) or "mean" (each group alike).

    Returns:
      The value, the groups used and those left out for having one class only. A group without a valid entry is neither.

    Raises:
      ValueError: as `auc`, and for an unknown weighting.

    Example:
      >>> gauc([0.2, 0.9, 0.5, 0.3, 0.3, 0.7], [0, 1, 0, 1, 0, 1], [7, 7, 7, 8, 8, 9])
      Averaged(value=0.8, used=2, left_out=1)
    """
    expect(weighting in _WEIGHTINGS, "weighting", f"one of {_WEIGHTINGS}", repr(weighting))
    scores, positive, groups = grouped_entries(scores, labels, groups, where)
    if groups.dtype.kind not in "iu":
        groups = np.unique(groups, return_inverse=True)[1]
    won_twice, positives, negatives = _pairs(scores, positive, groups)
    pairs_twice = 2 * positives * negatives
    used = pairs_twice > 0
    weights = (positives + negatives)[used] if weighting == "impressions" else np.ones(used.sum())
    value = ratio(weights @ (won_twice[used] / pairs_twice[used]), weights.sum())
    return Averaged(value, int(used.sum()), int((~used).sum()))


def _pairs(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By group: twice the pairs won (a tie is one half), positives, negatives; int64 [groups], so exact for every order."""
    n = len(scores)
    if not n:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(scores) if groups is None else np.lexsort((scores, groups))
    scores, positive = scores[order], positive[order]
    group_starts = np.zeros(n, np.bool_)
    group_starts[0] = True
    if groups is not None:
        groups = groups[order]
        group_starts[1:] = groups[1:] != groups[:-1]
    tie_starts = group_starts.copy()
    tie_starts[1:] |= scores[1:] != scores[:-1]

    ties = np.flatnonzero(tie_starts)
    positives = np.add.reduceat(positive.astype(np.int64), ties)
    negatives = np.diff(np.append(ties, n)) - positives
    first = np.flatnonzero(group_starts[ties])  # the first tie of each group
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[first], np.diff(np.append(first, len(ties))))
    won_twice = positives * (2 * below + negatives)
    return np.add.reduceat(won_twice, first), np.add.reduceat(positives, first), np.add.reduceat(negatives, first)
