"""One's own Parquet and CSV files: reading, what a wrong file gets, vocabularies for tomorrow."""

import datetime
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aif_jax.data import tables, tabular
from aif_jax.data.columns import Columns
from aif_jax.data.events import EventLog
from aif_jax.data.schema import Vocabulary

COLUMNS = Columns(
    user="uid", item="sku", time="at", time_unit="ms", action="event", actions=("view", "buy"), category="group",
    item_attributes=("brand",), item_bags=("tags",), bag_length=2, item_floats=("price",), side=("bid",), content="vector",
    behaviour_fields=("brand",), user_attributes=("country",), user_floats=("age",), user_id=True, item_key="id",
)  # fmt: skip
EVENTS = {
    "uid": ["b", "a", "b", "a"],
    "sku": [30, 10, 10, 20],
    "at": [5_000, 3_999, 4_000, 7_000],
    "event": ["buy", "view", "view", "buy"],
}
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


def read(folder, columns=COLUMNS, **options):
    return tabular.read(
        folder / "events.parquet", items=folder / "items.parquet", users=folder / "users.parquet", columns=columns, **options
    )


def test_everything_arrives_in_its_place(folder):
    data = read(folder)
    assert data.name == "events" and data.users.raw.tolist() == ["a", "b", "c"] and data.items.raw.tolist() == [10, 20, 30]
    log, catalogue = data.log, data.catalogue
    assert (log.user.tolist(), log.item.tolist()) == ([1, 1, 2, 2], [1, 2, 1, 3])
    assert log.time.tolist() == [3, 7, 4, 5]  # seconds, cut
    assert log.action.tolist() == [1, 2, 1, 2] and data.schema.actions == 3
    assert catalogue.ids["category"].tolist() == [0, 1, 2, 2]  # cup, tea
    assert catalogue.ids["brand"].tolist() == [0, 0, 1, 2]
    assert catalogue.ids["tags"].tolist() == [[0, 0], [0, 0], [1, 2], [0, 0]]  # the first two; "red" stays in the vocabulary
    assert catalogue.floats.tolist() == [[0], [2], [1.5], [-1]]
    assert catalogue.side["bid"].tolist() == [0, 4, 3, 5]
    assert catalogue.content.tolist() == [[0, 0], [3, 4], [1, 2], [5, 6]]
    assert data.user_ids["user"].tolist() == [0, 1, 2, 3] and data.user_ids["country"].tolist() == [0, 1, 2, 0]
    assert data.user_floats.tolist() == [[0], [np.float32(0.1)], [np.float32(0.2)], [np.float32(0.3)]]
    assert data.schema.behaviour_fields == ("item", "category", "brand")
    assert data.user_features([1], short=2, long=2).long.ids["brand"].tolist() == [[0, 0]]


def test_csv_gives_the_same_as_parquet(folder, tmp_path):
    text = {
        "events": "uid,sku,at,event\nb,30,5000,buy\na,10,3999,view\nb,10,4000,view\na,20,7000,buy\n",
        "items": 'id,group,brand,tags,price,bid\n20,tea,x,hot|new|red,1.5,3\n10,cup,,,2,4\n30,"tea",y,,-1,5\n',
        "users": "uid,country,age\na,DE,.1\nb,FR,2e-1\nc,,0.3\n",
    }
    csv(tmp_path, **text)
    columns = Columns(**{**vars(COLUMNS), "content": None})
    data = tabular.read(
        tmp_path / "events.csv",
        items=tmp_path / "items.csv",
        users=tmp_path / "users.csv",
        columns=columns,
        content=(np.array([10, 20, 30]), np.array([[3, 4], [1, 2], [5, 6]])),
    )
    other = read(folder)
    assert data.schema == other.schema
    for field in ("user", "item", "action", "time", "offsets"):
        assert np.array_equal(getattr(data.log, field), getattr(other.log, field)), field
    for name, table in other.catalogue.ids.items():
        assert np.array_equal(data.catalogue.ids[name], table), name
    assert np.array_equal(data.catalogue.content, other.catalogue.content)
    assert np.array_equal(data.user_floats, other.user_floats)


def test_a_folder_gzip_and_tabs_will_do(tmp_path):
    (tmp_path / "events").mkdir()
    with gzip.open(tmp_path / "events" / "1.csv.gz", "wt") as file:
        file.write("user,item,time\n1,7,20\n")
    (tmp_path / "events" / "2.csv").write_text("user,item,time\n1,8,30\n2,8,10\n")
    (tmp_path / "items.tsv").write_text("item\tcategory\n7\ttea, green\n8\tcup\n")
    data = tabular.read(tmp_path / "events", items=tmp_path / "items.tsv", columns=Columns())
    assert data.log.item.tolist() == [1, 2, 2] and data.catalogue.ids["category"].tolist() == [0, 2, 1]


