"""Sampling: one order and one set of negatives for each (seed, epoch, step), in the stated proportions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.data.catalogue import Catalogue
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.sampling import NegativeSampler, Seen, epoch_batches, item_counts, liked_or_not, lists
from aif_jax.data.schema import Attribute, Schema, Vocabulary

STEP = {"seed": 3, "epoch": 1, "step": 7}


def dataset() -> Dataset:
    schema = Schema(item_attributes=(Attribute(name="item", size=7), Attribute(name="category", size=2)), actions=6)
    return Dataset(
        name="by hand",
        schema=schema,
        log=EventLog.from_arrays([1, 1, 1, 2, 2, 2], [1, 2, 3, 3, 4, 0], [5, 3, 4, 1, 0, 5], [1, 2, 3, 4, 5, 6], users=3),
        catalogue=Catalogue.from_items(schema, np.arange(6), ids={"category": [1] * 6}),
        user_ids={},
        user_floats=np.zeros([3, 0], np.float32),
        users=Vocabulary([10, 20]),
        items=Vocabulary(np.arange(6)),
    )


# order


def test_an_epoch_holds_every_position_once():
    positions = np.array([5, 9, 2, 7, 30, 11, 4])
    batches = list(epoch_batches(positions, 3, seed=0, epoch=0, drop_last=False))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(np.concatenate(batches).tolist()) == sorted(positions.tolist())
    assert [len(batch) for batch in epoch_batches(positions, 3, seed=0, epoch=0)] == [3, 3]
    assert positions.tolist() == [5, 9, 2, 7, 30, 11, 4]  # the caller's array stays
    assert list(epoch_batches([], 3, seed=0, epoch=0, drop_last=False)) == []


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(**where):
        return np.concatenate(list(epoch_batches(np.arange(200), 10, **where))).tolist()

    assert order(seed=0, epoch=0) == order(seed=0, epoch=0)
    assert order(seed=0, epoch=0) != order(seed=0, epoch=1)
    assert order(seed=0, epoch=0) != order(seed=1, epoch=0)
    assert order(seed=0, epoch=0) != list(range(200))


def test_an_epoch_goes_on_where_it_stopped():
    whole = list(epoch_batches(np.arange(50), 8, seed=1, epoch=2))
    rest = list(epoch_batches(np.arange(50), 8, seed=1, epoch=2, start=4))
    assert len(whole) == 6
    np.testing.assert_array_equal(rest, whole[4:])
    assert list(epoch_batches(np.arange(50), 8, seed=1, epoch=2, start=6)) == []


def test_a_bad_order_is_refused_at_once():
    for wrong, message in (
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"batch_size": 2, "start": -1}, "start >= 0"),
        ({"batch_size": 2, "epoch": -1}, "seed, epoch and step of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            epoch_batches([1, 2], **{"seed": 0, "epoch": 0, **wrong})  # not only when iterated


# negatives


def test_item_counts_of_training_events_only():
    assert item_counts(dataset(), [0, 2, 3]).tolist() == [0, 1, 0, 2, 0, 0, 0]


def test_probabilities_by_hand():
    sampler = NegativeSampler([100, 1, 16, 0, 81], power=0.75)
    np.testing.assert_allclose(sampler.probabilities, np.array([0, 1, 8, 0, 27]) / 36, rtol=1e-12)
    np.testing.assert_allclose(NegativeSampler([9, 0, 5, 1], power=0).probabilities, [0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("items", [5, 1000])  # fewer and more than fit one cell of the guide table
def test_draws_follow_the_probabilities(items):
    counts = np.random.default_rng(0).integers(0, 50, items) ** 2
    sampler = NegativeSampler(counts)
    size = 400_000
    rows = sampler.sample(size // 100, 100, **STEP)
    assert rows.shape == (size // 100, 100) and rows.dtype == np.int32
    got = np.bincount(rows.ravel(), minlength=items) / size
    spread = np.sqrt(sampler.probabilities * (1 - sampler.probabilities) / size)
    assert np.all(np.abs(got - sampler.probabilities) <= 5 * spread)  # exactly 0 where the probability is


def test_skewed_draws_equal_a_plain_search():
    """One item with nearly all the mass and many with nearly none: all their boundaries fall into few cells of the guide."""
    sampler = NegativeSampler(np.append([0, 1e12], np.arange(3000) % 7), power=1)
    edges = sampler._cumulative[:-1]
    values = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 1), [0, 0.5, 1 - 2**-53]])
    values = values[(values >= 0) & (values < 1)]
    got = sampler._rows(values)
    np.testing.assert_array_equal(got, np.searchsorted(sampler._cumulative, values, side="right"))


def test_negatives_depend_on_seed_epoch_and_step_and_nothing_else():
    sampler = NegativeSampler(np.ones(1000))
    rows = sampler.sample(4, 20, **STEP).tolist()
    assert rows == sampler.sample(4, 20, **STEP).tolist()
    for name in STEP:
        assert rows != sampler.sample(4, 20, **{**STEP, name: STEP[name] + 1}).tolist()


def test_avoided_rows_are_never_drawn_and_the_rest_keep_their_proportions():
    sampler = NegativeSampler([0, 4, 3, 2, 1], power=1)
    size = 100_000
    avoid = np.tile([[1, 3], [2, 2]], (size // 2, 1))
    rows = sampler.sample(size, 1, avoid=avoid, **STEP)[:, 0]
    for got, expected in ((rows[::2], [0, 0, 3 / 4, 0, 1 / 4]), (rows[1::2], [0, 4 / 7, 0, 2 / 7, 1 / 7])):
        share = np.bincount(got, minlength=5) / len(got)
        np.testing.assert_allclose(share, expected, atol=0.01)
        assert np.all(share[np.array(expected) == 0] == 0)


def test_a_list_that_must_avoid_nearly_everything_still_gets_the_right_rows():
    sampler = NegativeSampler([0, 1e15, 1, 3], power=1)  # redrawing would take 10^14 rounds
    rows = sampler.sample(1, 20_000, avoid=[1], **STEP)
    np.testing.assert_allclose(np.bincount(rows[0], minlength=4) / 20_000, [0, 0, 0.25, 0.75], atol=0.02)
    with pytest.raises(ValueError, match="item that list 1 need not avoid"):
        sampler.sample(2, 3, avoid=[[1, 1, 1], [1, 2, 3]], **STEP)


def test_no_negatives_is_no_error():
    assert NegativeSampler([0, 1, 1]).sample(3, 0, avoid=[1, 2, 1], **STEP).shape == (3, 0)
    assert NegativeSampler([0, 1, 1]).sample(0, 3, **STEP).shape == (0, 3)


pairs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_what_a_user_has_seen_is_no_negative(events):
    log = EventLog.from_arrays(*np.array(events).T, np.ones(len(events), int), np.arange(len(events)), users=5)
    seen = Seen(log, np.arange(len(log)))
    for user in range(5):
        mine = sorted({item for owner, item in events if owner == user})
        assert seen.items(user).tolist() == mine
        assert seen.contains(user, np.arange(7)).tolist() == [item in mine for item in range(7)]
    users = np.array([1, 2, 3, 4])
    rows = NegativeSampler(np.ones(7)).sample(4, 5, users=users, seen=seen, **STEP)
    assert not seen.contains(users[:, None], rows).any()


def test_seen_nothing():
    seen = Seen(dataset().log, [])
    assert not seen.contains([1, 2], [1, 2]).any()
    assert seen.items(1).tolist() == []


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 1], "at least 2 items that can be drawn, got 1"),
        ([], "at least 2 items that can be drawn, got 0"),
        ([0, 1, np.nan], "finite values of at least 0"),
        ([0, 1, -1], "finite values of at least 0"),
        ([[1, 2]], r"counts: expected shape \[any\], got \[1, 2\]"),
    ],
)
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        NegativeSampler(counts)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="power: expected a finite value of at least 0, got -1"):
        NegativeSampler([0, 1, 1], power=-1)
    sampler, seen = NegativeSampler([0, 1, 1]), Seen(dataset().log, [0])
    for wrong, message in (
        ({"avoid": [1]}, r"avoid: expected shape \[2\] or \[2, A\], got \[1\]"),
        ({"avoid": [1, 3]}, r"avoid: expected values in \[0, 3\), got 3"),
        ({"users": [1, 1]}, "users and seen together"),
        ({"users": [1], "seen": seen}, r"users: expected shape \[2\], got \[1\]"),
        ({"step": -1}, "seed, epoch and step of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.sample(2, 3, **{**STEP, **wrong})


# lists and labels


def test_lists_have_the_positive_first():
    data = dataset()
    sampler = NegativeSampler(item_counts(data, [0, 1, 2, 3, 4]))
    rows, labels = lists(data, [0, 3, 4], sampler=sampler, negatives=50, **STEP)
    assert rows.shape == labels.shape == (3, 51)
    assert (rows.dtype, labels.dtype) == (np.int32, np.float32)
    assert rows[:, 0].tolist() == [1, 3, 4]
    assert not (rows[:, 1:] == rows[:, :1]).any()
    assert labels[:, 0].tolist() == [1, 1, 1] and not labels[:, 1:].any()
    assert set(rows[1, 1:]) == {1, 2, 4}  # the counted items but the target; the user's other item among them
    rows, _ = lists(data, [0, 3, 4], sampler=sampler, negatives=50, seen=Seen(data.log, [0, 1, 3, 4]), **STEP)
    assert [set(row) for row in rows[:, 1:].tolist()] == [{3, 4}, {1, 2}, {1, 2}]


def test_liked_or_not_by_hand():
    rows, labels = liked_or_not(dataset(), [0, 1, 2, 3], threshold=4)
    assert rows.tolist() == [[1], [2], [3], [3]] and rows.dtype == np.int32
    assert labels.tolist() == [[1], [0], [1], [0]] and labels.dtype == np.float32


def test_samples_without_a_label_are_refused():
    data = dataset()
    with pytest.raises(ValueError, match="unknown item at position 5"):
        lists(data, [0, 5], sampler=NegativeSampler([0, 1, 1, 1, 1, 1, 1]), negatives=1, **STEP)
    with pytest.raises(ValueError, match="unknown item at position 5"):
        liked_or_not(data, [5], threshold=4)
    with pytest.raises(ValueError, match="action 0 at position 4"):
        liked_or_not(data, [3, 4], threshold=4)
    for threshold in (1, 6):
        with pytest.raises(ValueError, match=rf"threshold: expected an action row in \[2, 6\), got {threshold}"):
            liked_or_not(data, [0], threshold=threshold)
