"""Your Parquet and CSV files: reading, what a wrong file gets, tomorrow's files, items for an index."""

import dataclasses
import gzip
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aif_jax
from aif_jax import readers
from aif_jax.encoding.columns import Columns
from aif_jax.readers import encode_items, read_items, tables
from tests.refusals import refused

PACKAGE = Path(aif_jax.__file__).parent
COLUMNS = Columns(
    user="uid", item="sku", time="at", time_unit="ms", action="event", actions=("view", "buy"), category="group",
    item_attributes=("brand",), item_bags=("tags",), bag_length=2, item_floats=("price",), side=("bid",), content="vector",
    behaviour_fields=("brand",), user_attributes=("country",), user_floats=("age",), user_id=True, item_key="id", scale=False,
)  # fmt: skip
ACTIONS = ["buy", "view", "view", "buy"]
EVENTS = {"uid": ["b", "a", "b", "a"], "sku": [30, 10, 10, 20], "at": [5_000, 3_999, 4_000, 7_000], "event": ACTIONS}
ITEMS = {
    "id": [20, 10, 30],
    "group": ["tea", "cup", "tea"],
    "brand": ["x", None, "y"],
    "tags": [["hot", "new", "red"], [], None],
    "price": [1.5, 2.0, -1.0],
    "bid": [3.0, 4.0, 5.0],
    "vector": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
}
USERS = {"uid": ["a", "b", "c"], "country": ["DE", "FR", None], "age": [0.1, 0.2, 0.3]}


def parquet(folder, **tables):
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def csv(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path):
    return parquet(tmp_path, events=EVENTS, items=ITEMS, users=USERS)


def paths(folder):
    return {name: folder / f"{name}.parquet" for name in ("events", "items", "users")}


def read(columns=COLUMNS, *, events=EVENTS, items=ITEMS, users=USERS, **options):
    return readers.read(events, items=items, users=users, columns=columns, **options)


def test_everything_arrives_in_its_place(folder):
    data = read(**paths(folder))
    assert data.name == "events" and data.users.raw.tolist() == ["a", "b", "c"] and data.items.raw.tolist() == [10, 20, 30]
    log, catalogue = data.log, data.catalogue
    assert (log.user.tolist(), log.item.tolist()) == ([1, 1, 2, 2], [1, 2, 1, 3])
    assert log.time.tolist() == [3, 7, 4, 5]  # seconds, cut
    assert log.action.tolist() == [1, 2, 1, 2] and data.schema.actions == 3
    assert catalogue.items.ids["category"].tolist() == [0, 1, 2, 2]  # cup, tea
    assert catalogue.items.ids["brand"].tolist() == [0, 0, 1, 2]
    assert catalogue.items.ids["tags"].tolist() == [[0, 0], [0, 0], [1, 2], [0, 0]]  # two; "red" stays in the vocabulary
    assert catalogue.items.floats.tolist() == [[0], [2], [1.5], [-1]]
    assert catalogue.items.side["bid"].tolist() == [0, 4, 3, 5]
    assert catalogue.items.content.tolist() == [[0, 0], [3, 4], [1, 2], [5, 6]]
    assert data.user_ids["user"].tolist() == [0, 1, 2, 3] and data.user_ids["country"].tolist() == [0, 1, 2, 0]
    assert data.user_floats.tolist() == [[0], [np.float32(0.1)], [np.float32(0.2)], [np.float32(0.3)]]
    assert data.schema.behaviour_fields == ("item", "category", "brand")
    assert data.encoder.scales == {} and data.user_features([1], length=2).encoding == data.encoder.version


def test_csv_gives_the_same_as_parquet(tmp_path):
    text = {
        "events": "uid,sku,at,event\nb,30,5000,buy\na,10,3999,view\nb,10,4000,view\na,20,7000,buy\n",
        "items": 'id,group,brand,tags,price,bid\n20,tea,x,hot||new|red|,1.5,3\n10,cup,,|,2,4\n30,"tea",y,,-1,5\n',
        "users": "uid,country,age\na,DE,.1\nb,FR,2e-1\nc,,0.3\n",
    }
    csv(tmp_path, **text)
    columns = Columns(**{**vars(COLUMNS), "content": None})
    data = readers.read(tmp_path / "events.csv", items=tmp_path / "items.csv", users=tmp_path / "users.csv", columns=columns)
    assert data.digest == read(columns, items=ITEMS | {"tags": ["|hot|||new|red||", "", "||"]}).digest == read(columns).digest


