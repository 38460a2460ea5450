"""How well the scores rank: AUC, GAUC, HR@k, recall@k, NDCG@k, log-loss, calibration, on the host in float64.

Every metric is `f(scores, labels, *, where=None, ...)`: scores and labels (0 or 1) of one shape, and a bool mask that is true
where an entry counts. What stands in masked places is never looked at. Only the order of scores matters, except to log-loss
and calibration, which take logits. The rules are the same everywhere:

- *Ties* count as if broken at random: the value is the exact expectation over all orders of tied scores, so a model that
  scores everything alike gets chance level, and permuting candidates changes nothing.
- *Undefined* values (no data, one class only) are NaN, never an exception in the middle of an evaluation. Lists or groups
  without a value are left out of a mean and counted.
- *Bad input* (NaN scores, other labels than 0 and 1, shapes that do not fit) is a ValueError. Infinite scores are fine: they
  have an order.

Data that does not fit in memory goes through a class with `update` for each batch and `result`.

Sources: AUC as the rank statistic of Mann and Whitney 1947; GAUC, Zhu et al. 2017 and DIN (arXiv 1706.06978); NDCG, Jarvelin
and Kekalainen 2002, ties as in McSherry and Najork 2008; expected calibration error, Guo et al. 2017 (arXiv 1706.04599).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

Weighting = Literal["impressions", "mean"]
_WEIGHTINGS = ("impressions", "mean")


class Averaged(NamedTuple):
    """A mean over groups or lists, with how many it stands on."""

    value: float  # NaN where `used` is 0
    used: int  # groups or lists that have a value
    left_out: int  # those without one: of one class only (GAUC), without a positive (HR, recall, NDCG)


class Estimate(NamedTuple):
    """A value with a guaranteed bound: the exact one lies within `value` plus or minus `error`."""

    value: float
    error: float


class Calibration(NamedTuple):
    """Predicted against observed rates."""

    ratio: float  # sum of probabilities / positives: 1 is right, above 1 predicts too much; NaN without a positive
    error: float  # expected calibration error: mean over entries of |predicted - observed| of their bin
    predicted: np.ndarray  # float64 [bins] mean probability, NaN where the bin is empty
    observed: np.ndarray  # float64 [bins] share of positives, NaN where the bin is empty
    entries: np.ndarray  # int64 [bins]


# Over all pairs of a positive and a negative


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
    scores, positive = _valid_entries(scores, labels, where)
    won_twice, positives, negatives = _pairs(scores, positive, None)
    return _ratio(won_twice.sum(), 2 * positives.sum() * negatives.sum())


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
    scores, positive, groups = _grouped_entries(scores, labels, groups, where)
    if groups.dtype.kind not in "iu":
        groups = np.unique(groups, return_inverse=True)[1]
    total._add(scores, positive, groups)
    return total.result()


# By list: the top k of each


def hit_rate_at_k(scores: Any, labels: Any, *, k: int, where: Any = None) -> Averaged:
    """HR@k: the share of lists with at least one positive among their k highest scores.

    With one positive a list it equals recall@k. Where a tie straddles rank k, a list counts with the probability that a random
    order of the tie makes a hit.

    Args:
      scores: numbers [..., C].
      labels: 0 or 1 [..., C].
      k: at least 1; above C it means C.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.

    Returns:
      The mean, the lists used, and the lists left out for having no valid positive.

    Raises:
      ValueError: as `auc`, and for k below 1.

    Example:
      >>> hit_rate_at_k([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[0, 1, 1], [1, 0, 0]], k=2)
      Averaged(value=0.5, used=2, left_out=0)
    """
    scores, positive, valid = _lists(scores, labels, where)
    above, tied, slots = _top_k(scores, valid, k)
    sure = (positive & above).any(axis=1)
    n, p = tied.sum(axis=1), (positive & tied).sum(axis=1)
    # No hit in the tie: all its slots in the top k go to the n - p others, C(n - p, slots) / C(n, slots).
    log_factorial = np.append(0.0, np.cumsum(np.log(np.arange(1, scores.shape[1] + 1))))
    possible = slots <= n - p
    rest = np.where(possible, n - p - slots, 0)
    # In this order of operations a tie without positives gives exactly 0, not 1e-13.
    log_miss = (log_factorial[n - p] - log_factorial[n]) - (log_factorial[rest] - log_factorial[n - slots])
    hit = np.where(possible, -np.expm1(np.minimum(log_miss, 0)), 1)
    return _mean_of_lists(np.where(sure, 1.0, hit), positive.sum(axis=1))


def recall_at_k(scores: Any, labels: Any, *, k: int, where: Any = None) -> Averaged:
    """Recall@k: of the positives of a list, the share among its k highest scores; the mean over lists.

    The share of a ranker's best that a pre-ranker lets through is this metric with `top_k_labels` of the ranker as labels.
    Where a tie straddles rank k, its positives count with the share of the tie that fits.

    Args:
      scores: numbers [..., C].
      labels: 0 or 1 [..., C].
      k: at least 1; above C it means C.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.

    Returns:
      The mean, the lists used, and the lists left out for having no valid positive.

    Raises:
      ValueError: as `auc`, and for k below 1.

    Example:
      >>> recall_at_k([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[0, 1, 1], [1, 0, 0]], k=2)
      Averaged(value=0.25, used=2, left_out=0)
    """
    scores, positive, valid = _lists(scores, labels, where)
    above, tied, slots = _top_k(scores, valid, k)
    share = slots / np.maximum(tied.sum(axis=1), 1)
    kept = (positive & above).sum(axis=1) + (positive & tied).sum(axis=1) * share
    positives = positive.sum(axis=1)
    return _mean_of_lists(kept / np.maximum(positives, 1), positives)


def ndcg_at_k(scores: Any, labels: Any, *, k: int, where: Any = None) -> Averaged:
    """NDCG@k: discounted gain of the k highest scores over that of the best order; the mean over lists.

    DCG = sum over ranks r = 1..k of label_r / log2(r + 1); NDCG = DCG / DCG of the labels in descending order

    The gain is the label itself: for the exponential gain pass 2 ** labels - 1. Tied scores share the mean of their labels.

    Args:
      scores: numbers [..., C].
      labels: relevance [..., C], finite and not negative; 0/1 or graded.
      k: at least 1; above C it means C.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.

    Returns:
      The mean, the lists used, and the lists left out for having no valid positive.

    Raises:
      ValueError: NaN scores, negative or non-finite labels, shapes that do not fit, k below 1.

    Example:
      >>> ndcg_at_k([[3.0, 2.0, 1.0]], [[0, 1, 0]], k=2).value.__round__(4)
      0.6309
    """
    _check_k(k)
    scores, gains, valid = _lists(scores, labels, where, graded=True)
    rows, columns = scores.shape
    discounts = np.where(np.arange(columns) < k, 1 / np.log2(np.arange(columns) + 2), 0)
    order = np.lexsort((-scores, ~valid), axis=1)  # masked entries last, whatever their score
    ranked, counts = np.take_along_axis(scores, order, 1), np.take_along_axis(valid, order, 1)
    starts = np.ones((rows, columns), np.bool_)
    starts[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]) | (counts[:, 1:] != counts[:, :-1])
    tie = np.cumsum(starts) - 1  # the tie that each place belongs to, numbered through all lists
    gain = np.bincount(tie, np.take_along_axis(gains, order, 1).ravel()) / np.maximum(np.bincount(tie), 1)
    found = gain[tie].reshape(rows, columns) @ discounts
    best = -np.sort(-gains, axis=1) @ discounts
    return _mean_of_lists(found / np.where(best > 0, best, 1), best)


def top_k_labels(scores: Any, *, k: int, where: Any = None) -> np.ndarray:
    """The k highest scores of each list as labels, for asking how many of a ranker's best another model keeps.

    Args:
      scores: numbers [..., C].
      k: at least 1; lists with fewer valid candidates have them all.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.

    Returns:
      bool, shape of `scores`; of tied scores the first are taken, so that there are exactly k.

    Raises:
      ValueError: NaN scores, shapes that do not fit, k below 1.

    Example:
      >>> ranker, pre_ranker = [[4.0, 3.0, 2.0, 1.0]], [[9.0, 1.0, 5.0, 0.0]]
      >>> recall_at_k(pre_ranker, top_k_labels(ranker, k=2), k=3).value
      1.0
    """
    shape = np.shape(scores)
    scores, _, valid = _lists(scores, np.zeros(shape), where)
    above, tied, slots = _top_k(scores, valid, k)
    return (above | (tied & (np.cumsum(tied, axis=1) <= slots[:, None]))).reshape(shape)


# Of probabilities


def log_loss(scores: Any, labels: Any, *, where: Any = None) -> float:
    """Mean of -log of the probability that the model gave to what happened.

    mean of log(1 + exp(-s)) for a positive, log(1 + exp(s)) for a negative

    Args:
      scores: logits of any shape.
      labels: 0 or 1, shape of `scores`.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.

    Returns:
      Nats, at least 0; infinite where an infinite logit is wrong; NaN without data.

    Raises:
      ValueError: as `auc`.

    Example:
      >>> round(log_loss([0.0, 2.0], [1, 1]), 4)
      0.41
    """
    total = StreamingLogLoss()
    total.update(scores, labels, where=where)
    return total.result()


def calibration(scores: Any, labels: Any, *, where: Any = None, bins: int = 10) -> Calibration:
    """Predicted against observed: the overall ratio, and the error by bins of equal width in probability.

    ratio = sum of sigmoid(s) / positives; error = sum over bins of |sum of sigmoid(s) - positives| in the bin / entries

    Where all probabilities are small (advertising), ten bins put everything in the first: take more.

    Args:
      scores: logits of any shape.
      labels: 0 or 1, shape of `scores`.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.
      bins: how many, of equal width over [0, 1].

    Returns:
      Ratio, error and the table of bins, for a reliability diagram.

    Raises:
      ValueError: as `auc`, and for bins below 1.

    Example:
      >>> calibration([0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0])[:2]
      (2.0, 0.25)
    """
    total = StreamingCalibration(bins=bins)
    total.update(scores, labels, where=where)
    return total.result()


# Streaming: one `update` for each batch, one `result`


class StreamingMean:
    """The mean of values that arrive in batches.

    Example:
      >>> mean = StreamingMean()
      >>> mean.update([1.0, 2.0])
      >>> mean.merge(recall_at_k([[2.0, 1.0]], [[1, 0]], k=1))
      >>> mean.result()
      Averaged(value=1.3333333333333333, used=3, left_out=0)
    """

    def __init__(self) -> None:
        self._total, self._used, self._left_out = 0.0, 0, 0

    def update(self, values: Any, *, where: Any = None) -> None:
        """Adds values of any shape, where the mask is true. Raises ValueError for NaN."""
        values, _ = _valid_entries(values, np.zeros(np.shape(values)), where, name="values")
        self._total += float(values.sum())
        self._used += len(values)

    def merge(self, part: Averaged) -> None:
        """Adds a mean over other lists, each list with the weight 1; not for GAUC weighted by impressions."""
        if part.used:
            self._total += part.value * part.used
        self._used += part.used
        self._left_out += part.left_out

    def result(self) -> Averaged:
        """The mean so far; NaN without data."""
        return Averaged(_ratio(self._total, self._used), self._used, self._left_out)


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
        _check_bins(bins)
        self._bins = bins
        self._counts = np.zeros((2, bins), np.int64)  # negatives, positives

    def update(self, scores: Any, labels: Any, *, where: Any = None) -> None:
        """Adds entries; arguments and errors as those of `auc`."""
        scores, positive = _valid_entries(scores, labels, where)
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
        return Estimate(_ratio(won_twice.sum(), pairs), _ratio(tied.sum(), pairs))


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
        new = _grouped_entries(scores, labels, groups, where)
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
        return Averaged(_ratio(whole._total, whole._weight), whole._used, whole._left_out)

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


class StreamingLogLoss:
    """Log-loss of entries that arrive in batches.

    Example:
      >>> total = StreamingLogLoss()
      >>> total.update([0.0], [1])
      >>> total.update([2.0], [1])
      >>> round(total.result(), 4)
      0.41
    """

    def __init__(self) -> None:
        self._mean = StreamingMean()

    def update(self, scores: Any, labels: Any, *, where: Any = None) -> None:
        """Adds entries; arguments and errors as those of `log_loss`."""
        scores, positive = _valid_entries(scores, labels, where)
        self._mean.update(np.logaddexp(0, np.where(positive, -scores, scores)))

    def result(self) -> float:
        """The mean so far; NaN without data."""
        return self._mean.result().value


class StreamingCalibration:
    """Calibration of entries that arrive in batches.

    Args:
      bins: how many, of equal width over [0, 1].

    Raises:
      ValueError: bins below 1.

    Example:
      >>> total = StreamingCalibration()
      >>> total.update([0.0, 0.0], [1, 0])
      >>> total.update([0.0, 0.0], [0, 0])
      >>> total.result()[:2]
      (2.0, 0.25)
    """

    def __init__(self, *, bins: int = 10):
        _check_bins(bins)
        self._sums = np.zeros((2, bins))  # probabilities, positives
        self._count = np.zeros(bins, np.int64)

    def update(self, scores: Any, labels: Any, *, where: Any = None) -> None:
        """Adds entries; arguments and errors as those of `calibration`."""
        scores, positive = _valid_entries(scores, labels, where)
        probability = np.exp(-np.logaddexp(0, -scores))  # sigmoid without overflow
        bins = len(self._count)
        at = np.minimum((probability * bins).astype(np.int64), bins - 1)
        self._count += np.bincount(at, minlength=bins)
        for i, values in enumerate((probability, positive)):
            self._sums[i] += np.bincount(at, values, minlength=bins)

    def result(self) -> Calibration:
        """Ratio, error and table so far; NaN where undefined."""
        predicted, observed = self._sums / np.where(self._count > 0, self._count, np.nan)
        gap = float(np.abs(self._sums[0] - self._sums[1]).sum())
        ratio = _ratio(self._sums[0].sum(), self._sums[1].sum())
        return Calibration(ratio, _ratio(gap, self._count.sum()), predicted, observed, self._count.copy())


# Shared parts


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


def _top_k(scores: np.ndarray, valid: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of lists [B, C]: bool above the k-th highest score, bool tied with it, and how many of the tied are in the top k [B]."""
    _check_k(k)
    columns = scores.shape[1]
    if not columns:
        return valid, valid, np.zeros(len(scores), np.int64)
    # A partition, not a sort: linear in C, which counts when C is the whole catalogue.
    at = max(columns - k, 0)
    threshold = np.partition(scores, at, axis=1)[:, at, None]
    above, tied = valid & (scores > threshold), valid & (scores == threshold)
    return above, tied, np.minimum(k - above.sum(axis=1), tied.sum(axis=1))


