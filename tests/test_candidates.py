"""Sources of candidates, worked out by hand on a log of impressions."""

from __future__ import annotations

import numpy as np
import pytest

from aif_jax.data import candidates as candidates_module
from aif_jax.data.candidates import Draw, impressed, pointwise, request_starts, retrieved, sampled
from aif_jax.data.catalogue import Catalogue
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.sampling import NegativeSampler, Seen, lists
from aif_jax.data.schema import Attribute, Schema, Vocabulary

DRAW = Draw(seed=3, epoch=1, step=7)
#          user 1: request at 10 (three shown), at 20 (one), at 30 (two);  user 2: request at 30 (two), at 40 (one)
USER = [1, 1, 1, 1, 1, 1, 2, 2, 2]
TIME = [10, 10, 10, 20, 30, 30, 30, 30, 40]
ITEM = [1, 2, 3, 2, 4, 0, 5, 6, 1]
ACTION = [1, 2, 1, 2, 1, 2, 1, 1, 2]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    schema = Schema(item_attributes=(Attribute(name="item", size=7), Attribute(name="category", size=2)), actions=3)
    return Dataset(
        name="impressions",
        schema=schema,
        log=EventLog.from_arrays(USER, ITEM, ACTION, TIME, users=3),
        catalogue=Catalogue.from_items(schema, np.arange(6), ids={"category": [1] * 6}),
        user_ids={},
        user_floats=np.zeros([3, 0], np.float32),
        users=Vocabulary([10, 20]),
        items=Vocabulary(np.arange(6)),
    )


@pytest.mark.parametrize("block", [8, 1 << 22])  # a request that crosses a border of blocks is not cut in two
def test_requests_start_where_user_or_time_changes(dataset, monkeypatch, block):
    monkeypatch.setattr(candidates_module, "BLOCK", block)

    def starts(**given):
        found = request_starts(dataset.log, **given)
        return found[np.arange(len(found))].tolist()

    assert starts() == [0, 3, 4, 6, 8]
    assert starts(min_history=1) == [3, 4, 8]
    assert starts(min_history=4) == [4]
    assert starts(since=20, before=40) == [3, 4, 6]
    long = EventLog.from_arrays([1] * 20, [1] * 20, [1] * 20, [0] * 5 + [7] * 15)
    found = request_starts(long)
    assert found[np.arange(len(found))].tolist() == [0, 5]


def test_a_shown_list_is_all_events_of_its_request(dataset):
    found = impressed(dataset, candidates=3, threshold=2)(np.array([0, 3, 4, 6, 8]), DRAW)
    assert found.rows.tolist() == [[1, 2, 3], [2, 0, 0], [4, 0, 0], [5, 6, 0], [1, 0, 0]]  # item 0 is none of the catalogue
    assert found.labels.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert (found.rows.dtype, found.labels.dtype, found.log_q) == (np.int32, np.float32, None)
    assert impressed(dataset, candidates=2, threshold=2)(np.array([0]), DRAW).rows.tolist() == [[1, 2]]


def test_every_member_of_a_shown_list_has_the_history_of_its_first(dataset):
    """Otherwise one user state for the whole list would look at another member's answer."""
    assert dataset.log.history_end(np.arange(9)).tolist() == [0, 0, 0, 3, 4, 4, 6, 6, 8]


def test_pointwise_is_liked_or_not(dataset):
    found = pointwise(dataset, threshold=2)(np.array([0, 1]), DRAW)
    assert found.rows.tolist() == [[1], [2]] and found.labels.tolist() == [[0], [1]]


def test_sampled_is_lists_with_the_correction_of_its_sampler(dataset):
    sampler = NegativeSampler([0, 4, 2, 1, 1, 0, 0], power=1)
    seen, positions = Seen(dataset.log, [0, 1, 2]), np.array([0, 1, 8])
    found = sampled(dataset, sampler=sampler, negatives=5, seen=seen, corrected=True)(positions, DRAW)
    rows, labels = lists(dataset, positions, sampler=sampler, negatives=5, seed=3, epoch=1, step=7, seen=seen)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.log_q is not None and found.log_q.dtype == np.float32
    probability = np.array([0, 4, 2, 1, 1, 0, 0]) / 8
    np.testing.assert_allclose(found.log_q[:, 1:], np.log(5 * probability[rows[:, 1:]]), rtol=1e-6)
    assert found.log_q[:, 0].tolist() == [0, 0, 0]  # the positive is always in its list
    assert sampled(dataset, sampler=sampler, negatives=5)(positions, DRAW).log_q is None
    other = sampled(dataset, sampler=sampler, negatives=5)(positions, DRAW._replace(step=8))
    assert not np.array_equal(other.rows[:, 1:], sampled(dataset, sampler=sampler, negatives=5)(positions, DRAW).rows[:, 1:])


def test_the_correction_makes_a_sampled_softmax_the_whole_one():
    """The mean over many samples of sum_c exp(s_c - log_q_c) is the sum over the catalogue: what the correction is for."""
    scores, sampler = np.array([9.0, 0.3, -1.0, 2.0, 0.5]), NegativeSampler([0, 5, 1, 2, 8])
    drawn = sampler.sample(50_000, 4, seed=0, epoch=0, step=0)
    estimate = np.exp(scores[drawn] - sampler.log_q(drawn, 4)).sum(axis=1).mean()
    np.testing.assert_allclose(estimate, np.exp(scores[1:]).sum(), rtol=0.02)
    assert np.isneginf(sampler.log_q([0], 4)).all()


@pytest.mark.parametrize("form", ["array", "function"])
def test_what_retrieval_found_without_the_target_and_repetitions(dataset, form):
    table = np.zeros((9, 4), np.int64)
    table[0], table[4] = [2, 1, 2, 5], [6, 0, 4, 4]
    retrieval = table if form == "array" else lambda positions: table[positions]
    found = retrieved(dataset, retrieval=retrieval, candidates=5)(np.array([0, 4, 5]), DRAW)
    assert found.rows.tolist() == [[1, 2, 0, 0, 5], [4, 6, 0, 0, 0], [0, 0, 0, 0, 0]]  # the target of position 5 is unknown
    assert found.labels.tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert retrieved(dataset, retrieval=retrieval, candidates=2)(np.array([0]), DRAW).rows.tolist() == [[1, 2]]
    assert retrieved(dataset, retrieval=retrieval, candidates=7)(np.array([0]), DRAW).rows.tolist() == [[1, 2, 0, 0, 5, 0, 0]]


def test_wrong_sources_are_refused(dataset):
    with pytest.raises(ValueError, match="candidates: expected at least 1, got 0"):
        impressed(dataset, candidates=0, threshold=2)
    with pytest.raises(ValueError, match="candidates: expected at least 2, got 1"):
        retrieved(dataset, retrieval=np.zeros((9, 1), np.int32), candidates=1)
    with pytest.raises(ValueError, match=r"retrieval: expected values in \[0, 7\), got 7"):
        retrieved(dataset, retrieval=np.full((9, 2), 7), candidates=3)(np.array([0]), DRAW)
    with pytest.raises(ValueError, match=r"retrieval: expected rows \[1, R\], got shape \[2\]"):
        retrieved(dataset, retrieval=lambda positions: np.array([1, 2]), candidates=3)(np.array([0]), DRAW)