def test_a_folder_gzip_and_tabs_will_do(tmp_path):
    (tmp_path / "events").mkdir()
    with gzip.open(tmp_path / "events" / "1.csv.gz", "wt") as file:
        file.write("user,item,time\n1,7,20\n")
    (tmp_path / "events" / "2.csv").write_text("user,item,time\n1,8,30\n2,8,10\n")
    (tmp_path / "items.tsv").write_text("item\tcategory\n7\ttea, green\n8\tcup\n")
    data = readers.read(tmp_path / "events", items=tmp_path / "items.tsv", columns=Columns())
    assert data.log.item.tolist() == [1, 2, 2] and data.catalogue.items.ids["category"].tolist() == [0, 2, 1]


def test_what_a_writer_has_not_finished_is_left_out(tmp_path):
    """Hidden files, and files and folders that begin with "_": half-written parts of a job, its marks. Others are refused."""
    given = {"items": {"item": [7], "category": [1]}, "columns": Columns()}
    for user, name in enumerate(("1.csv", "_temporary/0/2.csv", ".3.csv", "day=1/_4.csv", "day=1/5.csv", "_SUCCESS", "6.CSV")):
        (tmp_path / "events" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "events" / name).write_text(f"user,item,time\n{user},7,20\n")
    refused(ValueError, r"expected files .* got \['6.CSV'\]", readers.read, tmp_path / "events", **given)
    (tmp_path / "events" / "6.CSV").unlink()
    (tmp_path / "events" / "7.csv").write_text("user,item,time\n")  # a day without events
    assert readers.read(tmp_path / "events", **given).users.raw.tolist() == [0, 4]
    assert len(readers.read(tmp_path / "events" / "_temporary", **given).log) == 1  # the folder itself may have any name
    given["columns"] = Columns(time="day")
    hive = r"5.csv, column 'day': missing column: .*; of day=... in its path, give pyarrow.dataset.dataset\(FOLDER"
    refused(ValueError, hive, readers.read, tmp_path / "events" / "day=1", **given)


def test_a_missing_category_is_unknown(tmp_path):
    """Null in Parquet, nothing in CSV, None in a request: row 0, as in other attributes."""
    events = {"user": [1, 1], "item": [7, 8], "time": [10, 20]}
    csv(tmp_path, items="item,category\n7,\n8,tea\n9,\n")
    for items in (tmp_path / "items.csv", {"item": [7, 8, 9], "category": [None, "tea", None]}):
        data = readers.read(events, items=items, columns=Columns())
        assert data.catalogue.items.ids["category"].tolist() == [0, 0, 1, 0]
        assert encode_items({"item": [7, 8], "category": [None, "tea"]}, data.encoder)[1].ids["category"].tolist() == [0, 1]
    none = readers.read(events, items={"item": [7, 8], "category": [None, None]}, columns=Columns())
    assert none.catalogue.items.ids["category"].tolist() == [0, 0, 0]


def test_a_file_without_a_header_is_asked_for_one(tmp_path):
    csv(tmp_path, events="1,7,20\n1,8,30\n", items="item,category\n7,tea\n8,cup\n")
    with pytest.raises(ValueError) as error:
        readers.read(tmp_path / "events.csv", items=tmp_path / "items.csv", columns=Columns())
    text = str(error.value)
    assert "expected the columns 'user', 'item', 'time' in the first line, got '1', '7', '20'; has the file a header?" in text
    assert text.endswith("which takes column_names and a delimiter") and text.count("has the file a header") == 1


@pytest.mark.parametrize(("times", "unit", "seconds"), [
    (pa.array([1_500_000_000], pa.int32()), "s", 1_500_000_000),
    (pa.array([-1]), "ms", -1),  # the second before 1970 began
    (pa.array([1_500_000_000_999], pa.timestamp("ms")), "s", 1_500_000_000),
    (pa.array([-1], pa.timestamp("ns", "UTC")), "s", -1),
])  # fmt: skip
def test_times(times, unit, seconds):
    events = {"user": ["a"], "item": [1], "time": times}
    data = readers.read(events, items={"item": [1], "category": [1]}, columns=Columns(time_unit=unit))
    assert data.log.time.tolist() == [seconds]


