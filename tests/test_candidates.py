"""Sources of candidates, by hand on a log of impressions; negatives: one set for each draw, in the stated proportions."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.catalogue import Catalogue
from aif_jax.data import split as split_module
from aif_jax.data.candidates import CandidateLists, CandidateSource, describe, impressions, retrieved, sampled_negatives
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS, EventLog
from aif_jax.data.negatives import POWER, NegativeSampler, SeenPairs, item_counts
from aif_jax.data.order import BatchKey
from aif_jax.data.split import sample_positions
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.schema import Attribute, Schema
from tests.refusals import refused

DRAW = BatchKey(seed=3, epoch=1, step=7)
#          user 1: request at 10 (three shown), at 20 (one), at 30 (two);  user 2: request at 30 (two), at 40 (one)
USER = [1, 1, 1, 1, 1, 1, 2, 2, 2]
TIME = [10, 10, 10, 20, 30, 30, 30, 30, 40]
ITEM = [1, 2, 3, 2, 4, 0, 5, 6, 1]
ACTION = [1, 2, 1, 2, 1, 2, 1, 1, 2]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return of_log(EventLog(USER, ITEM, ACTION, TIME, users=3), items=6, actions=3)


@pytest.mark.parametrize("block", [8, 1 << 22])  # a request that crosses a border of blocks is not cut in two
def test_requests_start_where_user_or_time_changes(dataset, monkeypatch, block):
    monkeypatch.setattr(split_module, "BLOCK", block)

    def starts(**given):
        return sample_positions(dataset.log, requests=True, **given).tolist()

    assert starts() == [0, 3, 4, 6, 8]
    assert starts(min_history=1) == [3, 4, 8]
    assert starts(min_history=4) == [4]
    assert starts(since=20, before=40) == [3, 4, 6]
    assert sample_positions(EventLog([1] * 20, [1] * 20, [1] * 20, [0] * 5 + [7] * 15), requests=True).tolist() == [0, 5]


def test_a_shown_list_is_all_events_of_its_request_with_the_history_of_its_first(dataset):
    """Otherwise one user state for the whole list would look at another member's answer."""
    assert dataset.log.history_end(np.arange(9)).tolist() == [0, 0, 0, 3, 4, 4, 6, 6, 8]
    found = impressions(dataset, candidates=3, threshold=2)(np.array([0, 3, 4, 6, 8]), DRAW)
    assert found.rows.tolist() == [[1, 2, 3], [2, 0, 0], [4, 0, 0], [5, 6, 0], [1, 0, 0]]  # item 0 is none of the catalogue
    assert found.labels.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert (found.rows.dtype, found.labels.dtype, found.log_q) == (np.int32, np.float32, None)
    several = impressions(dataset, candidates=3, threshold={"click": 2, "again": 2})(np.array([0, 3]), DRAW).labels
    assert several["click"].tolist() == several["again"].tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"threshold\['shown'\]: expected an action row in \[2, 3\), got 1"):
        impressions(dataset, candidates=3, threshold={"shown": 1, "click": 2})


def shown(items, actions) -> Dataset:
    """One request of user 1, a list of these items, and one of another item before it."""
    log = EventLog([1] * (1 + len(items)), [8, *items], [1, *actions], [5, *[9] * len(items)], users=2)
    return of_log(log, items=8, actions=4)


