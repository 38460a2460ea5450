"""Losses and metrics of agreement with the ranker: worked out pair by pair, masks, gradients, parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import metrics
from aif_jax.train import lcron, margin_info_nce, pairwise_ndcg

pytestmark = pytest.mark.usefixtures("light_compilation")


def drawn(seed: int = 0, lists: int = 4, count: int = 7):
    rng = np.random.default_rng(seed)
    scores, teacher = rng.normal(size=(2, lists, count)).astype(np.float32)
    return scores, np.round(teacher, 1) + 0, rng.random((lists, count)) < 0.8


def pairs(scores, teacher, where, k: int, t: float) -> float:
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
                lost += weight * np.log1p(np.exp(-(scores[i] - scores[j]) / t))
    return lost / total if total else 0.0


def contrast(scores, stages, where, margin: float, t: float) -> float:
    """`margin_info_nce` of one list from its formula."""
    at, values = [i for i in range(len(scores)) if where[i]], []
    for i in at:
        others = [np.exp(scores[j] / t) for j in at if stages[j] > stages[i]]
        if others:
            own = np.exp((scores[i] - margin) / t)
            values.append(-np.log(own / (own + sum(others))))
    return float(np.mean(values)) if values else 0.0


def survival(scores, k: int, t: float) -> list[float]:
    """Probabilities of the first k places from NeuralSort's formula, of one list without gaps."""
    n, order = len(scores), []
    for r in range(1, n + 1):
        logits = [((n + 1 - 2 * r) * s - sum(abs(s - other) for other in scores)) / t for s in scores]
        weights = np.exp(np.array(logits) - max(logits))
        order.append(weights / weights.sum())
    return (np.sum(order[:k], axis=0) / np.sum(order, axis=0)).tolist()


def survive(scores, teacher, where, k: int, single: float, t: float) -> float:
    """`lcron` of one list from its formula."""
    at = [i for i in range(len(scores)) if where[i]]
    if len(at) <= k:
        return 0.0
    ours, rankers = (survival([float(values[i]) for i in at], k, t) for values in (scores, teacher))
    total = 0.0
    for i, p, r in zip(at, ours, rankers, strict=True):
        best = sum(teacher[j] > teacher[i] for j in at) < k
        for weight, chance in ((1.0, p * r), (single, p)):
            total -= weight * np.log((chance if best else 1 - chance) + 1e-6)
    return total / len(at)


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_their_formulas(seed):
    scores, teacher, where = drawn(seed)
    for k, single, t in ((3, 1.0, 1.0), (2, 0.5, 4.0), (6, 1.0, 1.0)):
        expected = np.mean([survive(*row, k, single, t) for row in zip(scores, teacher, where, strict=True)])
        given = dict(where=where, k=k, single=single, temperature=t)
        assert float(lcron(scores, teacher, **given)) == pytest.approx(expected, rel=1e-3)
    for k, t in ((100, 1.0), (3, 1.0), (3, 2.0)):
        expected = np.mean([pairs(*row, k, t) for row in zip(scores, teacher, where, strict=True)])
        assert float(pairwise_ndcg(scores, teacher, where=where, k=k, temperature=t)) == pytest.approx(expected, rel=1e-4)
    stages = np.random.default_rng(seed).integers(0, 4, scores.shape).astype(np.float32)
    for margin, t in ((0.0, 1.0), (0.5, 1.0), (0.5, 0.3)):
        expected = np.mean([contrast(*row, margin, t) for row in zip(scores, stages, where, strict=True)])
        got = float(margin_info_nce(scores, stages, where=where, margin=margin, temperature=t))
        assert got == pytest.approx(expected, rel=1e-4)
    shift = np.full_like(scores, 0.7)
    moved = float(margin_info_nce(scores + shift, stages, where=where, log_q=shift))
    assert moved == pytest.approx(float(margin_info_nce(scores, stages, where=where)), rel=1e-4)