def test_files_of_different_units_are_ordered_in_the_unit_of_the_columns(tmp_path):
    (tmp_path / "events").mkdir()
    parquet(tmp_path, items={"item": [1, 2], "category": [1, 1]})

    def log(milliseconds, unit="ns"):
        files = ("1", 2, milliseconds, "ms"), ("2", 1, 7_000_000_001, "ns")
        for name, item, time, given in files:
            events = {"user": ["a"], "item": [item], "time": pa.array([time], pa.timestamp(given))}
            parquet(tmp_path / "events", **{name: events})
        return readers.read(tmp_path / "events", items=tmp_path / "items.parquet", columns=Columns(time_unit=unit)).log

    assert log(7_000).item.tolist() == [2, 1] and log(7_000).time.tolist() == [7, 7]  # a nanosecond apart
    assert log(7_000, "s").item.tolist() == [1, 2]  # of one second, as for a request whose times are seconds
    refused(ValueError, "expected times of at least 1823-11-12 .* in 'ms', got 1600-01-01 00:00:00", log, -11_676_096_000_000)
    assert readers.check(tmp_path / "events", items=tmp_path / "items.parquet", columns=Columns()).totals == {"time unit": 1}


def test_parts_of_seconds_may_come_after_the_block_that_tells_the_type(tmp_path):
    rows = "1,1,2017-11-25 00:00:10\n" * 50_000 + "2,1,2017-11-25 00:00:05.750000001\n"
    csv(tmp_path, events=f"user,item,time\n{rows}", items="item,category\n1,1\n")
    data = readers.read(tmp_path / "events.csv", items=tmp_path / "items.csv", columns=Columns(time_unit="ms"))
    assert data.log.time.tolist() == [1511568010] * 50_000 + [1511568005]
    zoned, either = "1,1,2017-11-25T00:00:10Z\n", "a whole number, or a date and time, all of them with a zone or none"
    given = {"items": tmp_path / "items.csv", "columns": Columns()}
    for lines, expected in ((zoned + rows, either), (rows + zoned, "a date and time from 1823 to 2099, without a zone")):
        csv(tmp_path, events=f"user,item,time\n{lines}")
        refused(ValueError, f"expected {expected}, got '2017-11-25T00:00:10Z'", readers.read, tmp_path / "events.csv", **given)


@pytest.mark.parametrize("count", [2, tables.ROWS + 2])
def test_lists_of_numbers_that_begin_with_none_are_named(count):
    content = pa.array([None] * count + [[0.5, 1.0]] * (count > 2), pa.list_(pa.float32()))
    items = {"item": range(len(content)), "category": [1] * len(content), "content": content}
    given = {"items": items, "columns": Columns(content="content")}
    events = {"user": [1], "item": [1], "time": [1_600_000_000]}
    assert readers.check(events, **given).totals == {"null": count}
    message = "^items, row 1, column 'content': null: expected a list of numbers, got nothing"
    refused(ValueError, message, readers.read, events, **given)


