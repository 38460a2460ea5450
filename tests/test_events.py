"""EventLog: sorting, history ends, windows, mapped columns; and that nothing leaks from the future or from a tie."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.data import events, split
from aif_jax.data.events import EventLog
from tests.test_sampling import mapped

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
    ends = log.history_end_at(users, times)
    for user, time, end in zip(users, times, ends, strict=True):
        earlier = int(np.sum((log.user == user) & (log.time < time)))
        assert end == log.offsets[user] + earlier


def arrays(log: EventLog) -> dict[str, np.ndarray]:
    return {name: np.array(getattr(log, name)) for name in ("user", "item", "action", "time", "offsets")}


@pytest.mark.parametrize("block", [events.BLOCK, 1, 2, 3])  # the check must look across the seams of its blocks
@pytest.mark.parametrize("at", range(6))
def test_one_event_out_of_order_is_sorted_wherever_it_is(monkeypatch, block, at):
    monkeypatch.setattr(events, "BLOCK", block)
    log = small_log()
    swapped = [0, 1, 2, 3, 4, 5, 6]
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
        held_out = round(known.sum() * (validation + test))
        times = log.time[known]
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