def test_of_a_long_list_the_positives_are_kept_and_the_rest_is_drawn():
    data = shown([1, 2, 3, 4, 5, 6, 7, 0, 8], [1, 1, 1, 1, 1, 3, 2, 3, 0])  # an unknown item and an unknown action are none
    source, drawn = impressions(data, candidates=3, threshold={"click": 2, "like": 3}), set()
    for step in range(30):
        rows, labels, _ = source(np.array([0, 1]), BatchKey(0, 0, step))
        assert rows[0].tolist() == [8, 0, 0] and rows[1, 1:].tolist() == [6, 7]  # in the order of the log
        assert labels["click"][1].tolist() == [0, 1, 1] and labels["like"][1].tolist() == [0, 1, 0]
        np.testing.assert_array_equal(source(np.array([0, 1]), BatchKey(0, 0, step)).rows, rows)
        drawn.add(int(rows[1, 0]))
    assert drawn == {1, 2, 3, 4, 5}
    many = impressions(data, candidates=1, threshold=2)
    assert {int(many(np.array([1]), BatchKey(0, 0, step)).rows[0, 0]) for step in range(30)} == {6, 7}
    assert impressions(data, candidates=9, threshold=2)(np.array([1]), DRAW).rows.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 0]]
    assert impressions(data, candidates=7, threshold=2)(np.array([1]), DRAW).rows.tolist() == [[1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("candidates", [3, 4, 6])
def test_an_item_that_is_logged_twice_in_a_request_is_one_candidate(candidates):
    rows, labels, _ = impressions(shown([2, 1, 2, 1], [1, 2, 2, 2]), candidates=candidates, threshold=2)(np.array([1]), DRAW)
    there = rows[0] > 0
    assert rows[0][there].tolist() == [1, 2] and labels[0][there].tolist() == [1, 1]


def test_sampled_lists_have_the_positive_first():
    data = two_users()
    sampler = NegativeSampler(item_counts(data, [0, 1, 2, 3, 4]))
    rows, labels, log_q = sampled_negatives(data, sampler=sampler, negatives=50)([0, 3, 4], DRAW)
    assert rows.shape == labels.shape == (3, 51) and log_q is None
    assert (rows.dtype, labels.dtype) == (np.int32, np.float32)
    assert rows[:, 0].tolist() == [1, 3, 4]
    assert not (rows[:, 1:] == rows[:, :1]).any()
    assert labels[:, 0].tolist() == [1, 1, 1] and not labels[:, 1:].any()
    assert set(rows[1, 1:]) == {1, 2, 4}  # the counted items but the target; the user's other item among them
    refused(ValueError, "known items, .* at position 5;", sampled_negatives(data, sampler=sampler, negatives=1), [0, 5], DRAW)


def test_where_nobody_comes_back_what_was_met_before_is_no_negative():
    """User 1 has items 1, 2, 3 in this order, user 2 items 3, 4: of the past alone, so item 3 may be drawn at position 1."""
    data = two_users()
    sampler = NegativeSampler(item_counts(data, [0, 1, 2, 3, 4]))
    source, at = sampled_negatives(data, sampler=sampler, negatives=50), np.array([0, 1, 2, 4])
    rows = source(at, DRAW).rows
    assert rows[:, 0].tolist() == [1, 2, 3, 4]
    assert [set(row) for row in rows[:, 1:].tolist()] == [{2, 3, 4}, {3, 4}, {4}, {1, 2}]
    back = dataclasses.replace(data, repeats=True)
    plain = sampled_negatives(back, sampler=sampler, negatives=50)
    assert back.digest != data.digest  # by which a cursor tells the two apart
    assert set(plain(at, DRAW).rows[1, 1:].tolist()) == {1, 3, 4}
    # a user who has met all that can be drawn has no negatives
    for fourth, drawn in ((1, [[1.5] * 4, [1, 3, 3, 3]]), (0, [[3] * 4, [1] * 4])):
        source = sampled_negatives(data, sampler=NegativeSampler([0, 1, 1, 0, fourth]), negatives=3, logq_correction=True)
        found = source(np.array([0, 2]), DRAW)  # item 3 of user 1, who has met 1 and 2
        assert np.exp(found.log_q).round(5).tolist() == drawn and found.labels[1].tolist() == [1, 0, 0, 0]
    assert found.rows[0].tolist() == [1, 2, 2, 2] and found.rows[1].tolist() == [3, 0, 0, 0]


def in_proportion(counts: list[float]) -> NegativeSampler:
    """A sampler that draws items in proportion to their counts."""
    return NegativeSampler(np.array(counts) ** (1 / POWER))


def test_sampled_carries_the_correction_of_its_sampler(dataset):
    sampler, positions = in_proportion([0, 4, 2, 1, 1, 0, 0]), np.array([0, 3, 8])
    plain = sampled_negatives(dataset, sampler=sampler, negatives=5)(positions, DRAW)
    found = sampled_negatives(dataset, sampler=sampler, negatives=5, logq_correction=True)(positions, DRAW)
    np.testing.assert_array_equal(found.rows, plain.rows)
    np.testing.assert_array_equal(found.rows[:, 1:], sampler.sample(3, 5, key=DRAW, avoid=found.rows[:, 0]))
    assert found.log_q.dtype == np.float32
    probability = np.array([0, 4, 2, 1, 1, 0, 0]) / 8
    drawn = 5 * probability[found.rows] / (1 - probability[found.rows[:, :1]])  # without the target
    np.testing.assert_allclose(found.log_q, np.log(drawn), rtol=1e-6)
    new, seen = dataclasses.replace(dataset, repeats=False), SeenPairs(dataset, positions)
    once = sampled_negatives(new, sampler=sampler, negatives=5, logq_correction=True)(positions, DRAW)
    left = [1 - probability[np.union1d(seen.items(row), item)].sum() for row, item in enumerate(once.rows[:, 0])]
    np.testing.assert_allclose(once.log_q[:, 0], np.log(5 * probability[once.rows[:, 0]] / left), rtol=1e-6)
    never = NegativeSampler([0, 0, 1, 1, 1, 0, 0])
    held = sampled_negatives(dataset, sampler=never, negatives=5, logq_correction=True)(positions, DRAW)
    drawn = never.probabilities[held.rows[:, 0]] > 0
    assert 0 < drawn.sum() < 3 and held.log_q is not None and not held.log_q[~drawn, 0].any() and held.log_q[drawn, 0].all()
    other = sampled_negatives(dataset, sampler=sampler, negatives=5)(positions, DRAW._replace(step=8))
    assert not np.array_equal(other.rows[:, 1:], plain.rows[:, 1:])


def test_the_correction_makes_a_sampled_softmax_the_whole_one():
    """The mean over many samples of sum_c exp(s_c - log_q_c) is the sum over the catalogue: what the correction is for."""
    scores, sampler = np.array([9.0, 0.3, -1.0, 2.0, 0.5]), NegativeSampler([0, 5, 1, 2, 8])
    drawn = sampler.sample(50_000, 4, key=BatchKey(0, 0, 0))
    estimate = np.exp(scores[drawn] - sampler.log_q(drawn, 4)).sum(axis=1).mean()
    np.testing.assert_allclose(estimate, np.exp(scores[1:]).sum(), rtol=0.02)
    assert np.isneginf(sampler.log_q([0], 4)).all()


@pytest.mark.parametrize("form", ["array", "function"])
def test_what_retrieval_found_without_the_target_and_repetitions(dataset, form):
    table = np.zeros((9, 4), np.int64)
    table[0], table[4] = [2, 1, 2, 5], [6, 0, 4, 4]
    retrieval = table if form == "array" else lambda positions: table[positions]
    assert dataset.repeats  # item 2 at 10 and at 20
    found = retrieved(dataset, retrieval=retrieval)(np.array([0, 4, 5]), DRAW)
    assert found.rows.tolist() == [[1, 2, 0, 0, 5], [4, 6, 0, 0, 0], [0, 0, 0, 0, 0]]  # the target of position 5 is unknown
    assert found.labels.tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_wrong_sources_are_refused(dataset):
    refused(ValueError, "candidates: expected at least 1, got 0", impressions, dataset, candidates=0, threshold=2)
    lone, message = of_log(EventLog([1], [1], [1], [5]), items=1, actions=2), "two actions or more, .* got one; name"
    refused(ValueError, message, impressions, lone, candidates=1, threshold=2)
    for retrieval, message in (
        (np.zeros((9, 0), np.int32), r"retrieval: expected rows \[1, R\] of at least one candidate, got shape \[1, 0\]"),
        (np.full((9, 2), 7), r"retrieval: expected values in \[0, 7\), got 7"),
        (lambda positions: np.array([1, 2]), r"retrieval: expected rows \[1, R\] of at least one candidate, got shape \[2\]"),
    ):
        refused(ValueError, message, lambda of: retrieved(dataset, retrieval=of)([0], DRAW), retrieval)


def test_a_source_is_described_by_what_decides_its_lists(dataset):
    """Equal settings give equal descriptions, any other setting another one; a cursor tells pipelines apart by them."""
    one, two = NegativeSampler([0, 4, 2, 1, 1, 0, 0]), NegativeSampler([0, 4, 2, 1, 2, 0, 0])
    table = np.zeros((9, 4), np.int32)

    def mine(positions, draw):
        return CandidateLists(np.ones((len(positions), 1), np.int32), np.ones((len(positions), 1), np.float32))

    def sources():
        options = itertools.product((one, two), (1, 2), (False, True))
        return [
            *(impressions(dataset, candidates=count, threshold=2) for count in (1, 3, 4)),
            *(sampled_negatives(dataset, sampler=s, negatives=n, logq_correction=c) for s, n, c in options),
            retrieved(dataset, retrieval=table),
            retrieved(dataset, retrieval=table + 1),
            retrieved(dataset, retrieval=lambda positions: table[positions]),
            CandidateSource(mine, {"kind": "mine", "version": 2}),
            mine,
        ]

    first, second = ([json.dumps(describe(source)) for source in sources()] for _ in range(2))
    assert first == second and len(set(first)) == len(first)
    assert "test_a_source_is_described_by_what_decides_its_lists.<locals>.mine" in first[-1]
    assert CandidateSource(mine, {})(np.array([4, 5]), DRAW).rows.shape == (2, 1)


def test_what_was_retrieved_and_met_before_is_no_negative_where_nobody_comes_back(dataset):
    """Position 4 is item 4 of user 1 at 30, who has met 1, 2 and 3; position 3 is item 2, met before: the target stays."""
    table = np.zeros((9, 4), np.int64)
    table[4], table[3], table[0] = [6, 2, 4, 1], [3, 5, 2, 6], [2, 1, 2, 5]
    found = retrieved(dataclasses.replace(dataset, repeats=False), retrieval=table)(np.array([4, 3, 0]), DRAW)
    assert found.rows.tolist() == [[4, 6, 0, 0, 0], [2, 0, 5, 0, 6], [1, 2, 0, 0, 5]]
    assert found.labels[:, 0].tolist() == [1, 1, 1] and not found.labels[:, 1:].any()


def of_log(log: EventLog, *, items: int, actions: int) -> Dataset:
    """A data set of a log and so many known items, which have one category."""
    attributes = Attribute(name="item", size=items + 1), Attribute(name="category", size=2)
    schema = Schema(item_attributes=attributes, actions=actions)
    known = Vocabulary(np.arange(items))
    catalogue = Catalogue.from_items(schema, known.raw, ids={"category": [1] * items})
    users, floats = Vocabulary(10 * np.arange(1, log.users)), np.zeros([log.users, 0], np.float32)
    return Dataset(name="mine", log=log, catalogue=catalogue, user_ids={}, user_floats=floats, users=users, items=known)


def mapped(log: EventLog, folder: Path) -> EventLog:
    """The log of columns in files, memory-mapped."""
    for name in COLUMNS:
        np.save(folder / name, getattr(log, name))
    return EventLog(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}, users=log.users)


def two_users() -> Dataset:
    user, item, action = [1, 1, 1, 2, 2, 2], [1, 2, 3, 3, 4, 0], [5, 3, 4, 1, 0, 5]
    return of_log(EventLog(user, item, action, [1, 2, 3, 4, 5, 6], users=3), items=6, actions=6)


def test_probabilities_by_hand():
    np.testing.assert_allclose(NegativeSampler([100, 1, 16, 0, 81]).probabilities, np.array([0, 1, 8, 0, 27]) / 36, rtol=1e-12)


def test_draws_follow_the_probabilities():
    size, items = 400_000, 1000
    sampler = NegativeSampler(np.random.default_rng(0).integers(0, 50, items) ** 2)
    rows = sampler.sample(size // 100, 100, key=DRAW)
    assert rows.shape == (size // 100, 100) and rows.dtype == np.int32
    got = np.bincount(rows.ravel(), minlength=items) / size
    spread = np.sqrt(sampler.probabilities * (1 - sampler.probabilities) / size)
    assert np.all(np.abs(got - sampler.probabilities) <= 5 * spread)  # exactly 0 where the probability is


def test_negatives_depend_on_seed_epoch_and_step_and_nothing_else():
    sampler = NegativeSampler(np.ones(1000))
    rows = sampler.sample(4, 20, key=DRAW).tolist()
    assert rows == sampler.sample(4, 20, key=DRAW).tolist()
    for name, value in DRAW._asdict().items():
        assert rows != sampler.sample(4, 20, key=DRAW._replace(**{name: value + 1})).tolist()


def test_avoided_rows_are_never_drawn_and_the_rest_keep_their_proportions():
    sampler, size = in_proportion([0, 4, 3, 2, 1]), 100_000
    rows = sampler.sample(size, 1, avoid=np.tile([1, 2], size // 2), key=DRAW)[:, 0]
    for got, expected in ((rows[::2], [0, 0, 1 / 2, 1 / 3, 1 / 6]), (rows[1::2], [0, 4 / 7, 0, 2 / 7, 1 / 7])):
        share = np.bincount(got, minlength=5) / len(got)
        np.testing.assert_allclose(share, expected, atol=0.01)
        assert np.all(share[np.array(expected) == 0] == 0)


def test_a_list_that_must_avoid_nearly_everything_still_gets_the_right_rows():
    sampler = in_proportion([0, 1e15, 1, 3])  # redrawing would take 10^14 rounds
    rows = sampler.sample(1, 20_000, avoid=[1], key=DRAW)
    np.testing.assert_allclose(np.bincount(rows[0], minlength=4) / 20_000, [0, 0, 0.25, 0.75], atol=0.02)
    met = SeenPairs(two_users(), [1, 2])  # items 1, and 1 and 2
    assert NegativeSampler([0, 1, 1, 0, 0, 0, 0]).sample(2, 3, seen=met, key=DRAW).tolist() == [[2, 2, 2], [0, 0, 0]]


def test_no_negatives_and_nothing_seen_are_no_errors():
    assert NegativeSampler([0, 1, 1]).sample(3, 0, avoid=[1, 2, 1], key=DRAW).shape == (3, 0)
    assert NegativeSampler([0, 1, 1]).sample(0, 3, key=DRAW).shape == (0, 3)
    seen = SeenPairs(two_users(), [0, 3])
    assert not seen.contains([0, 1], [1, 2]).any()
    assert seen.items(1).tolist() == []
    assert SeenPairs(two_users(), []).drop(np.zeros((0, 3), np.int32)).shape == (0, 3)


pairs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_what_a_user_has_seen_is_no_negative(events):
    log = EventLog(*np.array(events).T, np.ones(len(events), int), np.arange(len(events)) // 2, users=5)
    at = np.arange(len(log))
    seen = SeenPairs(of_log(log, items=6, actions=2), at)
    for sample in at.tolist():
        mine = sorted(set(log.item[(log.user == log.user[sample]) & (log.time < log.time[sample])].tolist()))
        assert seen.items(sample).tolist() == mine
        assert seen.contains(sample, np.arange(7)).tolist() == [item in mine for item in range(7)]
    rows = NegativeSampler(np.ones(7)).sample(len(at), 5, seen=seen, key=DRAW)
    assert rows.min() > 0 and not seen.contains(at[:, None], rows).any()