@pytest.mark.parametrize(("text", "actions", "spell"), [
    ((), (), None), (("vip", "kind"), (), None), (("vip", "kind"), ("false", "true"), None), ((), (1, 0), None),
    ((), (), str.lower), ((), (), str), ((), (), str.upper), ((), ("False", "True"), str),
])  # fmt: skip
def test_booleans_are_the_same_in_a_file_and_in_a_call(tmp_path, text, actions, spell):
    """As numbers, as text and in every CSV; and a column of items may have the name of the position's."""
    kinds = [True, False, True, True, False]
    events = {"user": [1, 1, 2, 2, 2], "item": [7, 8, 7, 8, 7], "time": [10, 20, 30, 40, 50], "at": [1] * 5}
    columns = Columns(action="kind", actions=actions, text=text, user_attributes=("vip",), item_floats=("at",), position="at")
    items = {"item": [7, 8], "category": [1, 1], "at": [0.5, 2.0]}
    given = {"events": events | {"kind": kinds}, "users": {"user": [1, 2], "vip": [True, False]}}
    if spell is not None:
        for name, table in given.items():
            rows = [",".join(spell(str(value)) for value in row) for row in zip(*table.values(), strict=True)]
            csv(tmp_path, **{name: "\n".join([",".join(table), *rows])})
        given = {name: tmp_path / f"{name}.csv" for name in given}
    data = readers.read(**given, items=items, columns=columns)
    assert data.log.action.tolist() == data.encoder.action_rows(kinds).tolist() in ([2, 1, 2, 2, 1], [1, 2, 1, 1, 2])
    for user, (at, vip) in {1: (slice(2), True), 2: (slice(2, 5), np.False_)}.items():
        past = {name: column[at] for name, column in (events | {"kind": kinds}).items()}
        frame = type("Frame", (dict,), {"schema": None})(past)  # as Polars has one
        features = data.encoder.user({"user": user, "vip": vip}, frame, now=60)
        row, end = list(data.users.raw).index(user) + 1, len(past["time"])
        np.testing.assert_array_equal(features.history.action[:end], data.log.action[data.log.user == row][::-1])
        assert features.ids["vip"] == data.user_ids["vip"][row] > 0
    _, encoded = readers.encode_items(items, data.encoder)
    np.testing.assert_array_equal(encoded.floats, data.catalogue.features(np.array([1, 2])).floats)


def test_of_an_item_that_is_shown_twice_in_a_list_the_largest_place_counts():
    events = {"user": [1] * 4, "item": [7, 7, 8, 8], "time": [5] * 4, "kind": [1, 2, 1, 2], "at": [None, 4, 8, 3]}
    columns = Columns(action="kind", position="at")
    data = readers.read(events, items={"item": [7, 8, 9], "category": [1, 1, 1]}, columns=columns)
    assert data.display_positions_of([0], np.array([[1, 2, 3, 0]])).tolist() == [[4, 8, 0, 0]]


def test_what_a_dictionary_lists_and_no_row_has_is_no_id_and_booleans_and_large_integers_are_numbers():
    listed = pa.DictionaryArray.from_arrays([0, 1], pa.array(["a", "b", "c"], pa.string_view()))
    items = {"item": listed, "category": [True, False], "shop": pa.array([2**64 - 1, 7], pa.uint64()), "since": [10**18 + 1, 7]}
    names = pa.array(["a", "b"], pa.string_view())  # as of Polars; decimals as of a database
    events = {"user": pa.array([str(2**63)] * 2).cast(pa.decimal128(38)), "item": names, "time": [1, 2]}
    items["tags"] = pa.ListArray.from_arrays([0, 1, 2], listed)
    columns = Columns(item_floats=("since",), item_attributes=("shop",), item_bags=("tags",), text=("shop", "user"))
    data = readers.read(events, items=items, columns=columns)
    assert data.items.raw.tolist() == ["a", "b"] and np.ptp(data.catalogue.features(np.array([1, 2])).floats) > 1
    assert [data.catalogue.items.ids[name].T.ravel()[:3].tolist() for name in ("category", "tags")] == [[0, 2, 1], [0, 1, 2]]
    assert [data.encoder.vocabularies[name].raw.tolist() for name in ("shop", "user")] == [[str(2**64 - 1), "7"], [str(2**63)]]
    assert data.encoder.user(None, pa.table(events), 3).history.mask.sum() == 2
    refused(ValueError, "unknown item: .* got 'c'", readers.read, events | {"item": ["a", "c"]}, items=items, columns=columns)
    nobody = pa.array(["ann", None]).dictionary_encode(null_encoding="encode")  # null is one of the values
    assert readers.check(events | {"user": nobody}, columns=columns).totals == {"null": 1}
    assert readers.check(events | {"user": ["ann", ""]}, columns=columns).totals == {"null": 1}  # as in text files


