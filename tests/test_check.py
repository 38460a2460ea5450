"""Every kind of problem of your files is found, with its row; a clean file is clean."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.readers import check
from aif_jax.readers.tables import whole

EVENTS = "user,item,time\n1,7,10\n1,8,20\n2,7,5\n2,7,6\n3,8,9\n3,7,11\n"
ITEMS = "item,category\n7,tea\n8,cup\n"
USERS = "user,age\n1,.5\n2,.25\n3,1\n"
NO_INTEGERS = "write integers as such: pandas makes floats of them where one is missing, astype('Int64') does not"
OTHERS = "; Columns.text is for text such as 1.10, and for whole numbers from 2^63 on"
LONG = "user,item,time\n" + "".join(f"{user},7,{user}\n" for user in range(1, 150_000)) + "x,7,150000\n"
"""A column that begins with a block of integers is one of integers; what comes later is named, not made text of all."""


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)


def found(folder, *, items=True, users=False, columns=None, **options):
    """kind, line or row, column, got of every problem."""
    files = {name: folder / f"{name}.csv" for name, there in (("items", items), ("users", users)) if there}
    report = check(folder / "events.csv", columns=columns or Columns(), **files, **options)
    return [(p.kind, p.row and p.row + 1, p.column, p.got) for p in report.problems]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, events=EVENTS, items=ITEMS, users=USERS)
    return tmp_path


@pytest.mark.parametrize(("file", "old", "new", "problem"), [
    ("events", "2,7,6", "2,-7,6", ("negative id", 5, "item", "-7")),
    ("events", "2,7,6", "2,9,6", ("unknown item", 5, "item", "9")),
    ("events", "2,7,6", "9,7,6", ("unknown user", 5, "user", "9")),
    ("events", "2,7,6", "2,7,", ("null", 5, "time", "nothing")),
    ("events", "2,7,6", ",7,6", ("null", 5, "user", "nothing")),
    ("events", "2,7,6", "2,7,6.5", ("wrong type", 5, "time", "'6.5'")),
    ("events", "2,7,6", "2,x,6", ("wrong type", 5, "item", "'x'")),
    ("events", "2,7,6", "2,7", ("wrong number of fields", 5, None, "2 in '2,7'")),
    ("events", "3,7,11", "3,7,1511544070000", ("time unit", 7, "time", "1511544070000, which looks like 'ms'")),
    ("events", "user,item,time", "user,item,at", ("missing column", None, "time", "the columns 'user', 'item', 'at'")),
    ("events", "user,item,time", "user,item,item,time", ("missing column", None, "item", "more than one")),
    ("events", EVENTS, "user,item,time\n", ("no rows", None, None, "none")),
    ("items", "8,cup", "7,cup", ("duplicate item", 3, "item", "7, which is in row 1 after the header too")),
    ("items", "8,cup", "-8,cup", ("negative id", 3, "item", "-8")),
    ("items", "8,cup", "x,cup", ("wrong type", 3, "item", "'x'")),
    ("items", "item,category", "id,category", ("missing column", None, "item", "the columns 'id', 'category'")),
    ("users", "2,.25", "2,nan", ("not finite", 3, "age", "nan")),
    ("users", "2,.25", "2,1e300", ("not finite", 3, "age", "1e+300")),
    ("users", "2,.25", "2,", ("null", 3, "age", "nothing")),
    ("users", "2,.25", "1,.25", ("duplicate user", 3, "user", "1, which is in row 1 after the header too")),
])  # fmt: skip
def test_one_wrong_row_or_header(folder, file, old, new, problem):
    text = {"events": EVENTS, "items": ITEMS, "users": USERS}[file]
    assert old in text
    write(folder, **{file: text.replace(old, new)})
    assert problem in found(folder, users=True, columns=Columns(user_floats=("age",)))


def test_all_problems_of_a_file_at_once(folder):
    write(folder, events="user,item,time\n1,7,10\n1,-8,20\n1,7\n1,9,15\n2,7,\n1,7,30\n1,7,30\n\n")
    assert found(folder) == [
        ("wrong number of fields", 4, None, "2 in '1,7'"),
        ("null", 6, "time", "nothing"),
        ("null", 9, "user", "nothing"),
        ("null", 9, "item", "nothing"),
        ("null", 9, "time", "nothing"),
        ("negative id", 3, "item", "-8"),
        ("unknown item", 5, "item", "9"),
    ]
    (suspicion,) = check(folder / "events.csv", items=folder / "items.csv", columns=Columns()).suspicions
    assert suspicion.kind == "duplicate event"
    assert "1 of 5 events, such as row 7 after the header (as row 6 after the header)" in suspicion.got


def test_parquet_tells_rows(tmp_path):
    events = {"user": ["a", "a", None], "item": [1, 2, -3], "time": [1_511_544_070_000, 5, 6]}
    items = {"item": [1.0, 2.0], "category": [None, "x"], "content": [[1.0, 2.0], [3.0]]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    report = check(tmp_path / "events.parquet", items=tmp_path / "items.parquet", columns=Columns(content="content"))
    assert [(p.kind, p.row, p.column, p.got) for p in report.problems] == [
        ("null", 3, "user", "nothing"),
        ("time unit", 1, "time", "1511544070000, which looks like 'ms'"),
        ("wrong type", None, "item", f"double ({NO_INTEGERS})"),
        ("wrong length", 2, "content", "1"),
        ("negative id", 3, "item", "-3"),
    ]
    assert str(report.problems[1]).startswith(f"{tmp_path / 'events.parquet'}, row 1, column 'time': time unit: expected")


def test_torn_and_altered_parquet(folder):
    pq.write_table(pa.table({"user": [1], "item": [7], "time": [0xABCDE]}), folder / "events.parquet", write_page_checksum=True)
    whole = (folder / "events.parquet").read_bytes()
    for damaged, got in (whole[: len(whole) // 2], "magic bytes"), (whole.replace(b"\xde\xbc\n\0", b"\xde\xbc\n\1"), "CRC"):
        (folder / "events.parquet").write_bytes(damaged)
        (problem,) = check(folder / "events.parquet", columns=Columns()).problems
        assert problem.kind == "unreadable file" and got in problem.got


@pytest.mark.parametrize(("files", "columns", "problems"), [
    (dict(items="item,category\nseven,tea\neight,cup\n"), None, [("wrong type", None, "item", "text")]),  # of two kinds
    (dict(events="user,item,time\n1,07,10\n1,7,20\n", items="item,category\n07,tea\n7,cup\n"), None, []),  # two text ids
    (dict(events="user,item,time\n1,07,10\n1,7,20\n"), None, [("wrong type", 2, "item", "'07'")]),
    (dict(events="user,item,time\n10e4,7,10\n"), None, [("wrong type", None, "user", f"double ({NO_INTEGERS}{OTHERS})")]),
    (dict(events="user,item,time\n10e4,7,10\n"), Columns(text=("user",)), []),
    (dict(events=LONG), None, [("wrong type", 150_001, "user", "'x'")]),
    (dict(events=LONG), Columns(text=("user",)), []),
    (dict(events="user,item,time,event\n1,7,10,view\n1,8,20,\n"), Columns(action="event"), [("null", 3, "event", "nothing")]),
])  # fmt: skip
def test_kinds_of_ids(folder, files, columns, problems):
    write(folder, **files)
    assert found(folder, columns=columns) == problems


def test_values_that_a_trained_model_lacks(folder):
    columns = Columns(item_attributes=("brand",), action="event", actions=("view", "buy"))
    write(folder, events="user,item,time,event\n1,7,10,view\n1,8,20,look\n", items="item,category,brand\n7,tea,x\n8,cup,y\n")
    known = {"user": [1], "item": [7, 8], "brand": ["x"], "category": ["tea"]}
    known = {name: Vocabulary(raw) for name, raw in known.items()}
    assert found(folder, columns=columns, encoder=Encoder(columns=columns, vocabularies=known)) == [
        ("unknown action", 3, "event", "'look'"),
        ("unknown category", 3, "category", "'cup'"),
        ("unknown category", 3, "brand", "'y'"),
    ]


def test_many_bad_values_are_found_among_many_good_ones(folder):
    bad = {3, 999, 1000, 4321, 70_000}
    write(folder, events="user,item,time\n" + "".join(f"1,7,{'x' if row in bad else row}\n" for row in range(1, 80_001)))
    report = check(folder / "events.csv", items=folder / "items.csv", columns=Columns())
    assert {p.row for p in report.problems} == bad and {p.kind for p in report.problems} == {"wrong type"}


def test_a_file_that_is_repeated_in_a_folder_repeats_its_ids(folder):
    (folder / "items").mkdir()
    for name in ("1.csv", "2.csv"):
        (folder / "items" / name).write_text(ITEMS)
    report = check(folder / "events.csv", items=folder / "items", columns=Columns())
    assert report.totals == {"duplicate item": 2}
    assert report.problems[0].where.endswith("2.csv, row 1 after the header")
    assert report.problems[0].got == f"7, which is in row 1 after the header of {folder / 'items' / '1.csv'} too"


def test_integers_beyond_64_bits():
    users = pa.array([1, 2**63], pa.uint64())
    for given in (users, users.dictionary_encode()):
        (problem,) = check({"user": given, "item": [1, 1], "time": [1, 2]}, columns=Columns()).problems
        assert str(problem).endswith(f"wrong type: expected an integer below 2^63, or text by Columns.text, got {2**63}")
    bags = pa.array([[1]] * 3 + [[1, 2**63]] + [[1]] * 1000, pa.list_(pa.uint64()))
    items = {"item": range(len(bags)), "category": [1] * len(bags), "tags": bags}
    report = check({"user": [1], "item": [1], "time": [1]}, items=items, columns=Columns(item_bags=("tags",)))
    assert report.totals == {"wrong type": 1} and str(report.problems[0]).startswith("items, row 4, column 'tags'")
    near = [sign * 2**63 + step * 10**place for sign in (1, -1) for step in range(-9, 10) for place in range(20)]
    assert whole(pa.array(map(str, near))).tolist() == [-(2**63) <= number < 2**63 for number in near]


def test_files_of_a_folder_that_differ(tmp_path):
    (tmp_path / "events").mkdir()
    tables = {
        "1": {"user": [1, 1], "item": [7, 8], "time": [10, 20]},
        "2": {"user": [1, 2], "item": [7, 8]},
        "3": {"user": ["a"], "item": [7], "time": [30]},
        "4": {"user": [2], "item": [8], "time": pa.array([5_500], pa.timestamp("ms"))},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / "events" / f"{name}.parquet")
    report = check(tmp_path / "events", columns=Columns())
    assert [(p.where.rpartition("/")[2], p.kind, p.got) for p in report.problems] == [
        ("2.parquet", "missing column", "the columns 'user', 'item'"),
        ("3.parquet", "wrong type", "text"),
    ]
    assert list(report.rows.values()) == [2, 2, 1, 1]
    (tmp_path / "items").mkdir()
    for name, rows in {"1": "7,1,1|2", "2": "8,1,\n9,1,3|x|y\n10,1,z"}.items():
        (tmp_path / "items" / f"{name}.csv").write_text(f"item,category,tags\n{rows}\n")
    report = check({"user": [1], "item": [7], "time": [1]}, items=tmp_path / "items", columns=Columns(item_bags=("tags",)))
    assert [(p.kind, p.row, p.got) for p in report.problems] == [("wrong type", 2, "'x'"), ("wrong type", 3, "'z'")]
