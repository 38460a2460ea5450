"""Events of a stream: eight bytes each, merged by time, ages exact over a life."""

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import stream
from aif_jax.encoding.times import LATEST, STAMP_ZERO, stamps
from aif_jax.types import Events, Kept
from tests import demo

SCHEMA = demo.schema()


def events(time, item=None, action=None) -> Events:
    time = np.asarray(time, np.uint32)
    rows = np.arange(1, len(time) + 1, dtype=np.int32) if item is None else np.asarray(item, np.int32)
    return Events(item=rows, action=rows % SCHEMA.actions if action is None else np.asarray(action, np.int32), time=time)


def test_events_are_packed_into_a_code_and_back():
    given = events([5, 9, 0, 7], item=[49, 0, 3, 12], action=[3, 2, 1, 0])
    found = stream.unpack(SCHEMA, stream.pack(SCHEMA, given))
    assert found.item.tolist() == [49, 0, 0, 12] and found.action.tolist() == [3, 2, 0, 0]  # no event is all zeros
    assert found.time.tolist() == [5, 9, 0, 7]


def test_ids_out_of_range_count_as_unknown():
    found = stream.unpack(SCHEMA, stream.pack(SCHEMA, events([1, 2], item=[demo.ITEMS, -1], action=[99, -3])))
    assert found.item.tolist() == [0, 0] and found.action.tolist() == [0, 0]


def test_a_schema_with_too_many_pairs_is_refused():
    items = aif.Attribute(name="item", size=2**31)
    schema = aif.Schema(item_attributes=(items, aif.Attribute(name="category", size=2)), actions=3)
    with pytest.raises(ValueError, match=r"schema: expected at most 2\^32 pairs of item and action"):
        stream.check(schema)


def test_order_is_by_time_and_keeps_that_of_one_moment():
    found = stream.ordered(events([7, 0, 3, 7, 3], item=[1, 2, 3, 4, 5]))
    assert found.item.tolist() == [2, 3, 5, 1, 4] and found.time.tolist() == [0, 3, 3, 7, 7]


@pytest.mark.parametrize("length", [1, 4, 9])
def test_merging_keeps_the_most_recent_at_any_split(length):
    rng = np.random.default_rng(0)
    time = np.sort(rng.integers(1, 12, 20))
    whole = stream.pack(SCHEMA, events(time))
    last = slice(None, -length - 1, -1)
    for cuts in ([20], [1] * 20, [7, 13], [0, 5, 0, 15]):
        kept, at = stream.empty(length), 0
        for count in cuts:
            part = jax.tree.map(lambda leaf, at=at, count=count: leaf[at : at + count], whole)
            kept, at = stream.merge(kept, part), at + count
        assert kept.time.tolist() == time[last].tolist() and kept.code.tolist() == whole.code[last].tolist(), cuts


def test_a_late_event_takes_its_place_and_one_too_old_none():
    kept = stream.merge(stream.empty(3), Kept(code=np.array([1, 2, 3], np.uint32), time=np.array([10, 20, 30], np.uint32)))
    late = stream.merge(kept, Kept(code=np.array([9], np.uint32), time=np.array([20], np.uint32)))
    assert late.code.tolist() == [3, 9, 2] and late.time.tolist() == [30, 20, 20]  # of one moment, the last that came is first
    old = stream.merge(kept, Kept(code=np.array([9], np.uint32), time=np.array([5], np.uint32)))
    assert old.code.tolist() == [3, 2, 1]


def test_ages_are_exact_over_a_life():
    now = stamps(LATEST)
    for seconds in (0, 1, 3_000_000_000 // 3, 2**31 + 12_345):
        assert int(stream.age(now, stamps(LATEST - seconds))) == np.float32(seconds)
    assert stream.age(np.uint32(5), np.array([0, 5, 7], np.uint32)).tolist() == [0, 0, 0]


def test_stamps_refuse_what_they_cannot_hold():
    assert stamps([STAMP_ZERO + 1, LATEST]).tolist() == [1, 2**32 - 1]
    for bad in (STAMP_ZERO, LATEST + 1):
        with pytest.raises(ValueError, match=rf"times: expected seconds in .*, got {bad} at position \[1\]"):
            stamps([0, bad])


def test_a_history_becomes_a_stream_with_its_ages():
    past = demo.history(24, 20)
    found = stream.events_of(past)
    kept = stream.merge(stream.empty(24), stream.pack(SCHEMA, found))
    back = stream.history(SCHEMA, kept, stream.FULL_NOW)
    np.testing.assert_array_equal(back.item, past.item)
    np.testing.assert_array_equal(back.action, past.action)
    np.testing.assert_array_equal(back.mask, past.mask)
    np.testing.assert_array_equal(back.age, np.floor(past.age))


def test_ages_beyond_all_times_are_the_oldest():
    past = aif.Behaviours(
        item=np.ones(2, np.int32),
        action=np.ones(2, np.int32),
        age=np.array([1, np.finfo(np.float32).max]),
        mask=np.ones(2, bool),
    )
    assert stream.events_of(past).time.tolist() == [2**32 - 1 - int(stream.OLDEST), 2**32 - 2]