def test_tomorrows_files_keep_todays_rows(caplog):
    today = read()
    encoder = type(today.encoder).from_record(today.encoder.to_record(), today.encoder.to_arrays())
    data = read(None, events={name: values[:1] for name, values in EVENTS.items()}, encoder=encoder)
    assert data.schema == today.schema and len(data.log) == 1 and data.log.item.tolist() == [3]
    assert np.array_equal(data.catalogue.items.ids["brand"], today.catalogue.items.ids["brand"])
    assert data.encoder.version == today.encoder.version and "not in the file" not in caplog.text
    fewer = read(None, items={name: values[:2] for name, values in ITEMS.items()}, encoder=encoder)
    assert fewer.catalogue.items.ids["category"].tolist() == [0, 1, 2, 0]  # item 30 has events, and no line
    assert "items: 1 items that the encoder knows are not in the file" in caplog.text
    fewer = read(None, users={name: values[1:] for name, values in USERS.items()}, encoder=encoder)
    assert len(fewer.log) == 4 and fewer.user_ids["country"].tolist() == [0, 0, 2, 0]  # user a has events, and no line
    assert "users: 1 users that the encoder knows are not in the file, and are read without attributes and" in caplog.text

    new, events = ({name: [*values, values[0]] for name, values in table.items()} for table in (ITEMS, EVENTS))
    new |= {"id": [20, 10, 30, 99], "brand": ["x", "z", "y", "x"]}
    given = {"events": events | {"uid": [*EVENTS["uid"], "stranger"]}, "items": new, "encoder": encoder}
    refused(ValueError, r"row 4, .* item: .* the 3 known \(.* adds those of the items file\), got 99", read, **given)
    data = read(**given, unknown="skip")
    assert data.schema == today.schema and len(data.log) == 4  # without the stranger's event
    assert data.catalogue.items.ids["brand"].tolist() == [0, 0, 1, 2]  # "z" is unknown


def test_text_ids_stay_text_where_tomorrows_file_has_digits_only(tmp_path):
    csv(tmp_path, events="user,item,time\nann,x,5\n", items="item,category\n7,tea\n07,cup\nx,cup\n")
    today = readers.read(tmp_path / "events.csv", items=tmp_path / "items.csv", columns=Columns())
    assert today.items.raw.tolist() == ["07", "7", "x"]
    csv(tmp_path, events="user,item,time\nann,7,5\nann,07,6\n", items="item,category\n7,tea\n")
    data = readers.read(tmp_path / "events.csv", items=tmp_path / "items.csv", encoder=today.encoder)
    assert data.log.item.tolist() == [2, 1]


def test_skipping_is_told(caplog):
    events = {name: [*values, values[0]] for name, values in EVENTS.items()} | {"sku": [30, 10, 10, 20, 77]}
    log = read(events=events, unknown="skip").log
    assert log.item.tolist() == [1, 2, 1, 3, 0]  # an event with an unknown item stays in its user's history, as in serving
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == ["events: 1 values left out or left unknown: unknown item"]


def test_floats_are_scaled_as_they_were_in_training():
    data = read(Columns(**{**vars(COLUMNS), "scale": True}))
    price = np.float32([2, 1.5, -1])
    assert data.encoder.scales["item/price"] == (float(price.mean()), float(price.std()))
    assert data.encoder.scales["user/age"] == pytest.approx((0.2, np.sqrt(0.02 / 3)))
    np.testing.assert_allclose(data.catalogue.items.floats[1:, 0], (price - price.mean()) / price.std(), rtol=1e-6)
    assert data.catalogue.items.floats[0] == 0 and data.user_floats[0] == 0
    np.testing.assert_allclose(data.user_floats[1:].mean(), 0, atol=1e-6)
    assert data.catalogue.items.side["bid"].tolist() == [0, 4, 3, 5]  # as they are
    again = read(None, items=ITEMS | {"price": [100.0, 2.0, -1.0]}, encoder=data.encoder)
    assert again.catalogue.items.floats[1, 0] == data.catalogue.items.floats[1, 0]


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"user": [2**63]}, TypeError, "events, column 'user': expected values that Arrow holds, got others: Python int too large"),
    ({"time": [True]}, ValueError, "events, column 'time': wrong type: expected whole numbers or timestamps, got bool"),
    ({"item": ["a", 7]}, TypeError, "events, column 'item': expected values that Arrow holds, got others"),
    ({"time": [5, 6]}, ValueError, "events: expected columns of one length, got {'user': 1, 'item': 1, 'time': 2}"),
    ({"time": [np.True_, 5]}, TypeError, "events, column 'time': expected values of one kind, got booleans among others"),
    ({"user": [True]}, ValueError, "events, column 'user': wrong type: expected integers or text, got bool"),
    ({"user": None}, TypeError, "events, column 'user': expected a list or an array, got None"),
])  # fmt: skip
def test_what_arrow_does_not_hold_or_is_no_time_is_refused_in_memory(changes, error, message):
    events = {"user": [1], "item": [7], "time": [1_600_000_000]}
    given = {"items": {"item": [7], "category": ["a"]}, "columns": Columns()}
    refused(error, re.escape(message), readers.read, events | changes, **given)


