"""Metrics over entries and their pairs: AUC, GAUC, calibration; and the checks that all metrics share.

Recall of the top k of each list, and the ranker's top k as labels.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from aif_jax.checks import expect, expect_entries, expect_finite, expect_integer, expect_like_scores


class Mean(NamedTuple):
    """A mean over lists, and over how many of them.

    Attributes:
      value: the mean; NaN if `used` is 0.
      used: lists that have a value.
      left_out: lists without one, as they have no positive.
    """

    value: float
    used: int
    left_out: int


class ByUser(NamedTuple):
    """A metric that is a weighted mean over users, before it is averaged.

    Attributes:
      users: integers or strings [U], ascending, each once.
      values: float64 [U], the metric of each user alone.
      weights: float64 [U], above 0.
    """

    users: np.ndarray
    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """The weighted mean; NaN without users."""
        total = self.weights.sum()
        return float(self.values @ self.weights / total) if total > 0 else float("nan")


class Calibration(NamedTuple):
    """Predicted against observed rates.

    Attributes:
      ratio: sum of probabilities over positives: above 1 predicts too much; NaN without a positive.
      error: expected calibration error: mean over entries of |predicted - observed| of their bin.
      predicted, observed: float64 [bins] mean probability and share of positives; NaN in an empty bin.
      entries: float64 [bins] how many, or their weight.
    """

    ratio: float
    error: float
    predicted: np.ndarray
    observed: np.ndarray
    entries: np.ndarray


def auc(scores: Any, labels: Any, *, where: Any = None) -> float:
    """Return area under the ROC curve: the chance that a positive scores above a negative, ties counting one half; O(n log n).

    (pairs won + pairs tied / 2) / (positives * negatives)

    Args:
      scores, labels: numbers and 0 or 1, of one shape.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.

    Raises:
      ValueError: NaN scores, other labels than 0 and 1, shapes that do not fit.

    Example:
      >>> auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
      0.75
    """
    scores, positive = flat_entries(scores, labels, where)
    won_twice, positives, negatives = _pairs(scores, positive, np.zeros(len(scores), np.int64))
    return ratio(won_twice.sum(), 2 * positives.sum() * negatives.sum())


def gauc_by_user(scores: Any, labels: Any, users: Any, *, where: Any = None) -> ByUser:
    """Return group AUC before it is averaged: the AUC within each user who has both classes, weighted by requests.

    GAUC = sum_u w_u AUC_u / sum_u w_u, w_u = requests of u

    A request is a list [C], the last axis, with a valid entry of the user; a single number of flat scores [n] is one too. So
    a long list weighs as much as a short one, and in the AUC of its user each of its entries counts.

    Args:
      scores, labels, where: see `auc`.
      users: integers or strings; rank of `scores` and broadcastable to it, such as [B, 1] for candidates [B, C].

    Example:
      >>> found = gauc_by_user([0.2, 0.9, 0.5, 0.3, 0.3, 0.7], [0, 1, 0, 1, 0, 1], [7, 7, 7, 8, 8, 9])
      >>> found.values.tolist(), found.mean
      ([1.0, 0.5], 0.8)
      >>> gauc_by_user([[0.2, 0.9, 0.5], [0.7, 0.3, 0.0]], [[0, 1, 0], [0, 1, 0]], [[7], [8]]).values.tolist()
      [1.0, 0.5]
    """
    scores, labels, valid = _checked(scores, labels, where)
    users = np.asarray(users)
    expect(users.dtype.kind != "f" or not users.size, "users", "integers or strings", users.dtype)
    users = _broadcast(users, "users", scores.shape)[valid]
    lists = np.flatnonzero(valid) // (max(1, valid.shape[-1]) if valid.ndim > 1 else 1)
    scores, positive = scores[valid], labels[valid] != 0
    names, users = np.unique(users, return_inverse=True)
    requests = np.bincount(np.unique(users.astype(np.int64) * valid.size + lists) // max(1, valid.size), minlength=len(names))
    won_twice, positives, negatives = _pairs(scores, positive, users)
    pairs_twice = 2 * positives * negatives
    used = pairs_twice > 0
    return ByUser(names[used], won_twice[used] / pairs_twice[used], requests[used].astype(np.float64))


def calibration(
    scores: Any, labels: Any, *, where: Any = None, weights: Any = None, bins: int = 10, by: Literal["width", "size"] = "width"
) -> Calibration:
    """Return predicted against observed: the overall ratio, and the error by bins of probability.

    ratio = sum of sigmoid(s) / positives; error = sum over bins of |sum of sigmoid(s) - positives| in the bin / entries

    Args:
      scores: logits; `labels`, `where` as in `auc`.
      weights: how many entries each stands for, as `where`: 1 / (n q) for a negative that n draws from q gave.
      bins: how many; where all probabilities are small (advertising), take more than ten of equal width.
      by: "width" for bins of equal width over [0, 1]; "size" for bins of as many entries by probability, equal ones in one bin.

    Example:
      >>> calibration([0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0])[:2]
      (2.0, 0.25)
      >>> calibration([-9.0, -9.0, 0.0, 0.0], [0, 0, 0, 1], bins=2, by="size").observed.tolist()
      [0.0, 0.5]
    """
    expect_integer(bins, "bins", least=1)
    expect(by in ("width", "size"), "by", "'width' or 'size'", repr(by))
    logits, positive, weight = weighted_entries(scores, labels, where, weights)
    probability, share = probability_of(logits), np.zeros(len(logits))
    if by == "size" and weight.any():
        _, place = np.unique(logits, return_inverse=True)
        equal = np.bincount(place, weight)  # entries of each logit
        share = ((np.cumsum(equal) - equal / 2) / weight.sum())[place]
    place = bin_of(probability if by == "width" else share, bins)
    entries, probabilities, positives = (
        np.bincount(place, values, minlength=bins) for values in (weight, weight * probability, weight * positive)
    )
    predicted, observed = np.stack([probabilities, positives]) / np.where(entries > 0, entries, np.nan)
    error = ratio(np.abs(probabilities - positives).sum(), entries.sum())
    return Calibration(ratio(probabilities.sum(), positives.sum()), error, predicted, observed, entries)


def bin_of(probability: np.ndarray, bins: int) -> np.ndarray:
    """Return int64 [n], the bin of equal width of each share from 0 to 1."""
    return np.minimum((probability * bins).astype(np.int64), bins - 1)


def weighted_entries(scores: Any, labels: Any, where: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, positives and weights of the valid entries, flat; weights of 1 for None."""
    weights = np.ones(np.shape(scores)) if weights is None else np.asarray(weights, np.float64)
    scores, positive, weight = flat_entries(scores, labels, where, weights=weights)
    expect_finite(weight, "weights", minimum=0)
    return scores, positive, weight