def test_what_the_ranker_drops_need_not_be_dropped_here():
    """Joint survival: with a sharp ranker the first term is lost on the ranker's best alone."""
    ranker, kept = jnp.array([[9.0, 6.0, 3.0, 0.0]]), jnp.array([[0.0, 0.0, 9.0, 9.0]])
    end_to_end, whole = (float(lcron(kept, ranker, k=2, single=single)) for single in (0.0, 1.0))
    positives = -np.log(np.array(survival([0.0, 0.0, 9.0, 9.0], 2, 1.0))[:2] + 1e-6).sum() / 4
    assert end_to_end == pytest.approx(positives, abs=0.05) and whole > end_to_end + 2


@pytest.mark.parametrize("loss", [lcron(k=3), pairwise_ndcg(k=3), margin_info_nce(margin=0.2)])
def test_masked_entries_leave_no_trace_and_parts_add_up(loss):
    scores, targets, where = drawn(1, lists=6)
    where[3] = False
    where[4] = np.arange(7) == 2  # one candidate: no pair
    poisoned = np.where(where, scores, np.nan).astype(np.float32), np.where(where, targets, np.nan).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda s: loss(s, poisoned[1], where=where))(jnp.asarray(poisoned[0]))
    clean, expected = jax.value_and_grad(lambda s: loss(s, targets, where=where))(jnp.asarray(scores))
    assert float(value) == pytest.approx(float(clean)) and np.isfinite(value)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert not np.asarray(gradient)[~where].any() and not np.asarray(gradient)[3:5].any() and np.asarray(gradient)[0].any()
    norms = loss.norms(targets, where)
    parts = [loss.part(scores[at], targets[at], norms, where=where[at]) for at in (slice(0, 2), slice(2, 6))]
    assert float(sum(parts)) == pytest.approx(float(clean), rel=1e-5)
    nothing = loss(scores, targets, where=np.zeros_like(where))
    assert float(nothing) == 0
    for name in ("scores", "targets"):
        given = {"scores": scores.copy(), "targets": targets.astype(np.float32)}
        given[name][0, np.flatnonzero(where[0])[0]] = np.nan
        assert np.isnan(loss(given["scores"], given["targets"], where=where)), name


def test_descending_a_loss_finds_the_rankers_order():
    teacher = np.random.default_rng(0).permutation(20).astype(np.float32)[None]
    for loss, targets in ((pairwise_ndcg(k=5), teacher), (margin_info_nce, (19 - teacher) // 5)):
        gradient = jax.jit(jax.grad(lambda s, loss=loss, targets=targets: loss(s, targets)))
        scores = jnp.zeros((1, 20))
        for _ in range(200):
            scores -= 2 * gradient(scores)
        assert metrics.ranker_recall_at_k(np.asarray(scores), teacher, k=5).value == 1


def test_metrics_by_hand():
    scores = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    ranker = [[9.0, np.nan, 8.0, 7.0], [9.0, 8.0, 7.0, np.nan]]
    assert metrics.ranker_recall_at_k(scores, ranker, k=2) == (0.25, 2, 0)  # {0, 2} and {0, 1}, passed on {0, 1} and {3, 2}
    assert metrics.ranker_recall_at_k(scores, ranker, k=3, top=1) == (0.5, 2, 0)
    where = np.array([[True] * 4, [False, True, True, True]])
    assert metrics.ranker_recall_at_k(scores, ranker, k=2, where=where).value == 0.5
    assert metrics.order_agreement(scores, ranker) == (0.5, 2, 0)
    assert metrics.order_agreement([[1.0, 1.0, 2.0]], [[1.0, 2.0, 2.0]]).value == 0.75  # a tie of scores is one half
    assert metrics.order_agreement([[1.0, 2.0]], [[3.0, 3.0]]).left_out == 1
    by_stage = metrics.hit_rate_by_stage(scores, [[3, 2, 0, 1], [2, 3, 3, 1]], k=1, names=("exposed", "ranked", "passed"))
    assert by_stage["exposed"] == (0, 1, 1) and by_stage["ranked"] == (0.5, 2, 0) and by_stage["passed"] == (0.5, 2, 0)
    for name in ("ranker_recall_at_k", "order_agreement"):
        with pytest.raises(ValueError, match="ranker_scores: expected the shape of scores"):
            options = {"k": 2} if name == "ranker_recall_at_k" else {}
            getattr(metrics, name)(scores, [1.0], **options)