def test_tables_in_memory_give_the_same_as_files(folder):
    whole = read(**paths(folder))
    tables = {"events": EVENTS, "items": ITEMS, "users": USERS}
    arrow = {name: pa.table(columns) for name, columns in tables.items()}
    numpy = tables | {"events": {name: np.array(values) for name, values in EVENTS.items()}}
    numpy["items"] = ITEMS | {"vector": np.array(ITEMS["vector"], np.float32)}
    stream = arrow | {"events": pa.RecordBatchReader.from_batches(arrow["events"].schema, arrow["events"].to_batches())}
    for given in (tables, arrow, numpy, stream):
        data = read(**given)
        assert data.digest == whole.digest and data.name == "events"
    refused(TypeError, "events: expected a path, a mapping of columns or an Arrow table, got list", read, events=[1])


def test_distinct_values_that_grow_over_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 16)
    monkeypatch.setattr(tables, "MERGE_AT", 20)
    rng = np.random.default_rng(1)
    items = np.array([f"item {number:03d}" for number in range(200)])
    user, item = rng.integers(10**12, 10**12 + 99, 1000), items[rng.integers(0, 200, 1000)]
    events = {"user": user, "item": item, "time": np.arange(1000)}
    data = readers.read(events, items={"item": items, "category": np.arange(200) % 7}, columns=Columns())
    order = np.lexsort((events["time"], events["user"]))
    assert np.array_equal(data.items.raw[data.log.item - 1], events["item"][order])
    assert np.array_equal(data.users.raw[data.log.user - 1], events["user"][order])


def test_items_for_an_index_equal_the_catalogue(folder, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 2)
    data = read(Columns(**{**vars(COLUMNS), "scale": True}))
    parts = list(read_items(folder / "items.parquet", data.encoder))
    assert [ids.tolist() for ids, _ in parts] == [[20, 10], [30]]
    for ids, features in parts:
        expected = data.catalogue.features(data.items.encode(ids))
        for name, values in expected.ids.items():
            assert np.array_equal(features.ids[name], values), name
        assert np.array_equal(features.floats, expected.floats) and np.array_equal(features.content, expected.content)
        assert np.array_equal(features.side["bid"], expected.side["bid"]) and features.encoding == data.encoder.version
    (ids, features), _ = read_items(ITEMS | {"id": [20, 99, 30]}, data.encoder)
    assert ids.tolist() == [20, 99] and features.ids["item"].tolist() == [2, 0] and features.content[1].tolist() == [3, 4]
    refused(ValueError, "row 2, column 'price': null", list, read_items(ITEMS | {"price": [1.0, None, 2.0]}, data.encoder))


