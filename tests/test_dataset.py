"""EventLog and Dataset: sorting, windows, splits, features gathered from the log, no leakage, what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.catalogue import Catalogue
from aif_jax.data import events, split
from aif_jax.data.dataset import REPEATED, Dataset
from aif_jax.data.events import EventLog, repeated_share
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.features import check_user_features
from aif_jax.schema import Attribute, Schema
from tests.refusals import refused
from tests.test_candidates import mapped

SCHEMA = Schema(
    item_attributes=(
        Attribute(name="item", size=4),
        Attribute(name="category", size=3),
        Attribute(name="tags", size=5, length=2),
    ),
    user_attributes=(Attribute(name="gender", size=3), Attribute(name="interests", size=7, length=2)),
    actions=4,
    user_floats=1,
)


def dataset(user=(1, 1, 1, 1, 2), item=(1, 2, 3, 0, 2), action=(1, 2, 3, 1, 2), time=(10, 20, 20, 30, 5)) -> Dataset:
    return Dataset(
        name="by hand",
        log=EventLog(user, item, action, time, users=4),
        catalogue=Catalogue.from_items(SCHEMA, [7, 8, 9], ids={"category": [1, 2, 1], "tags": [[1, 0], [2, 3], [4, 0]]}),
        user_ids={"gender": np.int32([0, 1, 2, 1]), "interests": np.int32([[0, 0], [1, 2], [3, 0], [6, 5]])},
        user_floats=np.array([[0], [0.5], [1.5], [2.5]], np.float32),
        users=Vocabulary([100, 200, 300]),
        items=Vocabulary([7, 8, 9]),
    )


def test_features_of_positions_by_hand():
    data = dataset()
    features = data.user_features([3, 2, 0, 4], length=4)
    assert features.ids["gender"].tolist() == [1, 1, 1, 2]
    assert features.ids["interests"].tolist() == [[1, 2], [1, 2], [1, 2], [3, 0]]
    assert features.floats.tolist() == [[0.5], [0.5], [0.5], [1.5]]
    history = features.history
    assert history.item.tolist() == [[3, 2, 1, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert history.action.tolist() == [[3, 2, 1, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert history.age.tolist() == [[10, 10, 20, 0], [10, 0, 0, 0], [0] * 4, [0] * 4]
    assert history.mask.tolist() == [[True, True, True, False], [True, False, False, False], [False] * 4, [False] * 4]
    short = data.user_features([3, 2, 0, 4], length=2).history
    jax.tree.map(np.testing.assert_array_equal, short, jax.tree.map(lambda whole: whole[:, :2], history))
    assert features.encoding == "" and features.floats.dtype == np.float32
    assert [x.dtype for x in jax.tree.leaves(history)] == [np.int32, np.int32, np.float32, np.bool_]
    check_user_features(SCHEMA, features, batched=True)


def test_features_of_requests_by_hand():
    features = dataset().request_features([1, 1, 0, 3], [31, 20, 99, 99], length=3)
    history = features.history
    assert history.item.tolist() == [[0, 3, 2], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    # item 0: unknown, but an event
    assert history.mask.tolist() == [[True] * 3, [True, False, False], [False] * 3, [False] * 3]
    assert history.age.tolist() == [[1, 11, 11], [10, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert features.ids["gender"].tolist() == [1, 1, 0, 1]
    check_user_features(SCHEMA, features, batched=True)
    data, at = dataset(), np.arange(5)
    samples = data.user_features(at, length=3)  # a request at the time of an event equals the sample of that event
    requests = data.request_features(data.log.user[at], data.log.time[at], length=3)
    jax.tree.map(np.testing.assert_array_equal, requests, samples)


def test_no_events_at_all_and_no_length():
    data = dataset([], [], [], [])
    features = data.request_features([0, 2], [5, 5], length=3)
    assert not features.history.mask.any() and not features.history.age.any()
    assert data.user_features([], length=3).history.mask.shape == (0, 3)
    refused(ValueError, "length: expected at least 1, got 0", dataset().user_features, [0], length=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25))
def test_no_behaviour_ties_with_its_sample_or_is_later(rows):
    """Few moments, so that most events tie: against a plain loop over strictly earlier events."""
    data = dataset(*np.array(rows).T)
    log = data.log
    histories = [(data.user_features(np.arange(len(log)), length=length).history, length) for length in (2, 5)]
    for at in range(len(log)):
        earlier = [j for j in range(len(log)) if log.user[j] == log.user[at] and log.time[j] < log.time[at]][::-1]
        for history, length in histories:
            kept = earlier[:length]
            padding = [0] * (length - len(kept))
            assert history.item[at].tolist() == log.item[kept].tolist() + padding
            assert history.action[at].tolist() == log.action[kept].tolist() + padding
            assert history.age[at].tolist() == (log.time[at] - log.time[kept]).tolist() + padding
            assert history.mask[at].tolist() == [True] * len(kept) + [False] * len(padding)


KNOWN = {"user": Vocabulary([1, 2]), "item": Vocabulary([7, 8]), "category": Vocabulary(["a"])}
OTHER = Encoder(columns=Columns(), vocabularies=KNOWN)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"encoder": OTHER}, ValueError, "Dataset.encoder: expected one of this schema with these users and items"),
    ({"users": Vocabulary([1])}, ValueError, "Dataset.log.users: expected 2 rows like the vocabulary, got 4"),
    ({"items": Vocabulary([1])}, ValueError, "Dataset.catalogue: expected 2 rows like the vocabulary, got 4"),
    ({"items": Vocabulary([7, 8, 10])}, ValueError, "Dataset.items: expected the raw ids of the catalogue"),
    ({"user_ids": {}}, ValueError, "Dataset.user_ids: expected keys ['gender', 'interests'], got []"),
    ({"user_floats": np.zeros([4, 2], np.float32)}, ValueError, "Dataset.user_floats: expected shape [4, 1], got [4, 2]"),
    ({"user_floats": np.full([4, 1], np.nan, np.float32)}, ValueError, "Dataset.user_floats: expected finite values"),
    ({"log": EventLog([1], [4], [1], [1], users=4)}, ValueError, "Dataset.log.item: expected values in [0, 4), got 4"),
    ({"log": EventLog([1], [1], [4], [1], users=4)}, ValueError, "Dataset.log.action: expected values in [0, 4), got 4"),
    ({"repeats": 0.5}, ValueError, "Dataset.repeats: expected True, False, or None to estimate it from the log, got 0.5"),
])  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused(changes, error, message):
    refused(error, re.escape(message), dataclasses.replace, dataset(), **changes)


def test_whether_users_come_back_is_estimated_from_the_log():
    """User 1 has item 1 at 10 and 30, item 2 twice at 20, item 0 (unknown) twice: one of five known events is a repetition."""
    again = dataset(user=(1,) * 6 + (2,), item=(1, 2, 2, 1, 0, 0, 1), action=(1,) * 7, time=(10, 20, 20, 30, 40, 50, 5))
    assert again.repeated == 1 / 5 and again.repeats is True
    once = dataset()
    assert once.repeated == 0.0 and once.repeats is False  # user 1 and user 2 have item 2, each once
    assert dataclasses.replace(once, repeats=True).repeats is True and dataclasses.replace(once, repeats=None).repeats is False


@pytest.mark.parametrize("of_hundred, comes_back", [(0, False), (1, True), (3, True)])
def test_one_event_in_a_hundred_is_the_bound(of_hundred, comes_back):
    item = np.arange(1, 101)
    item[100 - of_hundred :] = 1
    log = EventLog(np.ones(100, int), item, np.ones(100, int), np.arange(100))
    assert repeated_share(log) == of_hundred / 100 and (repeated_share(log) >= REPEATED) == comes_back


def test_a_long_log_is_read_in_pieces_from_the_disk(tmp_path, monkeypatch):
    user, item = np.repeat(np.arange(1, 201), 50), np.random.default_rng(0).integers(1, 300, 10_000)
    log = mapped(EventLog(user, item, np.ones(10_000, int), np.tile(np.arange(50), 200)), tmp_path)
    whole = repeated_share(log)
    monkeypatch.setattr(events, "PIECES", 8)
    monkeypatch.setattr(events, "PIECE", 250)
    assert 0.05 < whole < 0.1 and repeated_share(log) != whole
    assert repeated_share(log) == pytest.approx(whole, abs=0.02)
    assert repeated_share(EventLog([1], [0], [0], [0])) == 0.0


#        user 1: times 10 20 20 20 30     user 2: nothing     user 3: times 5 5
USER = [3, 1, 1, 1, 3, 1, 1]
ITEM = [1, 2, 3, 4, 5, 6, 7]
TIME = [5, 20, 10, 20, 5, 30, 20]


def small_log() -> EventLog:
    return EventLog(USER, ITEM, [1, 2, 3, 1, 2, 3, 1], TIME, users=5)


@st.composite
def logs(draw):
    """Random logs of few users and very few moments, so that most events tie."""
    size = draw(st.integers(1, 40))

    def column(low, high):
        return draw(st.lists(st.integers(low, high), min_size=size, max_size=size))

    return EventLog(column(1, 4), column(0, 9), column(0, 3), column(-3, 6), users=6)


def test_sorts_by_user_and_time_and_keeps_the_order_of_ties():
    """Users are as many as are said, or up to the largest row."""
    log = small_log()
    assert log.user.tolist() == [1, 1, 1, 1, 1, 3, 3]
    assert log.time.tolist() == [10, 20, 20, 20, 30, 5, 5]
    assert log.item.tolist() == [3, 2, 4, 7, 6, 1, 5]
    assert log.action.tolist() == [3, 2, 1, 1, 3, 1, 2]
    assert log.offsets.tolist() == [0, 0, 5, 5, 7, 7]
    assert (len(log), log.users) == (7, 5) and EventLog([2], [1], [1], [1]).offsets.tolist() == [0, 0, 0, 1]
    assert [log.user.dtype, log.item.dtype, log.action.dtype, log.time.dtype, log.offsets.dtype] == ["i4"] * 3 + ["i8"] * 2


@settings(deadline=None, max_examples=100)
@given(logs(), st.lists(st.tuples(st.integers(0, 5), st.integers(-5, 8)), min_size=1, max_size=10))
def test_requests_at_any_time_see_strictly_earlier_events_only(log, requests):
    users, times = np.array(requests).T
    for user, time, end in zip(users, times, log.history_end_at(users, times), strict=True):
        assert end == log.offsets[user] + int(np.sum((log.user == user) & (log.time < time)))


def arrays(log: EventLog) -> dict[str, np.ndarray]:
    return {name: np.array(getattr(log, name)) for name in ("user", "item", "action", "time", "offsets")}


@pytest.mark.parametrize("block", [events.BLOCK, 1, 2, 3])  # the check must look across the seams of its blocks
@pytest.mark.parametrize("at", range(6))
def test_one_event_out_of_order_is_sorted_wherever_it_is(monkeypatch, block, at):
    monkeypatch.setattr(events, "BLOCK", block)
    log, swapped = small_log(), [0, 1, 2, 3, 4, 5, 6]
    swapped[at : at + 2] = swapped[at + 1], swapped[at]
    again = EventLog(*(arrays(log)[name][swapped] for name in events.COLUMNS), users=5)
    for name in ("user", "time", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(log, name))


def test_sorted_columns_are_not_copied(tmp_path):
    log = small_log()
    read = mapped(log, tmp_path)
    for name, array in arrays(log).items():
        np.testing.assert_array_equal(getattr(read, name), array)
    assert not read.time.flags.owndata and not read.time.flags.writeable  # mapped, not read
    assert read.history_end(np.arange(7)).tolist() == log.history_end(np.arange(7)).tolist()


@settings(deadline=None, max_examples=100)
@given(logs(), st.sampled_from([0, 0.1, 0.3]), st.sampled_from([0, 0.1, 0.3]))
def test_split_by_time_is_a_partition_in_the_order_of_time(log, validation, test):
    known = log.item > 0
    try:
        parts = split.split_by_time(log, validation=validation, test=test)
    except ValueError as error:
        assert "got none" in str(error)
        # only when the earliest moment reaches into the held-out share
        held_out, times = round(known.sum() * (validation + test)), log.time[known]
        assert not known.any() or np.sum(times == times.min()) > len(times) - held_out
        return
    assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(known).tolist()
    assert len(parts.test) >= round(known.sum() * test)
    assert len(parts.validation) + len(parts.test) >= round(known.sum() * (validation + test))
    last = -np.inf
    for part in parts:
        if len(part):
            assert log.time[part].min() > last
            last = log.time[part].max()