def _mean_of_lists(values: np.ndarray, positives: np.ndarray) -> Averaged:
    """The mean over the lists that have a positive."""
    defined = positives > 0
    used = int(defined.sum())
    return Averaged(_ratio(values[defined].sum(), used), used, len(defined) - used)


def _ratio(above: Any, below: Any) -> float:
    return float(above / below) if below else math.nan


def _check_k(k: int) -> None:
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k!r}")


def _check_bins(bins: int) -> None:
    if not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins: expected an integer of at least 1, got {bins!r}")


def _valid_entries(scores: Any, labels: Any, where: Any, *, name: str = "scores") -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [n] and positive bool [n] of the valid entries, flat."""
    scores, labels, valid = _checked(scores, labels, where, name=name)
    return scores[valid], labels[valid] != 0


def _grouped_entries(scores: Any, labels: Any, groups: Any, where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_valid_entries`, with the groups [n]."""
    scores, labels, valid = _checked(scores, labels, where)
    groups = np.asarray(groups)
    if groups.dtype.kind == "f" and groups.size:
        raise ValueError(f"groups: expected integers or strings, got {groups.dtype}")
    return scores[valid], labels[valid] != 0, _broadcast(groups, "groups", scores.shape)[valid]


def _lists(scores: Any, labels: Any, where: Any, *, graded: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and mask as [B, C]; masked scores are -inf, masked labels 0. Labels are bool unless graded."""
    scores, labels, valid = _checked(scores, labels, where, graded=graded)
    if not scores.ndim:
        raise ValueError("scores: expected lists [..., C], got a single number")
    shape = (math.prod(scores.shape[:-1]), scores.shape[-1])
    labels = np.where(valid, labels, 0)
    if not graded:
        labels = labels != 0
    return np.where(valid, scores, -np.inf).reshape(shape), labels.reshape(shape), valid.reshape(shape)


def _checked(
    scores: Any, labels: Any, where: Any, *, graded: bool = False, name: str = "scores"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores float64, labels and mask, all of the shape of `scores`."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if labels.shape != scores.shape:
        raise ValueError(f"labels: expected the shape of scores {scores.shape}, got {labels.shape}")
    valid = np.asarray(True if where is None else where)
    if valid.dtype != np.bool_:
        raise ValueError(f"where: expected a bool mask, got dtype {valid.dtype}")
    valid = np.broadcast_to(valid, scores.shape) if where is None else _broadcast(valid, "where", scores.shape)
    if labels.dtype != np.bool_:
        labels = labels.astype(np.float64)
        wrong = ~(np.isfinite(labels) & (labels >= 0)) if graded else (labels != 0) & (labels != 1)
        _refuse(wrong & valid, labels, "labels", "finite values of at least 0" if graded else "0 or 1")
    _refuse(np.isnan(scores) & valid, scores, name, "no NaN")
    return scores, labels, valid


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, expected: str) -> None:
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        place = [int(i) for i in at]
        raise ValueError(f"{name}: expected {expected}, got {values[at]} at {place} ({int(wrong.sum())} such entries)")


def _broadcast(value: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    # The same rank is required: a mask [B] against scores [B, B] would fit silently along the wrong axis.
    if value.ndim != len(shape) or any(have not in (1, want) for have, want in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape of the same rank that broadcasts to scores {shape}, got {value.shape}")
    return np.broadcast_to(value, shape)