def test_wrong_options(folder):
    (folder / "_events.feather").write_bytes(b"")
    (folder / "_linked" / "day").mkdir(parents=True)
    (folder / "_linked" / "more.csv").symlink_to("day")  # a folder
    os.mkfifo(folder / "_linked" / "pipe.csv")
    csv(folder, events="user\n")  # the folder has files of two kinds
    spelled, booleans = dataclasses.replace(COLUMNS, actions=("false", "True")), EVENTS | {"event": [True] * 4}
    for changes, error, message in (
        ({"columns": None}, ValueError, "columns: expected Columns, or an encoder that has them, got neither"),
        ({"columns": Columns(), "encoder": read().encoder}, ValueError, "columns: expected those of the encoder"),
        ({"encoder": read().encoder, "items": ITEMS | {"vector": [[1.0]] * 3}}, ValueError, "row 1.*: expected 2 numbers like"),
        ({"users": None}, ValueError, r"users: expected a file, because Columns names user columns \('country', 'age'\)"),
        ({"columns": spelled, "events": booleans}, ValueError, r"one of 'false', 'True' \(make booleans text\), got 1"),
        ({"encoder": read().encoder, "items": ITEMS | {"brand": [True] * 3}}, ValueError, "text like .*; make them text"),
        ({"unknown": "keep"}, ValueError, "unknown: expected 'error' or 'skip', got 'keep'"),
        ({"events": folder / "no.parquet"}, FileNotFoundError, "expected a file or folder, got no such file"),
        ({"events": folder / "_events.feather"}, ValueError, r"expected files \.parquet, \.csv"),
        ({"events": folder / "_linked"}, ValueError, r"no pipes or links .* got \['more.csv', 'pipe.csv'\]"),
        ({"events": pa.table(EVENTS)[:0].to_reader()}, ValueError, "no rows: .* got none; a reader gives its rows once"),
        ({"events": folder}, ValueError, "expected Parquet files or text files, one kind"),
    ):
        refused(error, message, read, **changes)
    for name in ("events", "items"):
        refused(TypeError, f"{name}: expected a path, a mapping of columns or an Arrow table, got None", read, **{name: None})
    for name, kind in {"columns": "Columns", "encoder": "Encoder", "earlier": "Trained"}.items():
        refused(TypeError, f"{name}: expected {kind} or None, got dict; give {name}=", read, **{name: {"user": "uid"}})
    refused(TypeError, "encoder: .*, got dict; give encoder=run.encoder", readers.check, EVENTS, encoder={})
    refused(ValueError, "columns: expected those of", readers.check, EVENTS, columns=Columns(), encoder=read().encoder)


def test_reading_says_whether_users_come_back(caplog):
    caplog.set_level("INFO", logger="aif_jax.readers.read")
    items = {"item": [7, 8], "category": [1, 2]}
    once = readers.read({"user": [1, 1, 2], "item": [7, 8, 7], "time": [1, 2, 3]}, items=items, columns=Columns(), name="films")
    assert once.repeats is False
    assert "films: users do not come back to items (repeats=False, estimated): 0.0 % of the events repeat" in caplog.text
    again = {"user": [1, 1, 1, 2], "item": [7, 8, 7, 7], "time": [1, 2, 3, 3]}
    assert readers.read(again, items=items, columns=Columns()).repeats is True
    assert "events: users come back to items (repeats=True, estimated): 25.0 % of the events repeat" in caplog.text
    given = readers.read(again, items=items, columns=Columns(), repeats=False)
    assert given.repeats is False and given.repeated == 0.25
    assert "do not come back to items (repeats=False, as given): 25.0 %" in caplog.text


def test_a_read_runs_code_of_few_files(folder):
    """A row of every kind of column goes through eight files on its way; what it lands in and the checks are the model's."""
    files = set()

    def profiler(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in file.parents:
            files.add(file.relative_to(PACKAGE).as_posix())

    read(**paths(folder))  # imports what is imported when it is first used
    sys.setprofile(profiler)
    try:
        read(**paths(folder))
    finally:
        sys.setprofile(None)
    rows = {file for file in files if file.startswith(("readers/", "encoding/", "data/"))}
    assert len(rows) <= 8, sorted(rows)
    assert files - rows <= {"catalogue.py", "checks.py", "features.py", "output/__init__.py", "registry.py", "schema.py"}


@pytest.mark.parametrize("wrong", [2.7, -1.0, 2.0**25])
def test_a_place_in_a_list_is_a_whole_number(wrong):
    events = {"user": [1, 1, 2], "item": [7, 8, 7], "time": [10, 10, 20], "shown_at": [1.0, wrong, None]}
    given = dict(items={"item": [7, 8], "category": [1, 1]}, columns=Columns(position="shown_at"))
    expected = f"position: expected a whole number from 1 to 2^24 - 1, 0 or empty where it is unknown, got {wrong:.8g}"
    refused(ValueError, re.escape(f"row 2, column 'shown_at': {expected}"), readers.read, events, **given)
    assert readers.read(events | {"shown_at": [1.0, 2.0, None]}, **given).display_positions.tolist() == [1, 2, 0]