def test_many_blocks_are_one_table(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    events = {"user": rng.integers(0, 50, 1000), "item": rng.integers(0, 30, 1000), "time": rng.integers(0, 10**6, 1000)}
    parquet(tmp_path, events=events, items={"item": np.arange(30), "category": np.arange(30) % 4})
    whole = tabular.read(tmp_path / "events.parquet", items=tmp_path / "items.parquet", columns=Columns())
    monkeypatch.setattr(tables, "ROWS", 64)
    pieces = tabular.read(tmp_path / "events.parquet", items=tmp_path / "items.parquet", columns=Columns())
    order = np.lexsort((events["time"], events["user"]))
    for log in (whole.log, pieces.log):
        assert np.array_equal(log.item, events["item"][order] + 1) and np.array_equal(log.time, events["time"][order])


@pytest.mark.parametrize(("times", "unit", "seconds"), [
    (pa.array([1_500_000_000], pa.int32()), "s", 1_500_000_000),
    (pa.array([1_500_000_000_999_999]), "us", 1_500_000_000),
    (pa.array([-1]), "ms", -1),  # the second before 1970 began
    (pa.array([1_500_000_000_999], pa.timestamp("ms")), "s", 1_500_000_000),
    (pa.array([-1], pa.timestamp("ns", "UTC")), "s", -1),
    (pa.array([datetime.date(1970, 1, 2)]), "s", 86_400),
])  # fmt: skip
def test_times(tmp_path, times, unit, seconds):
    parquet(tmp_path, events={"user": ["a"], "item": [1], "time": times}, items={"item": [1], "category": [1]})
    columns = Columns(time_unit=unit)
    data = tabular.read(tmp_path / "events.parquet", items=tmp_path / "items.parquet", columns=columns)
    assert data.log.time.tolist() == [seconds]


def test_times_written_out_in_csv(tmp_path):
    csv(tmp_path, events="user,item,time\n1,1,2017-11-25 00:00:10\n1,1,2017-11-25 00:00:05\n", items="item,category\n1,1\n")
    data = tabular.read(tmp_path / "events.csv", items=tmp_path / "items.csv", columns=Columns())
    assert data.log.time.tolist() == [1511568005, 1511568010]


def test_dictionaries_booleans_and_numbers_as_text(tmp_path):
    items = {
        "item": pa.array(["a", "b"]).dictionary_encode(),
        "category": pa.array([True, False]),
        "shop": pa.array([7, 8], pa.uint8()),
    }
    parquet(tmp_path, events={"user": [1, 1], "item": ["a", "b"], "time": [1, 2]}, items=items)
    columns = Columns(item_attributes=("shop",), text=("shop",))
    data = tabular.read(tmp_path / "events.parquet", items=tmp_path / "items.parquet", columns=columns)
    assert data.catalogue.ids["category"].tolist() == [0, 2, 1]
    assert tabular.vocabularies(
        tmp_path / "events.parquet", items=tmp_path / "items.parquet", columns=columns
    )["shop"].raw.tolist() == ["7", "8"]  # fmt: skip


def test_tomorrows_files_keep_todays_rows(folder, tmp_path):
    known = tabular.vocabularies(
        folder / "events.parquet", items=folder / "items.parquet", users=folder / "users.parquet", columns=COLUMNS
    )
    tabular.save_vocabularies(tmp_path / "vocabularies.json", known)
    known = tabular.load_vocabularies(tmp_path / "vocabularies.json")
    tomorrow = tmp_path / "tomorrow"
    tomorrow.mkdir()
    parquet(tomorrow, events={name: values[:1] for name, values in EVENTS.items()}, items=ITEMS, users=USERS)
    today, data = read(folder), read(tomorrow, vocabularies=known)
    assert data.schema == today.schema and len(data.log) == 1 and data.log.item.tolist() == [3]
    assert np.array_equal(data.catalogue.ids["brand"], today.catalogue.ids["brand"])

    new = {name: [*values, values[0]] for name, values in ITEMS.items()} | {
        "id": [20, 10, 30, 99],
        "brand": ["x", "z", "y", "x"],
    }
    events = {name: [*values, values[0]] for name, values in EVENTS.items()} | {"uid": [*EVENTS["uid"], "stranger"]}
    parquet(tomorrow, events=events, items=new)
    with pytest.raises(ValueError, match=r"row 4, column 'id': unknown item: expected one of the 3 known, got 99"):
        read(tomorrow, vocabularies=known)
    data = read(tomorrow, vocabularies=known, unknown="skip")
    assert data.schema == today.schema and len(data.log) == 4  # without the stranger's event
    assert data.catalogue.ids["brand"].tolist() == [0, 0, 1, 2]  # "z" is unknown


def test_skipping_is_told(folder, caplog):
    parquet(folder, events={name: [*values, values[0]] for name, values in EVENTS.items()} | {"sku": [30, 10, 10, 20, 77]})
    with pytest.raises(ValueError, match="unknown item"):
        read(folder)
    assert len(read(folder, unknown="skip").log) == 4
    assert "1 rows passed over or left unknown: unknown item" in caplog.text


def test_reading_names_the_first_problems(folder):
    parquet(folder, events=EVENTS | {"at": [5_000, None, 4_000, 7_000], "event": ["buy", "view", "look", "buy"]})
    with pytest.raises(ValueError) as error:
        read(folder)
    assert "events.parquet, row 2, column 'at': null: expected a time, got nothing" in str(error.value)


def test_log_alone(folder):
    users, items = Vocabulary(["a", "b"]), Vocabulary([10, 30])
    log = EventLog.from_parquet(folder / "events.parquet", COLUMNS, users=users, items=items)
    assert log.item.tolist() == [1, 0, 1, 2] and log.users == 3  # an unknown item is row 0
    with pytest.raises(ValueError, match=r"row 1, column 'uid': unknown user"):
        EventLog.from_parquet(folder / "events.parquet", COLUMNS, users=Vocabulary(["a"]), items=items)
    with pytest.raises(ValueError, match=r"expected rows \(integers\), or a vocabulary: users=, got text"):
        EventLog.from_parquet(folder / "events.parquet", COLUMNS, items=items)


def test_log_of_rows(tmp_path):
    csv(tmp_path, events="user,item,time\n2,5,20\n1,6,10\n2,7,15\n")
    log = EventLog.from_csv(tmp_path / "events.csv", Columns())
    assert log.item.tolist() == [6, 7, 5] and log.offsets.tolist() == [0, 0, 1, 3]


def test_repr_of_a_log(folder):
    assert repr(read(folder).log) == "EventLog(4 events, 3 users, second 3 to second 7; events of a user: median 2, at most 2)"
    log = EventLog.from_arrays([1], [1], [1], [1_511_544_070])
    assert repr(log).startswith("EventLog(1 events, 1 users, 2017-11-24 to 2017-11-24;")


@pytest.mark.parametrize(("change", "message"), [
    ({"time_unit": "min"}, "Columns.time_unit: expected one of s, ms, us, ns, got 'min'"),
    ({"item_attributes": "brand"}, "Columns.item_attributes: expected a tuple of column names, got 'brand'"),
    ({"item_attributes": ("item",)}, "expected attributes of different names, none of them user, item, category, action"),
    ({"behaviour_fields": ("brand",)}, "Columns.behaviour_fields: expected names among item_attributes"),
    ({"actions": ("view",)}, "Columns.actions: expected a column for them"),
    ({"user": "item"}, r"expected each column of the events file in one place, got \['item'\] in several"),
    ({"category": "price", "item_floats": ("price",)}, r"expected each column of the items file in one place"),
    ({"bag_length": 1}, "Columns.bag_length: expected at least 2"),
])  # fmt: skip
def test_wrong_columns(change, message):
    with pytest.raises(ValueError, match=message):
        Columns(**change)


def test_wrong_options(folder):
    with pytest.raises(ValueError, match="unknown: expected 'error' or 'skip', got 'keep'"):
        read(folder, unknown="keep")
    with pytest.raises(ValueError, match=r"expected Columns.content \('vector'\) or content=, not both"):
        read(folder, content="content.npz")
    with pytest.raises(FileNotFoundError, match="expected a file or folder, got no such file"):
        tabular.read(folder / "no.parquet", items=folder / "items.parquet", columns=COLUMNS)
    (folder / "events.feather").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a name that ends in one of \.parquet, \.csv"):
        tabular.read(folder / "events.feather", items=folder / "items.parquet", columns=COLUMNS)
    csv(folder, events="user\n")
    with pytest.raises(ValueError, match="expected Parquet files or text files, one kind"):
        tabular.read(folder, items=folder / "items.parquet", columns=COLUMNS)


def test_without_pyarrow_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(tables.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"pip install 'aif_jax\[data\]'"):
        read(folder)
