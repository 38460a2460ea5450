"""Negatives: one set for each (seed, epoch, step), in the stated proportions."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.catalogue import Catalogue
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS, EventLog
from aif_jax.data.negatives import NegativeSampler, SeenPairs
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.schema import Attribute, Schema

STEP = {"seed": 3, "epoch": 1, "step": 7}


def of_log(log: EventLog, *, items: int, actions: int) -> Dataset:
    """A data set of a log and so many known items, which have one category."""
    attributes = Attribute(name="item", size=items + 1), Attribute(name="category", size=2)
    schema = Schema(item_attributes=attributes, actions=actions)
    known = Vocabulary(np.arange(items))
    catalogue = Catalogue.from_items(schema, known.raw, ids={"category": [1] * items})
    users, floats = Vocabulary(10 * np.arange(1, log.users)), np.zeros([log.users, 0], np.float32)
    return Dataset(
        name="mine", schema=schema, log=log, catalogue=catalogue, user_ids={}, user_floats=floats, users=users, items=known
    )


def mapped(log: EventLog, folder: Path) -> EventLog:
    """The log of columns in files, memory-mapped."""
    for name in COLUMNS:
        np.save(folder / name, getattr(log, name))
    return EventLog(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}, users=log.users)


def dataset() -> Dataset:
    user, item, action = [1, 1, 1, 2, 2, 2], [1, 2, 3, 3, 4, 0], [5, 3, 4, 1, 0, 5]
    return of_log(EventLog(user, item, action, [1, 2, 3, 4, 5, 6], users=3), items=6, actions=6)


def test_probabilities_by_hand():
    sampler = NegativeSampler([100, 1, 16, 0, 81], power=0.75)
    np.testing.assert_allclose(sampler.probabilities, np.array([0, 1, 8, 0, 27]) / 36, rtol=1e-12)
    np.testing.assert_allclose(NegativeSampler([9, 0, 5, 1], power=0).probabilities, [0, 1 / 3, 1 / 3, 1 / 3])


def test_draws_follow_the_probabilities():
    size, items = 400_000, 1000
    sampler = NegativeSampler(np.random.default_rng(0).integers(0, 50, items) ** 2)
    rows = sampler.sample(size // 100, 100, **STEP)
    assert rows.shape == (size // 100, 100) and rows.dtype == np.int32
    got = np.bincount(rows.ravel(), minlength=items) / size
    spread = np.sqrt(sampler.probabilities * (1 - sampler.probabilities) / size)
    assert np.all(np.abs(got - sampler.probabilities) <= 5 * spread)  # exactly 0 where the probability is


def test_negatives_depend_on_seed_epoch_and_step_and_nothing_else():
    sampler = NegativeSampler(np.ones(1000))
    rows = sampler.sample(4, 20, **STEP).tolist()
    assert rows == sampler.sample(4, 20, **STEP).tolist()
    for name in STEP:
        assert rows != sampler.sample(4, 20, **{**STEP, name: STEP[name] + 1}).tolist()


def test_avoided_rows_are_never_drawn_and_the_rest_keep_their_proportions():
    sampler = NegativeSampler([0, 4, 3, 2, 1], power=1)
    size = 100_000
    rows = sampler.sample(size, 1, avoid=np.tile([1, 2], size // 2), **STEP)[:, 0]
    for got, expected in ((rows[::2], [0, 0, 1 / 2, 1 / 3, 1 / 6]), (rows[1::2], [0, 4 / 7, 0, 2 / 7, 1 / 7])):
        share = np.bincount(got, minlength=5) / len(got)
        np.testing.assert_allclose(share, expected, atol=0.01)
        assert np.all(share[np.array(expected) == 0] == 0)


def test_a_list_that_must_avoid_nearly_everything_still_gets_the_right_rows():
    sampler = NegativeSampler([0, 1e15, 1, 3], power=1)  # redrawing would take 10^14 rounds
    rows = sampler.sample(1, 20_000, avoid=[1], **STEP)
    np.testing.assert_allclose(np.bincount(rows[0], minlength=4) / 20_000, [0, 0, 0.25, 0.75], atol=0.02)
    met = SeenPairs(dataset(), [1, 2])  # items 1, and 1 and 2
    rows = NegativeSampler([0, 1, 1, 0, 0, 0, 0]).sample(2, 3, seen=met, **STEP)
    assert rows.tolist() == [[2, 2, 2], [0, 0, 0]]


def test_no_negatives_and_nothing_seen_are_no_errors():
    assert NegativeSampler([0, 1, 1]).sample(3, 0, avoid=[1, 2, 1], **STEP).shape == (3, 0)
    assert NegativeSampler([0, 1, 1]).sample(0, 3, **STEP).shape == (0, 3)
    seen = SeenPairs(dataset(), [0, 3])
    assert not seen.contains([0, 1], [1, 2]).any()
    assert seen.items(1).tolist() == []
    assert SeenPairs(dataset(), []).drop(np.zeros((0, 3), np.int32)).shape == (0, 3)


pairs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_what_a_user_has_seen_is_no_negative(events):
    log = EventLog(*np.array(events).T, np.ones(len(events), int), np.arange(len(events)) // 2, users=5)
    at = np.arange(len(log))
    seen = SeenPairs(of_log(log, items=6, actions=2), at)
    for sample in at.tolist():
        earlier = (log.user == log.user[sample]) & (log.time < log.time[sample])
        mine = sorted(set(log.item[earlier].tolist()))
        assert seen.items(sample).tolist() == mine
        assert seen.contains(sample, np.arange(7)).tolist() == [item in mine for item in range(7)]
    rows = NegativeSampler(np.ones(7)).sample(len(at), 5, seen=seen, **STEP)
    assert rows.min() > 0 and not seen.contains(at[:, None], rows).any()