def probability_of(logits: np.ndarray) -> np.ndarray:
    """Return the sigmoid, without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def _pairs(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return by group 0, 1, ...: twice the pairs won by Mann and Whitney's ranks (a tie is one half), positives, negatives."""
    order = np.unique(scores, return_inverse=True)[1]
    _, tie, counts = np.unique(groups * len(scores) + order, return_inverse=True, return_counts=True)
    rank_twice, entries = (2 * np.cumsum(counts) - counts + 1)[tie], np.bincount(groups)
    positives, before = np.bincount(groups[positive], minlength=len(entries)), np.cumsum(entries) - entries
    won_twice = np.bincount(groups[positive], rank_twice[positive], len(entries)) - positives * (2 * before + positives + 1)
    return won_twice, positives, entries - positives


def ratio(above: Any, below: Any) -> float:
    """Return the quotient; NaN where there is nothing to divide by."""
    return float(above / below) if below else math.nan


def listed_entries(scores: Any, labels: Any, where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, positives and mask as [B, C]; masked scores are -inf, masked positives false."""
    scores, labels, valid = _checked(scores, labels, where)
    expect(scores.ndim > 0, "scores", "lists [..., C]", "a single number")
    shape = (math.prod(scores.shape[:-1]), scores.shape[-1])
    return np.where(valid, scores, -np.inf).reshape(shape), ((labels != 0) & valid).reshape(shape), valid.reshape(shape)


def flat_entries(scores: Any, labels: Any, where: Any, **others: Any) -> tuple[np.ndarray, ...]:
    """Return scores float64 [n] and positive bool [n] of valid entries, then `others` [n], such as users, of the same."""
    scores, labels, valid = _checked(scores, labels, where)
    spread = (_broadcast(np.asarray(values), name, scores.shape)[valid] for name, values in others.items())
    return scores[valid], labels[valid] != 0, *spread


def _checked(scores: Any, labels: Any, where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores float64, labels and mask, all of the shape of `scores`."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    expect(labels.shape == scores.shape, "labels", f"the shape of scores {scores.shape}", labels.shape)
    valid = np.asarray(True if where is None else where)
    expect(valid.dtype == np.bool_, "where", "a bool mask", f"dtype {valid.dtype}")
    valid = np.broadcast_to(valid, scores.shape) if where is None else _broadcast(valid, "where", scores.shape)
    if labels.dtype != np.bool_:
        labels = labels.astype(np.float64)
        expect_entries((labels == 0) | (labels == 1) | ~valid, labels, "labels", "0 or 1")
    expect_entries(~(np.isnan(scores) & valid), scores, "scores", "no NaN")
    return scores, labels, valid


def _broadcast(value: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    expect_like_scores(value.shape, name, shape)
    return np.broadcast_to(value, shape)


def recall_at_k(scores: Any, labels: Any, *, k: int, where: Any = None) -> Mean:
    """Return Recall@k: of the positives of a list, the share among its k highest scores; the mean over lists.

    Ranker recall@k, the share of a ranker's top that a pre-ranker passes on, takes `top_k_labels` of the ranker as labels.
    Positives of a tie that straddles rank k count with the share of it that fits.

    Args:
      scores, labels: numbers and 0 or 1, [..., C].
      k: at least 1; above C it means C.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.

    Returns:
      The mean, the lists used, and the lists left out for having no valid positive.

    Example:
      >>> recall_at_k([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[0, 1, 1], [1, 0, 0]], k=2)
      Mean(value=0.25, used=2, left_out=0)
    """
    scores, positive, valid = listed_entries(scores, labels, where)
    above, tied, slots = _top_k(scores, valid, k)
    hits = (positive & above).sum(axis=1) + (positive & tied).sum(axis=1) * (slots / np.maximum(tied.sum(axis=1), 1))
    positives = positive.sum(axis=1)
    used = positives > 0
    return Mean(ratio((hits[used] / positives[used]).sum(), used.sum()), int(used.sum()), int((~used).sum()))


def top_k_labels(scores: Any, *, k: int, where: Any = None) -> np.ndarray:
    """Return the k highest scores of each list as labels bool [..., C], for the recall of a ranker's top in another model's.

    Of tied scores the first are taken, so that there are exactly k. Args and Raises as `recall_at_k`.

    Example:
      >>> ranker, pre_ranker = [[4.0, 3.0, 2.0, 1.0]], [[9.0, 1.0, 5.0, 0.0]]
      >>> recall_at_k(pre_ranker, top_k_labels(ranker, k=2), k=3).value
      1.0
    """
    shape = np.shape(scores)
    scores, _, valid = listed_entries(scores, np.zeros(shape), where)
    above, tied, slots = _top_k(scores, valid, k)
    return (above | (tied & (np.cumsum(tied, axis=1) <= slots[:, None]))).reshape(shape)


def ranker_recall_at_k(scores: Any, ranker_scores: Any, *, k: int, top: int | None = None, where: Any = None) -> Mean:
    """Return ranker recall@k: the share of a ranker's top that is among the k highest scores; the mean over lists.

    Args:
      scores: scores of the pre-ranker [..., C].
      ranker_scores: scores of the ranker on the same candidates, the higher the better [..., C]; NaN where it scored none: such
        candidates stay in the list, and are in no top.
      k: what the pre-ranker passes on.
      top: how many of the ranker's best count; None takes k.
      where: see `recall_at_k`.

    Returns, Raises as `recall_at_k`.

    Example:
      >>> ranker_recall_at_k([[9.0, 1.0, 5.0, 0.0]], [[4.0, 3.0, 2.0, float("nan")]], k=2).value
      0.5
    """
    ranker = np.asarray(ranker_scores, np.float64)
    expect(ranker.shape == np.shape(scores), "ranker_scores", f"the shape of scores {np.shape(scores)}", ranker.shape)
    scored = ~np.isnan(ranker) & np.broadcast_to(True if where is None else np.asarray(where), ranker.shape)
    best = top_k_labels(np.where(scored, ranker, 0), k=k if top is None else top, where=scored)
    return recall_at_k(scores, best, k=k, where=where)


def _top_k(scores: np.ndarray, valid: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for lists [B, C]: bool above the k-th highest score, bool tied with it, and how many ties are in the top k [B]."""
    expect_integer(k, "k", least=1)
    if not scores.size:
        return valid, valid, np.zeros(len(scores), np.int64)
    # A partition, not a sort: linear in C, which counts when C is the whole catalogue.
    lowest = max(scores.shape[1] - k, 0)
    threshold = np.partition(scores, lowest, axis=1)[:, lowest, None]
    above, tied = valid & (scores > threshold), valid & (scores == threshold)
    return above, tied, np.minimum(k - above.sum(axis=1), tied.sum(axis=1))
