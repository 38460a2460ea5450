"""Intervals that resample users, and paired comparisons."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from aif_jax import metrics
from aif_jax.metrics import ByUser


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
        assert weight == mine.sum() * labels.shape[1]
    assert found.mean == pytest.approx(metrics.gauc(scores, labels, owner[:, None]).value)


def test_users_of_one_class_are_left_out_and_masks_count():
    scores, labels, owner = case(users=5, requests=20)
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
        with pytest.raises(ValueError, match="expected"):
            metrics.user_interval(one, **wrong)
    with pytest.raises(ValueError, match=r"users: expected shape \[2\], got \[1\]"):
        metrics.mean_by_user([1, 0], [1])
