"""Times: every form as integers of one unit, without overflow; what cannot be a time of that unit."""

import datetime
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aif_jax as aif
from aif_jax.encoding.times import PER_SECOND, history_order, in_unit, seconds_of
from tests.refusals import refused

NOON = 1_651_838_400  # 2022-05-06T12:00:00
TOKYO = datetime.timezone(datetime.timedelta(hours=9))


@pytest.mark.parametrize("value", [
    "2022-05-06T12:00:00.123456789", "2022-05-06 12:00:00.123456789Z", "2022-05-06T21:00:00.123456789+09:00",
    np.datetime64("2022-05-06T12:00:00.123456789"),
], ids=str)  # fmt: skip
def test_one_moment_in_every_unit(value):
    nanoseconds = NOON * 10**9 + 123_456_789
    for unit, per_second in PER_SECOND.items():
        assert int(in_unit(value, "at", unit=unit)) == nanoseconds * per_second // 10**9
        assert in_unit([value, value], "at", unit=unit).tolist() == [nanoseconds * per_second // 10**9] * 2


@pytest.mark.parametrize(("value", "seconds"), [
    (datetime.datetime(2022, 5, 6, 12), NOON), (datetime.datetime(2022, 5, 6, 21, tzinfo=TOKYO), NOON),
    (datetime.date(2022, 5, 6), NOON - 43_200), ("2022-05-06", NOON - 43_200),
    (np.datetime64("2022-05-06", "D"), NOON - 43_200), (np.datetime64("2022-05-06T12", "h"), NOON),
    (datetime.datetime(1969, 12, 31, 23, 59, 59, 500_000), -1),
])  # fmt: skip
def test_dates_and_times(value, seconds):
    for unit, per_second in PER_SECOND.items():
        assert int(in_unit(value, "at", unit=unit)) // per_second == seconds == seconds_of(value, "at", unit=unit)


@pytest.mark.parametrize("unit", PER_SECOND)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_nothing_overflows_up_to_2100(unit, dtype, tmp_path):
    last = 4_102_444_800 * PER_SECOND[unit]
    assert in_unit(np.array([last], dtype), "at", unit=unit).tolist() == [last]
    events = {"user": [1], "item": [1], "time": np.array([last], dtype)}
    columns = aif.Columns(time_unit=unit)  # type: ignore[arg-type]
    assert aif.read(events, items={"item": [1], "category": [1]}, columns=columns).log.time.tolist() == [4_102_444_800]
    assert in_unit(np.array([NOON], "datetime64[s]"), "at", unit=unit).tolist() == [NOON * PER_SECOND[unit]]


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_unsigned_times_do_not_wrap(value):
    times = np.array([NOON, value], np.uint64)
    refused(ValueError, f"at: expected a time before 2100 in 's', got {value} at position \\[1\\]", in_unit, times, "at")
    report = aif.check({"user": [1, 1], "item": [1, 1], "time": times}, items={"item": [1], "category": [1]})
    assert report.totals == {"time unit": 1} and str(value) in str(report.problems[0])


def test_dates_of_64_bits_and_far_ones():
    for type_ in (pa.date32(), pa.date64()):
        events = {"user": [1], "item": [1], "time": pa.array([datetime.date(2022, 5, 6)], type_)}
        for unit in PER_SECOND:
            columns = aif.Columns(time_unit=unit)  # type: ignore[arg-type]
            assert aif.read(events, items={"item": [1], "category": [1]}, columns=columns).log.time.tolist() == [NOON - 43_200]
    far = {"user": [1, 1], "item": [1, 1], "time": pa.array([2**61, -(2**61)], pa.timestamp("s"))}
    assert aif.check(far, columns=aif.Columns(time_unit="ns")).totals == {"time unit": 2}


@pytest.mark.parametrize(("value", "error", "message"), [
    ([None, NOON], ValueError, r"at: expected a time, got none at position \[0\]"),
    ([None, "2022-05-06"], ValueError, r"at: expected a time, got none at position \[0\]"),
    ([[NOON, 1.5], [NOON, None]], ValueError, r"at: expected a time, got none at position \[1, 1\]"),
    (None, ValueError, "at: expected a time, got none$"), (2**70, TypeError, "got dtype object"),
    (["2022-05-06", "yesterday"], ValueError, "at: expected a date and time in ISO form such as .*, got 'yesterday'"),
    ("2022-05-06.5", ValueError, "in ISO form"), ("2022-05-06T12:00:00.", ValueError, "in ISO form"),
    ("1651838400", ValueError, "in ISO form"), (True, TypeError, "got dtype bool"), (1.5, TypeError, "got dtype float64"),
    ("2101-01-01", ValueError, "expected a time before 2100"), ("1700-01-01", ValueError, "expected a time of at least"),
    (np.datetime64("2200-01-01"), ValueError, "expected a time before 2100"), (-(2**62), ValueError, "a time of at least"),
    ([20240501123000], ValueError, r"before 2100 in 's', got 20240501123000 at position \[0\], a date written as a number"),
])  # fmt: skip
def test_what_is_no_time(value, error, message):
    refused(error, message, in_unit, value, "at")


@pytest.mark.parametrize("number", [20240501, 19991231, np.int64(20240501)])
def test_a_number_that_reads_as_a_date_is_refused(number):
    date = f"{str(number)[:4]}-{str(number)[4:6]}-{str(number)[6:]}"
    for unit in "s", "ms":
        refused(ValueError, rf"got {number}, .* give '{date}' for that date, '1970-", seconds_of, number, "since", unit=unit)
    assert seconds_of(str(number), "since") == seconds_of(date, "since")
    assert seconds_of(20241301, "since") == 20241301  # there is no month 13
    events, items = {"user": [1, 1], "item": [1, 1]}, {"item": [1], "category": [1]}
    for unit, written in itertools.product(PER_SECOND, (number, 20240501123000, 202405011230)):
        report = aif.check(events | {"time": [written, written]}, items=items, columns=aif.Columns(time_unit=unit))
        assert report.totals == {"time unit": 2} and f", got {written}, a date written as a number" in str(report.problems[0])
    for unit, other in zip(PER_SECOND, (20241301, 202405012460, 20240501250000), strict=False):  # one is no date, so none is
        assert not aif.check(events | {"time": [number, other]}, columns=aif.Columns(time_unit=unit)).totals


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_the_order_is_that_of_a_plain_sort(events):
    user, time, raw, action = np.array(events, np.int64).reshape(-1, 4).T
    item, places, ids = raw % 4, np.arange(len(events)), raw.__getitem__  # of five items one is unknown, and so is 0
    assert [events[i] for i in places[history_order(time, item, action, user=user, ids=ids)]] == sorted(events)
    of_one = places[history_order(time, item, action, ids=ids)]
    assert [events[i][1:] for i in of_one] == sorted(event[1:] for event in events)
