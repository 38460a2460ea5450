"""Intervals that resample users, and paired comparisons."""

import importlib

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from aif_jax import metrics
from aif_jax.metrics import ByUser
from tests.refusals import refused


def case(seed=0, users=40, requests=200, candidates=6):
    rng = np.random.default_rng(seed)
    owner = rng.integers(10, 10 + users, requests)
    labels = np.zeros((requests, candidates))
    labels[:, 0] = 1
    return rng.normal(size=labels.shape) + 0.5 * labels, labels, owner


def test_gauc_by_user_is_scikit_learn_s_auc_of_each_user_and_averages_to_gauc():
    scores, labels, owner = case()
    found = metrics.gauc_by_user(scores, labels, owner[:, None])
    assert found.users.tolist() == sorted(set(owner))
    for user, value, weight in zip(*found, strict=True):
        mine = owner == user
        assert value == pytest.approx(roc_auc_score(labels[mine].ravel(), scores[mine].ravel()))
        assert weight == mine.sum()
    assert found.mean == pytest.approx(metrics.gauc(scores, labels, owner[:, None]).value)
    # users of one class are left out, and masks count
    where = np.ones(labels.shape, bool)
    where[owner == owner[0]] = labels[owner == owner[0]] == 1  # positives alone
    found = metrics.gauc_by_user(scores, labels, owner[:, None], where=where)
    assert owner[0] not in found.users and len(found.users) == len(set(owner)) - 1


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """Users differ: their means are normal around 1. Of 200 samples of 50 users about 95 % of the intervals hold 1."""
    rng, inside = np.random.default_rng(3), 0
    for seed in range(200):
        metric = ByUser(np.arange(50), rng.normal(1, 1, 50), rng.integers(1, 9, 50).astype(float))
        low, high = metrics.user_interval(metric, draws=300, seed=seed)[1:]
        inside += low <= 1 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_interval_resamples_users_and_not_their_requests():
    """Ten users with a hundred equal requests each know no more than ten numbers."""
    values = np.arange(10) % 2
    once = metrics.mean_by_user(values, np.arange(10))
    often = metrics.mean_by_user(np.repeat(values, 100), np.repeat(np.arange(10), 100))
    assert metrics.user_interval(once) == metrics.user_interval(often)


def test_a_paired_difference_is_surer_than_two_intervals():
    """Two models that differ by 0.1 for every user, whose levels differ widely."""
    level = np.random.default_rng(0).normal(size=60)
    users, ones = np.arange(60), np.ones(60)
    found = metrics.paired_interval(ByUser(users, level + 0.1, ones), ByUser(users, level, ones))
    assert found == pytest.approx((0.1, 0.1, 0.1))
    wide = metrics.user_interval(ByUser(users, level, ones))
    assert wide.high - wide.low > 0.3
    ratio = metrics.paired_interval(ByUser(users, 3 * ones, ones), ByUser(users, 2 * ones, ones), ratio=True)
    assert ratio == pytest.approx((1.5, 1.5, 1.5))


def test_no_user_is_no_value_and_wrong_arguments_are_refused():
    none = ByUser(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    assert np.isnan(metrics.user_interval(none)).all() and np.isnan(none.mean)
    one = metrics.mean_by_user([1.0], [1])
    for wrong in (dict(level=1.0), dict(draws=0)):
        refused(ValueError, "expected", metrics.user_interval, one, **wrong)


def test_auc_by_user_has_the_error_of_resampled_users():
    """Its mean is AUC, and its interval that of AUC itself over draws of users."""
    scores, labels, owner = case(users=30, requests=300)
    scores = np.round(scores, 1) + np.linspace(0, 2, 40)[owner - 10][:, None]  # ties; and levels that differ between users
    found = metrics.auc_by_user(scores, labels, owner[:, None])
    assert found.mean == pytest.approx(metrics.auc(scores, labels)) and found.users.tolist() == sorted(set(owner))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(300):
        at = np.concatenate([np.flatnonzero(owner == user) for user in rng.choice(found.users, len(found.users))])
        drawn.append(metrics.auc(scores[at], labels[at]))
    low, high = metrics.user_interval(found)[1:]
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.3 * (high - low))
    assert len(metrics.auc_by_user(scores, np.ones_like(labels), owner[:, None]).users) == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_log_loss_and_calibration_by_user_average_to_the_figures(weighted):
    scores, labels, owner = case(requests=400)
    where = np.random.default_rng(1).random(labels.shape) < 0.8
    weights = np.where(labels == 1, 1.0, 3.0) if weighted else None
    found = metrics.probabilities_by_user(scores, labels, owner[:, None], where=where, weights=weights)
    rates = metrics.calibration(scores, labels, where=where, weights=weights)
    assert found["log_loss"].mean == pytest.approx(metrics.log_loss(scores, labels, where=where))
    assert found["calibration"].mean == pytest.approx(rates.ratio)
    assert found["calibration_error"].mean == pytest.approx(rates.error)
    assert metrics.ratio_by_user([1.0], [0.0], [3]).users.size == 0


def test_many_users_are_drawn_in_groups_with_the_same_error(monkeypatch):
    rng = np.random.default_rng(0)
    metric = ByUser(np.arange(5000), rng.normal(size=5000), rng.integers(1, 9, 5000).astype(float))
    alone = metrics.user_interval(metric)
    monkeypatch.setattr(importlib.import_module("aif_jax.metrics.intervals"), "GROUPS", 512)
    grouped = metrics.user_interval(metric)
    assert grouped.value == alone.value and grouped != alone
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=0.15 * (alone.high - alone.low))


def test_metrics_of_one_evaluation_share_their_draws():
    scores, labels, owner = case()
    ours = {"gauc": metrics.gauc_by_user(scores, labels, owner[:, None]), "hits": metrics.mean_by_user(owner % 2, owner)}
    both = metrics.user_intervals(ours)
    for name, one in ours.items():
        assert both[name] == pytest.approx(metrics.user_interval(one))
    theirs = {"hits": metrics.mean_by_user(owner % 3 > 0, owner), "other": ours["gauc"]}
    paired = metrics.paired_intervals(ours, theirs)
    assert list(paired) == ["hits"] and paired["hits"] == pytest.approx(metrics.paired_interval(ours["hits"], theirs["hits"]))
