"""Over all pairs of a positive and a negative: AUC and GAUC, whole and streaming."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from aif_jax.metrics.entries import check_bins, grouped_entries, valid_entries
from aif_jax.metrics.means import Averaged, ratio

Weighting = Literal["impressions", "mean"]
_WEIGHTINGS = ("impressions", "mean")


class Estimate(NamedTuple):
    """A value with a guaranteed bound: the exact one lies within `value` plus or minus `error`."""

    value: float
    error: float


def auc(scores: Any, labels: Any, *, where: Any = None) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    (pairs won + pairs tied / 2) / (positives * negatives), exact, in O(n log n)

    Args:
      scores: numbers of any shape.
      labels: 0 or 1, shape of `scores`.
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
      scores: numbers of any shape.
      labels: 0 or 1, shape of `scores`.
      groups: integers or strings; rank of `scores` and broadcastable to it, such as [B, 1] for candidates [B, C].
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.
      weighting: "impressions" (each group by its valid entries, as the papers report) or "mean" (each group alike).

    Returns:
      The value, the groups used and the groups left out for having one class only. A group without a valid entry is neither.

    Raises:
      ValueError: as `auc`, and for an unknown weighting.

    Example:
      >>> gauc([0.2, 0.9, 0.5, 0.3, 0.3, 0.7], [0, 1, 0, 1, 0, 1], [7, 7, 7, 8, 8, 9])
      Averaged(value=0.8, used=2, left_out=1)
    """
    total = StreamingGAUC(weighting=weighting)
    scores, positive, groups = grouped_entries(scores, labels, groups, where)
    if groups.dtype.kind not in "iu":
        groups = np.unique(groups, return_inverse=True)[1]
    total._add(scores, positive, groups)
    return total.result()


class StreamingAUC:
    """AUC from two histograms of scores, in constant memory, with a bound on its error that the data itself gives.

    Bins are equal in s / (1 + |s|), so every score has its bin and the finest are where logits mostly lie: with 2^16 bins a
    step is 3e-5 near 0 and 4e-3 near 10. Pairs in different bins are counted exactly; pairs in one bin count one half, so the
    value is off by at most half their share: error = sum_b positives_b negatives_b / (2 positives negatives).

    Args:
      bins: 16 bytes of memory each.

    Raises:
      ValueError: bins below 1.

    Example:
      >>> total = StreamingAUC()
      >>> total.update([0.1, 0.4], [0, 0])
      >>> total.update([0.35, 0.8], [1, 1])
      >>> total.result()
      Estimate(value=0.75, error=0.0)
    """

    def __init__(self, *, bins: int = 1 << 16):
        check_bins(bins)
        self._bins = bins
        self._counts = np.zeros((2, bins), np.int64)  # negatives, positives

    def update(self, scores: Any, labels: Any, *, where: Any = None) -> None:
        """Adds entries; arguments and errors as those of `auc`."""
        scores, positive = valid_entries(scores, labels, where)
        # Each operation is monotone under rounding (which s / (1 + |s|) is not), so bins never contradict the order of scores.
        place = np.copysign(1 - 1 / (1 + np.abs(scores)), scores)
        at = np.minimum(((place + 1) * (self._bins / 2)).astype(np.int64), self._bins - 1)
        for label in (0, 1):
            self._counts[label] += np.bincount(at[positive == label], minlength=self._bins)

    def merge(self, other: StreamingAUC) -> None:
        """Adds what another one, with as many bins, has seen. Raises ValueError if it has other bins."""
        if other._bins != self._bins:
            raise ValueError(f"StreamingAUC.merge: expected {self._bins} bins, got {other._bins}")
        self._counts += other._counts

    def result(self) -> Estimate:
        """The value so far and the bound on its error; NaN both where there are not both classes."""
        negatives, positives = self._counts
        pairs = 2 * int(positives.sum()) * int(negatives.sum())
        tied = positives * negatives
        won_twice = positives * 2 * (np.cumsum(negatives) - negatives) + tied
        return Estimate(ratio(won_twice.sum(), pairs), ratio(tied.sum(), pairs))


class StreamingGAUC:
    """GAUC, exact, of entries that arrive in ascending order of group: in memory are one batch and one group.

    A batch may end within a group, and entries within a batch may stand in any order; but no batch may hold a group below the
    last group of an earlier batch, for that one's AUC is already closed.

    Args:
      weighting: as for `gauc`.

    Raises:
      ValueError: an unknown weighting.

    Example:
      >>> total = StreamingGAUC()
      >>> total.update([0.2, 0.9], [0, 1], [7, 7])
      >>> total.update([0.5, 0.3, 0.3, 0.7], [0, 1, 0, 1], [7, 8, 8, 9])
      >>> total.result()
      Averaged(value=0.8, used=2, left_out=1)
    """

    def __init__(self, *, weighting: Weighting = "impressions"):
        if weighting not in _WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {_WEIGHTINGS}, got {weighting!r}")
        self._weighting: Weighting = weighting
        self._total, self._weight, self._used, self._left_out = 0.0, 0.0, 0, 0
        self._open = np.zeros(0), np.zeros(0, np.bool_), np.zeros(0, np.int64)  # the last group may go on

    def update(self, scores: Any, labels: Any, groups: Any, *, where: Any = None) -> None:
        """Adds entries; arguments as those of `gauc`, groups integers.

        Raises:
          ValueError: as `gauc`, for groups that are not integers, and for a group below one that came before.
        """
        new = grouped_entries(scores, labels, groups, where)
        if not len(new[2]):
            return
        if not np.can_cast(new[2].dtype, np.int64):
            raise ValueError(f"groups: expected integers that int64 can hold, got {new[2].dtype}")
        if len(self._open[2]) and new[2].min() < self._open[2][0]:
            raise ValueError(f"groups: expected none below {self._open[2][0]}, which came before, got {new[2].min()}")
        merged = [np.concatenate(pair) for pair in zip(self._open, new, strict=True)]
        last = merged[2] == new[2].max()
        self._add(*(array[~last] for array in merged))
        scores, positive, groups = (array[last] for array in merged)
        self._open = scores, positive, groups

    def result(self) -> Averaged:
        """The mean so far, the group that is still open included; NaN where no group has both classes."""
        whole = StreamingGAUC(weighting=self._weighting)
        whole._total, whole._weight, whole._used, whole._left_out = self._total, self._weight, self._used, self._left_out
        whole._add(*self._open)
        return Averaged(ratio(whole._total, whole._weight), whole._used, whole._left_out)

    def _add(self, scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> None:
        """Adds whole groups."""
        won_twice, positives, negatives = _pairs(scores, positive, groups)
        pairs_twice = 2 * positives * negatives
        used = pairs_twice > 0
        weight = (positives + negatives)[used] if self._weighting == "impressions" else np.ones(used.sum())
        self._total += float(weight @ (won_twice[used] / pairs_twice[used]))
        self._weight += float(weight.sum())
        self._used += int(used.sum())
        self._left_out += int((~used).sum())


def _pairs(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By group: twice the pairs won (a tie is one half, so this is an integer), positives, negatives; each int64 [groups].

    Integers all the way make the AUC exact, and the same for every order of the entries.
    """
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
