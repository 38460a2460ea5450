"""Hit rate, recall and NDCG of the top k of each list; the ranker's top k as labels, and agreement with the ranker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.metrics.entries import Averaged, check_at_least_one, listed_entries, ratio


def hit_rate_at_k(scores: Any, labels: Any, *, k: int, where: Any = None) -> Averaged:
    """HR@k: the share of lists with at least one positive among their k highest scores; with one positive it is recall@k.

    Where a tie straddles rank k, a list counts with the probability that a random order of the tie makes a hit.

    Args:
      scores, labels: numbers and 0 or 1, [..., C].
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
    scores, positive, valid = listed_entries(scores, labels, where)
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

    Ranker recall@k, the share of a ranker's top that a pre-ranker passes on, takes `top_k_labels` of the ranker as labels.
    Positives of a tie that straddles rank k count with the share of it that fits. Args, Returns, Raises as `hit_rate_at_k`.

    Example:
      >>> recall_at_k([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[0, 1, 1], [1, 0, 0]], k=2)
      Averaged(value=0.25, used=2, left_out=0)
    """
    scores, positive, valid = listed_entries(scores, labels, where)
    above, tied, slots = _top_k(scores, valid, k)
    share = slots / np.maximum(tied.sum(axis=1), 1)
    hits = (positive & above).sum(axis=1) + (positive & tied).sum(axis=1) * share
    positives = positive.sum(axis=1)
    return _mean_of_lists(hits / np.maximum(positives, 1), positives)


def ndcg_at_k(scores: Any, labels: Any, *, k: int, where: Any = None) -> Averaged:
    """NDCG@k: discounted gain of the k highest scores over that of the best order; the mean over lists.

    DCG = sum over ranks r = 1..k of label_r / log2(r + 1); NDCG = DCG / DCG of the labels in descending order

    Labels are finite and not negative, 0/1 or graded (for the exponential gain pass 2 ** labels - 1). Tied scores share the
    mean of their labels. Args, Returns, Raises as `hit_rate_at_k`.

    Example:
      >>> ndcg_at_k([[3.0, 2.0, 1.0]], [[0, 1, 0]], k=2).value.__round__(4)
      0.6309
    """
    check_at_least_one(k, "k")
    scores, gains, valid = listed_entries(scores, labels, where, graded=True)
    rows, columns = scores.shape
    discounts = np.where(np.arange(columns) < k, 1 / np.log2(np.arange(columns) + 2), 0)
    order = np.lexsort((-scores, ~valid), axis=1)  # masked entries last, whatever their score
    ranked, counts = np.take_along_axis(scores, order, 1), np.take_along_axis(valid, order, 1)
    starts = np.ones((rows, columns), np.bool_)
    starts[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]) | (counts[:, 1:] != counts[:, :-1])
    tie = np.cumsum(starts) - 1  # the tie that each place belongs to, numbered through all lists
    gain = np.bincount(tie, np.take_along_axis(gains, order, 1).ravel()) / np.maximum(np.bincount(tie), 1)
    gained = gain[tie].reshape(rows, columns) @ discounts
    best = -np.sort(-gains, axis=1) @ discounts
    return _mean_of_lists(gained / np.where(best > 0, best, 1), best)


def top_k_labels(scores: Any, *, k: int, where: Any = None) -> np.ndarray:
    """The k highest scores of each list as labels bool [..., C], for the recall of a ranker's top in another model's.

    Of tied scores the first are taken, so that there are exactly k. Args and Raises as `hit_rate_at_k`.

    Example:
      >>> ranker, pre_ranker = [[4.0, 3.0, 2.0, 1.0]], [[9.0, 1.0, 5.0, 0.0]]
      >>> recall_at_k(pre_ranker, top_k_labels(ranker, k=2), k=3).value
      1.0
    """
    shape = np.shape(scores)
    scores, _, valid = listed_entries(scores, np.zeros(shape), where)
    above, tied, slots = _top_k(scores, valid, k)
    return (above | (tied & (np.cumsum(tied, axis=1) <= slots[:, None]))).reshape(shape)


def ranker_recall_at_k(scores: Any, ranker_scores: Any, *, k: int, top: int | None = None, where: Any = None) -> Averaged:
    """Ranker recall@k: the share of a ranker's top that is among the k highest scores; the mean over lists.

    Args:
      scores: of the pre-ranker [..., C].
      ranker_scores: of the ranker on the same candidates, the higher the better [..., C]; NaN where it scored none: such
        candidates stay in the list, and are in no top.
      k: what the pre-ranker passes on.
      top: how many of the ranker's best count; None takes k.
      where: as in `hit_rate_at_k`.

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


