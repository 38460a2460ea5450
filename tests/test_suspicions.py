"""What `read` accepts and is seldom meant: `check` names it, `read` logs it; a profile; and both agree on what is a problem."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aif_jax as aif
from aif_jax.encoding.encoder import Encoder, bulk_of, scale_of
from aif_jax.readers import encode_items
from tests.refusals import refused

COLUMNS = aif.Columns(
    action="event", actions=("view", "buy"), item_attributes=("brand",), item_bags=("tags",), item_floats=("price",),
    side=("bid",), user_attributes=("city",), user_floats=("age",),
)  # fmt: skip
EVENTS, ITEMS, USERS = 3000, 120, 60


def tables(seed: int = 0) -> dict[str, dict[str, list]]:
    """Clean data: nothing in it is suspicious."""
    rng = np.random.default_rng(seed)
    events = {
        "user": rng.integers(0, USERS, EVENTS),
        "item": rng.integers(0, ITEMS, EVENTS),
        "time": 1_600_000_000 + rng.permutation(10**6)[:EVENTS],  # no two of one moment
        "event": rng.choice(["view", "buy"], EVENTS),
    }
    items = {
        "item": np.arange(ITEMS),
        "category": [f"Category {i % 8}" for i in range(ITEMS)],
        "brand": [None if i % 10 == 0 else f"brand {i % 7}" for i in range(ITEMS)],
        "tags": ["|".join(f"tag {j}" for j in range(i % 4)) or None for i in range(ITEMS)],
        "price": rng.lognormal(3, 1, ITEMS),
        "bid": rng.uniform(0, 1, ITEMS),
    }
    users = {"user": np.arange(USERS), "city": [f"city {i % 5}" for i in range(USERS)], "age": rng.uniform(18, 80, USERS)}
    named = {"events": events, "items": items, "users": users}
    return {name: {c: np.asarray(v).tolist() for c, v in table.items()} for name, table in named.items()}


def put(table: str, column: str, values: dict):
    """A change of some rows of a column."""

    def spoil(data):
        for row, value in values.items():
            data[table][column][row] = value

    return spoil


def read_twice(data):
    data["events"] = {name: values * 2 for name, values in data["events"].items()}


ONE_OUTLIER = put("items", "price", {7: 1e12})
TAGS = {9 + at: "|".join(f"tag {j % 3}" for j in range(n)) for at, n in enumerate((9, 8, 30))}
CASES = [
    (read_twice, "duplicate event", None, r"3,000 of 6,000 events, such as row 3001 \(as row 1\), .*; is a file there twice"),
    (put("events", "time", {7: 1_900_000_000 * 2, 9: 4_000_000_000}), "future event", "time",
     r"more than 24 hours after now, .{19}: 2 of 3,000 events, the last at 2096-10-02T07:06:40"),
    (put("items", "tags", TAGS), "cut bag", "tags", "2 of 120 rows have more values than Columns.bag_length=8 keeps"),
    (ONE_OUTLIER, "outlier", "price", r"far above \S+: 1 of 120 values, such as 1e\+12; the first is in row 8"),
    (put("users", "age", {7: -1e9, 20: -2e9}), "outlier", "age",
     r"far below \S+: 2 of 60 values, such as -2e\+09; the first is in row 8"),
]  # fmt: skip


def run(data, columns=COLUMNS, **options):
    return aif.check(data["events"], items=data["items"], users=data["users"], columns=columns, **options)


def read(data, columns=COLUMNS):
    return aif.read(data["events"], items=data["items"], users=data["users"], columns=columns)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_suspicious_in_clean_data(seed, caplog):
    report = run(tables(seed))
    assert report.clean and report.suspicions == []
    read(tables(seed))
    assert caplog.text == ""


@pytest.mark.parametrize(("spoil", "kind", "column", "got"), CASES)
def test_each_suspicion_is_named_by_check_and_logged_by_read(spoil, kind, column, got, caplog):
    """Each alone: it hides no other, and brings no other. None is a problem."""
    data = tables()
    spoil(data)
    report = run(data)
    assert report.clean and {(s.kind, s.column) for s in report.suspicions} == {(kind, column)}
    for suspicion in report.suspicions:
        assert f"suspicion: {suspicion}" in str(report).splitlines()
    assert re.search(got, report.suspicions[0].got), report.suspicions[0].got
    assert read(data).log is not None
    logged = [record for record in caplog.records if record.name == "aif_jax.readers.read"]
    assert len(logged) == len(report.suspicions) and all(record.levelname == "WARNING" for record in logged)
    assert f"{kind}: " in caplog.text


def test_one_event_of_a_second_file_again(tmp_path):
    data = tables()
    (tmp_path / "events").mkdir()
    pq.write_table(pa.table(data["events"]), tmp_path / "events" / "1.parquet")
    pq.write_table(pa.table({name: values[4:5] for name, values in data["events"].items()}), tmp_path / "events" / "2.parquet")
    (suspicion,) = run(data | {"events": tmp_path / "events"}).suspicions
    first = f"row 1 of {tmp_path / 'events' / '2.parquet'} (as row 5 of {tmp_path / 'events' / '1.parquet'})"
    assert f"1 of 3,001 events, such as {first}" in suspicion.got and "twice" not in suspicion.got


def test_profile_by_hand():
    events = {"user": [1, 1, 1, 2], "item": [7, 8, 8, 9], "time": [1_600_000_000, 1_600_000_060, 1_600_000_060, 1_700_000_000]}
    items = {"item": [7, 8], "category": ["tea", "cup"], "price": [1.0, 3.0]}
    report = aif.check(events, items=items, columns=aif.Columns(item_floats=("price",)))
    *_, profile, summary = str(report).splitlines()
    assert summary.startswith("1 problem, 1 suspicion (items: 2 rows, events: 4 rows")
    assert profile == f"profile: {report.profile}" and "4 events, 2 users, 2020-09-13 to 2023-11-14; " in profile
    assert "events of a user: median 2, at most 3" in profile


def wrong(draw) -> dict[str, dict[str, list]]:
    data = tables()
    data["events"] = {name: values[:40] for name, values in data["events"].items()}
    values = {
        "user": [None, -1, 99], "item": [None, -7, 999], "time": [None, 1_600_000_000_000, -(2**62) - 1], "event": [None, "?"],
        "category": [None], "price": [None, float("nan"), float("inf"), 1e12], "brand": [None], "age": [None, -1e9],
    }  # fmt: skip
    for _ in range(draw(st.integers(0, 4))):
        table = data[draw(st.sampled_from(sorted(data)))]
        column = draw(st.sampled_from(sorted(set(table) & set(values))))
        row = draw(st.integers(0, len(table[column]) - 1))
        table[column][row] = draw(st.sampled_from([*values[column], table[column][0]]))
    return data


@settings(max_examples=60, deadline=None)
@given(data=st.composite(wrong)())
def test_read_refuses_what_check_calls_a_problem_and_nothing_else(data):
    report = run(data)
    try:
        read(data)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    assert bool(said) != report.clean
    for kind in report.totals:  # no kind hides another, in the report or in the error
        assert f": {kind}: " in said and f"\n{kind}: {report.totals[kind]:,}\n" in f"\n{report}\n"


def test_a_thousand_of_one_kind_hide_no_other():
    data = tables()
    data["events"]["time"][:1000] = [None] * 1000
    data["events"]["event"][2500] = None
    report = run(data, cap=3)
    kinds = [(p.kind, p.row, p.column) for p in report.problems]
    assert kinds == [("null", 1, "time"), ("null", 2, "time"), ("null", 3, "time")] and report.totals == {"null": 1001}
    refused(ValueError, "cap: expected at least 1 problem of a kind, got 0", run, data, cap=0)
    data["events"]["event"][2600] = "look"
    assert "\n  and 996 more\nunknown action: 1\n" in str(run(data)) and "null: 1,001\n" in str(run(data))
    with pytest.raises(ValueError) as error:
        read(data)
    lines = str(error.value).splitlines()
    assert len(lines) == 6 and lines[-1] == "(1002 problems in all; `aif-jax check` lists them)"
    assert "unknown action: expected one of 'view', 'buy' (read(unknown='skip') accepts others), got 'look'" in lines[1]


def test_a_scale_is_that_of_the_values_without_outliers():
    plain = np.random.default_rng(0).uniform(1, 100, 1000).astype(np.float32)
    assert scale_of(plain) == (float(np.float32(plain.mean(dtype=np.float64))), float(np.float32(plain.std(dtype=np.float64))))
    spoilt = plain.copy()
    spoilt[7] = 1e12
    mean, deviation, low, high = scale_of(spoilt)
    assert mean == pytest.approx(plain.mean(), rel=0.02) and deviation == pytest.approx(plain.std(), rel=0.05)
    assert low < plain.min() and plain.max() < high < 1000 and (low, high) == bulk_of(spoilt)
    flags = np.zeros(5000, np.float32)
    flags[:3] = 1
    assert scale_of(flags) == (float(np.float32(flags.mean(dtype=np.float64))), float(np.float32(flags.std(dtype=np.float64))))
    assert np.isfinite(scale_of(np.float32([-3.4e38, -3e38, 3e38, 3.4e38] * 10))).all()


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=40), repeats=st.integers(1, 60))
def test_a_scale_bounds_what_training_reads(values, repeats):
    """Scaled values of clipped columns stay within what so many values can deviate; none is NaN."""
    array = np.repeat(np.float32(values), repeats)
    scale = scale_of(array)
    assert len(scale) in (2, 4) and np.isfinite(scale).all() and scale[1] > 0
    low, high = scale[2:] if len(scale) == 4 else (-np.inf, np.inf)
    outside = (array < low) | (array > high)
    beyond = int(0.05 * (len(array) - 1)) + 1  # values beyond the quantile of either side
    assert outside.sum() <= 2 * beyond and (len(scale) == 2) == (not outside.any())
    scaled = (np.clip(array, np.float32(low), np.float32(high)).astype(np.float64) - scale[0]) / scale[1]
    assert np.abs(scaled).max() <= np.sqrt(len(array)) * 1.01 + 1e-3


def test_an_outlier_flattens_no_scale_and_is_clipped_where_it_is_encoded(tmp_path):
    data = tables()
    clean = read(data)
    ONE_OUTLIER(data)
    spoilt = read(data)
    one, two = (d.encoder.scales["item/price"] for d in (clean, spoilt))
    assert two[1] == pytest.approx(one[1], rel=0.5) and len(two) == 4
    floats = spoilt.catalogue.items.floats[1:, 0]
    assert np.std(np.delete(floats, 7)) > 0.5 and np.abs(floats).max() < 12  # before: 1e-8, and 11 of one item
    _, item = encode_items({name: values[7:8] for name, values in data["items"].items()}, spoilt.encoder)
    assert item.floats.tolist() == [[floats[7]]]
    again = Encoder.from_record(json.loads(json.dumps(spoilt.encoder.to_record())), spoilt.encoder.to_arrays())
    assert again.version == spoilt.encoder.version and again.scales == spoilt.encoder.scales
