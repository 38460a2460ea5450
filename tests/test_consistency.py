"""Losses of `experiments.cascade` on the ranker's scores: worked out pair by pair; masks and parts are in test_losses."""

import numpy as np
import pytest

from experiments.cascade import margin_info_nce, pairwise_ndcg


def drawn(seed: int = 0, lists: int = 4, count: int = 7):
    rng = np.random.default_rng(seed)
    scores, teacher = rng.normal(size=(2, lists, count)).astype(np.float32)
    where = rng.random((lists, count)) < 0.8
    where[1] = np.arange(count) == 2  # one candidate: no pair
    return scores, np.round(teacher, 1) + 0, where


def pairs(scores, teacher, where, k: int) -> float:
    """`pairwise_ndcg` of one list from its formula."""
    at = [i for i in range(len(scores)) if where[i]]
    rank = {i: sum(teacher[j] > teacher[i] for j in at) for i in at}
    gain = {i: 2 ** (-rank[i] / k) if rank[i] < k else 0 for i in at}
    discount = {i: 1 / np.log2(2 + rank[i]) if rank[i] < k else 0 for i in at}
    total = lost = 0.0
    for i in at:
        for j in at:
            if teacher[i] > teacher[j]:
                weight = abs(gain[i] - gain[j]) * abs(discount[i] - discount[j])
                total += weight
                lost += weight * np.log1p(np.exp(scores[j] - scores[i]))
    return lost / total if total else 0.0


def contrast(scores, stages, where, margin: float) -> float:
    """`margin_info_nce` of one list from its formula."""
    at, values = [i for i in range(len(scores)) if where[i]], []
    for i in at:
        others = [np.exp(scores[j]) for j in at if stages[j] > stages[i]]
        if others:
            own = np.exp(scores[i] - margin)
            values.append(-np.log(own / (own + sum(others))))
    return float(np.mean(values)) if values else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_their_formulas(seed):
    scores, teacher, where = drawn(seed)
    for k in (100, 3):
        expected = np.mean([pairs(*row, k) for row in zip(scores, teacher, where, strict=True)])
        assert float(pairwise_ndcg(scores, teacher, where=where, k=k)) == pytest.approx(expected, rel=1e-4)
    stages = np.random.default_rng(seed).integers(0, 4, scores.shape).astype(np.float32)
    for margin in (0.0, 0.5):
        expected = np.mean([contrast(*row, margin) for row in zip(scores, stages, where, strict=True)])
        assert float(margin_info_nce(scores, stages, where=where, margin=margin)) == pytest.approx(expected, rel=1e-4)