def order_agreement(scores: Any, ranker_scores: Any, *, where: Any = None) -> Averaged:
    """Agreement of order: of the pairs that a ranker orders, the share that the scores order alike; the mean over lists.

    (pairs alike + pairs tied in the scores / 2) / pairs that the ranker does not tie: 1/2 is chance, 1 the same order.
    Compares C^2 pairs a list.

    Args:
      scores, ranker_scores, where: as in `ranker_recall_at_k`; candidates without a ranker's score are in no pair.

    Example:
      >>> order_agreement([[3.0, 1.0, 2.0]], [[3.0, 2.0, 1.0]]).value.__round__(4)
      0.6667
    """
    ranker = np.asarray(ranker_scores, np.float64)
    expect(ranker.shape == np.shape(scores), "ranker_scores", f"the shape of scores {np.shape(scores)}", ranker.shape)
    scored = ~np.isnan(ranker) & np.broadcast_to(True if where is None else np.asarray(where), ranker.shape)
    s, _, valid = listed_entries(scores, np.zeros(ranker.shape), scored)
    ranker = np.where(valid, ranker.reshape(valid.shape), 0)
    alike, pairs = np.zeros(len(s)), np.zeros(len(s))
    for row, (own, teacher, here) in enumerate(zip(s, ranker, valid, strict=True)):
        own, teacher = own[here], teacher[here]
        above = teacher[:, None] > teacher[None, :]
        pairs[row] = above.sum()
        alike[row] = (above & (own[:, None] > own[None, :])).sum() + (above & (own[:, None] == own[None, :])).sum() / 2
    return _mean_of_lists(alike / np.maximum(pairs, 1), pairs)


def hit_rate_by_stage(scores: Any, stages: Any, *, k: int, names: Sequence[str], where: Any = None) -> dict[str, Averaged]:
    """HR@k by stage: of the lists with a candidate that came at least so far, the share with one among the k highest scores.

    Args:
      scores: [..., C].
      stages: how far each candidate came, 0 the furthest: positions in `names` [..., C].
      k: as in `hit_rate_at_k`.
      names: of the stages, such as `data.STAGES`.
      where: as in `hit_rate_at_k`.

    Returns:
      By name; for the last stage that there is it says nothing, as every candidate came so far.

    Example:
      >>> made = hit_rate_by_stage([[3.0, 2.0, 1.0]], [[1, 2, 0]], k=1, names=("exposed", "ranked", "retrieved"))
      >>> made["exposed"].value, made["ranked"].value
      (0.0, 1.0)
    """
    stages = np.asarray(stages)
    return {
        name: hit_rate_at_k(scores, (stages <= code).astype(np.float64), k=k, where=where) for code, name in enumerate(names)
    }


def _top_k(scores: np.ndarray, valid: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of lists [B, C]: bool above the k-th highest score, bool tied with it, and how many of the tied are in the top k [B]."""
    check_at_least_one(k, "k")
    columns = scores.shape[1]
    if not columns:
        return valid, valid, np.zeros(len(scores), np.int64)
    # A partition, not a sort: linear in C, which counts when C is the whole catalogue.
    lowest = max(columns - k, 0)
    threshold = np.partition(scores, lowest, axis=1)[:, lowest, None]
    above, tied = valid & (scores > threshold), valid & (scores == threshold)
    return above, tied, np.minimum(k - above.sum(axis=1), tied.sum(axis=1))


def _mean_of_lists(values: np.ndarray, positives: np.ndarray) -> Averaged:
    """The mean over the lists that have a positive."""
    defined = positives > 0
    used = int(defined.sum())
    return Averaged(ratio(values[defined].sum(), used), used, len(defined) - used)
