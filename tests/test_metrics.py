"""Metrics by hand, by brute force, by scikit-learn and by properties; intervals that resample users; paired comparisons."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from aif_jax import metrics
from aif_jax.metrics import ByUser, intervals
from tests.reference import metrics as reference
from tests.refusals import refused

quick = settings(max_examples=60, deadline=None)
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def log_loss(scores, labels, where=None):
    return metrics.probabilities_by_user(scores, labels, np.zeros(np.shape(scores), np.int64), where=where)["log_loss"].mean


@st.composite
def entries(draw, max_size=24, infinite=True):
    """Scores with many ties, labels, groups, mask, of one length."""
    n = draw(st.integers(0, max_size))
    values = [-2.0, -0.5, 0.0, 0.5, 3.0] + [-np.inf, np.inf] * infinite
    column = functools.partial(hnp.arrays, shape=n)
    return (
        draw(column(np.float64, elements=st.sampled_from(values))),
        draw(column(np.bool_)),
        draw(column(np.int64, elements=st.integers(-1, 3))),
        draw(column(np.bool_, elements=st.sampled_from([True, True, True, False]))),
    )


@st.composite
def candidate_lists(draw):
    shape = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    scores = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([-np.inf, -1.0, 0.0, 2.0])))
    return scores, draw(hnp.arrays(np.bool_, shape)), draw(hnp.arrays(np.bool_, shape)), draw(st.integers(1, 6))


def test_infinite_scores_lists_and_groups_by_name_or_one_for_each_list():
    assert metrics.auc([0.0, -0.0], [1, 0]) == 0.5
    assert metrics.auc([-np.inf, 0.0, np.inf], [0, 1, 1]) == 1.0
    assert metrics.auc([[1.0, 2.0], [3.0, 9.0]], [[0, 1], [0, 1]], where=[[True, True], [True, False]]) == 0.5
    scores, labels, groups = [3, 1, 2, 4, 5, 5, 5, 8, 7, 6], [1, 0, 0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 2, 2, 2, 3, 4, 4]
    by_name, by_number = (metrics.gauc_by_user(scores, labels, users) for users in ([f"user {g}" for g in groups], groups))
    np.testing.assert_equal(by_name[1:], by_number[1:])
    assert metrics.gauc_by_user([[1, 2], [4, 3]], [[0, 1], [0, 1]], np.array([[0], [1]])).values.tolist() == [1, 0]


def test_log_loss_and_calibration_of_certain_and_of_missing_entries():
    """Infinite logits are certain: free where right, infinitely costly where wrong. A ratio needs a positive, the error not."""
    assert np.isnan(metrics.calibration([math.log(3), 0.0], [1, 0], bins=10).predicted[0])
    assert log_loss([np.inf, -np.inf], [1, 0]) == 0
    assert log_loss([np.inf, -np.inf], [1, 1]) == np.inf
    assert metrics.calibration([np.inf, -np.inf], [1, 0])[:2] == (1, 0)
    close(log_loss([1e4, -1e4], [0, 1]), 1e4)
    without = metrics.calibration([0.0, 0.0], [0, 0])
    assert math.isnan(without.ratio) and without.error == 0.5
    assert np.isnan(metrics.calibration([0.0, 1.0], [0, 1], weights=[0, 0], by="size")[:2]).all()


def test_top_k_labels():
    scores = np.array([[1.0, 3.0, 2.0, 9.0], [5.0, 5.0, 5.0, 9.0], [-np.inf, -np.inf, 4.0, 9.0]])
    where = np.array([[True, True, True, False]] * 3)
    top = metrics.top_k_labels(scores, k=2, where=where)
    assert top.tolist() == [[False, True, True, False], [True, True, False, False], [True, False, True, False]]
    assert metrics.top_k_labels(scores, k=9, where=where).tolist() == where.tolist()
    assert metrics.top_k_labels([2.0, 1.0], k=1).tolist() == [True, False]


@quick
@given(entries())
def test_auc_and_gauc_equal_the_definitions(data):
    scores, labels, groups, where = data
    value, grouped = metrics.auc(scores, labels, where=where), metrics.gauc_by_user(scores, labels, groups, where=where)
    close(value, reference.auc(scores, labels, where))
    close((grouped.mean, len(grouped.users)), reference.gauc(scores, labels, groups, where))
    order = np.random.default_rng(len(scores)).permutation(len(scores))  # entries in another order: not one bit differs
    np.testing.assert_equal(metrics.auc(scores[order], labels[order], where=where[order]), value)
    np.testing.assert_equal(metrics.gauc_by_user(scores[order], labels[order], groups[order], where=where[order]), grouped)
    np.testing.assert_equal(metrics.auc(np.exp(scores), labels, where=where), value)  # nor by another scale


@quick
@given(candidate_lists())
def test_recall_equals_the_mean_over_all_orders_of_ties(data):
    scores, labels, where, k = data
    close(metrics.recall_at_k(scores, labels, k=k, where=where), reference.recall(scores, labels, where, k))


@quick
@given(entries(infinite=False), st.integers(1, 7))
def test_log_loss_and_calibration_equal_the_definitions(data, bins):
    scores, labels, _, where = data
    close(log_loss(scores, labels, where=where), reference.log_loss(scores, labels, where))
    close(metrics.calibration(scores, labels, where=where, bins=bins)[:2], reference.calibration(scores, labels, where, bins))


def test_bins_of_a_calibration_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=2000), 1) + 0.01  # off the bins' edges, which scikit-learn counts to the bin below
    labels = (rng.random(2000) < 0.2).astype(int)
    observed, predicted = calibration_curve(labels, expit(scores), n_bins=10)
    table = metrics.calibration(scores, labels)
    close(table.observed[table.entries > 0], observed)
    close(table.predicted[table.entries > 0], predicted)


@quick
@given(candidate_lists(), st.sampled_from([np.nan, np.inf, 1e9]))
def test_masked_entries_are_never_looked_at(data, junk):
    scores, labels, where, k = data
    dirty = np.where(where, scores, junk), np.where(where, labels, np.nan)
    groups = np.arange(len(scores))[:, None]
    for f in (
        metrics.auc,
        log_loss,
        lambda s, y, where: metrics.gauc_by_user(s, y, groups, where=where),
        lambda s, y, where: metrics.calibration(s, y, where=where),
        functools.partial(metrics.recall_at_k, k=k),
    ):
        np.testing.assert_equal(f(*dirty, where=where), f(scores, labels, where=where))
    top = metrics.top_k_labels(dirty[0], k=k, where=where)
    assert not top[~where].any()
    np.testing.assert_array_equal(top.sum(1), np.minimum(where.sum(1), k))


@quick
@given(candidate_lists(), st.integers(0, 6))
def test_a_model_keeps_all_of_its_own_best(data, more):
    scores, _, where, k = data
    scores = np.argsort(np.argsort(scores, axis=1), axis=1)  # no ties
    survived = metrics.recall_at_k(scores, metrics.top_k_labels(scores, k=k, where=where), k=k + more, where=where)
    assert survived.value == 1 or survived.used == 0


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (3, 4)])
def test_nothing_to_average_is_nan(shape):
    scores, labels, where = np.zeros(shape), np.ones(shape), np.zeros(shape, bool)
    value, used, left_out = metrics.recall_at_k(scores, labels, k=2, where=where)
    assert math.isnan(value) and (used, left_out) == (0, shape[0])
    assert metrics.top_k_labels(scores, k=2, where=where).shape == shape
    assert math.isnan(log_loss(scores, labels, where=where))
    nothing = metrics.calibration(scores, labels, where=where)
    assert math.isnan(nothing.ratio) and math.isnan(nothing.error) and not nothing.entries.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_device_arrays_of_any_number_type(dtype):
    scores, labels = jnp.array([[1, 3, 2]], dtype), jnp.array([[0, 1, 0]])
    assert metrics.auc(scores, labels) == 1
    assert metrics.recall_at_k(scores, labels, k=1, where=jnp.ones((1, 3), bool)) == (1, 1, 0)


def test_a_user_weighs_by_requests_however_long_the_lists_are():
    """User 1: two lists, of 2 and 2 items, AUC 1. User 2: one list of 6 items, AUC 0."""
    scores = np.array([[2, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]], float)
    labels = np.array([[1, 0, 0, 0, 0, 0]] * 3)
    where = np.arange(6) < np.array([[2], [2], [6]])
    users = np.array([[1], [1], [2]])
    assert metrics.gauc_by_user(scores, labels, users, where=where).mean == pytest.approx(2 / 3)  # 0.4 by candidates
    assert metrics.gauc_by_user(scores, labels, users, where=where).weights.tolist() == [2, 1]
    where[1] = False  # a list without a valid candidate is no request
    assert metrics.gauc_by_user(scores, labels, users, where=where).weights.tolist() == [1, 1]
    entries = metrics.gauc_by_user(scores[where], labels[where], np.broadcast_to(users, where.shape)[where])
    assert entries.mean == pytest.approx(2 / 8)  # flat scores: each number is a request


def test_agreement_with_a_ranker_by_hand():
    scores = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    ranker = [[9.0, np.nan, 8.0, 7.0], [9.0, 8.0, 7.0, np.nan]]
    assert metrics.ranker_recall_at_k(scores, ranker, k=2) == (0.25, 2, 0)  # {0, 2} and {0, 1}, passed on {0, 1} and {3, 2}
    assert metrics.ranker_recall_at_k(scores, ranker, k=3, top=1) == (0.5, 2, 0)
    assert metrics.ranker_recall_at_k(scores, ranker, k=2, where=np.array([[True] * 4, [False, True, True, True]])).value == 0.5
    refused(ValueError, "ranker_scores: expected the shape of scores", metrics.ranker_recall_at_k, scores, [1.0], k=2)


def case(seed=0, users=40, requests=200, candidates=6):
    rng = np.random.default_rng(seed)
    owner, labels = rng.integers(10, 10 + users, requests), np.zeros((requests, candidates))
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
    # users of one class are left out, and masks count
    where = np.ones(labels.shape, bool)
    where[owner == owner[0]] = labels[owner == owner[0]] == 1  # positives alone
    found = metrics.gauc_by_user(scores, labels, owner[:, None], where=where)
    assert owner[0] not in found.users and len(found.users) == len(set(owner)) - 1


def test_an_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    """Users differ: their means are normal around 1. Of 200 samples of 50 users about 95 % of the intervals hold 1."""
    monkeypatch.setattr(intervals, "DRAWS", 300)
    rng, inside = np.random.default_rng(3), 0
    for _ in range(200):
        low, high = metrics.user_interval(ByUser(np.arange(50), rng.normal(1, 1, 50), rng.integers(1, 9, 50).astype(float)))[1:]
        inside += low <= 1 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_interval_resamples_users_and_not_their_requests():
    """Ten users with a hundred equal requests each know no more than ten numbers."""
    values = np.arange(10) % 2
    once = metrics.mean_by_user(values, np.arange(10))
    often = metrics.mean_by_user(np.repeat(values, 100), np.repeat(np.arange(10), 100))
    assert metrics.user_interval(once) == metrics.user_interval(often)
    refused(ValueError, "users: expected integers or strings, got float64", metrics.mean_by_user, [1, 0], [1.5, 1.7])


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


def test_no_user_is_no_value():
    none = ByUser(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    assert np.isnan(metrics.user_interval(none)).all() and np.isnan(none.mean)


def test_auc_by_user_has_the_error_of_resampled_users():
    """Its mean is AUC, and its interval that of AUC itself over draws of users."""
    scores, labels, owner = case(users=30, requests=300)
    scores = np.round(scores, 1) + np.linspace(0, 2, 40)[owner - 10][:, None]  # ties; and levels that differ between users
    found = metrics.auc_by_user(scores, labels, owner.astype(str)[:, None])
    assert found.mean == pytest.approx(metrics.auc(scores, labels)) and found.users.tolist() == sorted(set(owner.astype(str)))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(300):
        at = np.concatenate([np.flatnonzero(owner == user) for user in rng.choice(found.users.astype(int), len(found.users))])
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
    assert found["log_loss"].mean == pytest.approx(reference.log_loss(scores, labels == 1, where))
    assert found["calibration"].mean == pytest.approx(rates.ratio)
    assert found["calibration_error"].mean == pytest.approx(rates.error)
    assert metrics.probabilities_by_user([1.0], [0], [3])["calibration"].users.size == 0


def test_many_users_are_drawn_in_groups_with_the_same_error(monkeypatch):
    rng = np.random.default_rng(0)
    metric = ByUser(np.arange(5000), rng.normal(size=5000), rng.integers(1, 9, 5000).astype(float))
    alone = metrics.user_interval(metric)
    monkeypatch.setattr(intervals, "GROUPS", 512)
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
