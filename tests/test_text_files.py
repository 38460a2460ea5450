"""Text files: values, quotes, byte order marks, wrong lines, empty files; and blocks of bounded size."""

import re

import numpy as np
import pyarrow.csv as csv
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aif_jax.encoding.columns import Columns
from aif_jax.readers import read
from aif_jax.readers.read import encode_columns
from aif_jax.readers.tables import Problems, batches, read_table
from tests.refusals import refused

NAMES = ("user", "change", "rating", "action")
KINDS = {"user": "id", "change": "action", "rating": "float", "action": "action"}

row = st.tuples(
    st.integers(0, 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.tuples(st.sampled_from(["", "-"]), st.integers(0, 10**4), st.sampled_from(["", ".", ".5", ".25", ".100000"])),
    st.sampled_from(["pv", "cart", "a:b"]),
)


def loaded(path, kinds, *, text=()):
    """The columns of a file, or its problems."""
    problems = Problems()
    table = read_table(path, kinds, problems, columns=Columns(text=text, action="action"), name="table")
    coded = {name: encode_columns(name, [(table, name)]) for name, kind in kinds.items() if kind != "float"}
    problems.expect_none()
    ids = {name: vocabulary.ids_of(rows) for name, (vocabulary, (rows,)) in coded.items()}
    return ids | {name: table.array(name) for name, kind in kinds.items() if kind == "float"}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row, min_size=1, max_size=20), suffix=st.sampled_from(["csv", "tsv"]),
       end=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_values_are_what_python_reads(tmp_path, rows, suffix, end):
    path, separator = tmp_path / f"table.{suffix}", {"csv": ",", "tsv": "\t"}[suffix]
    fields = [(str(a), str(b), f"{c[0]}{c[1]}{c[2]}", d) for a, b, c, d in rows]
    path.write_bytes("".join(separator.join(line) + end for line in (NAMES, *fields)).encode())
    got = loaded(path, KINDS, text=("action",))
    for name, kind, column in zip(NAMES, (int, int, np.float32, str), zip(*fields, strict=True), strict=True):
        assert got[name].tolist() == list(map(kind, column)), name


def test_a_byte_order_mark_encodings_and_quotes(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(b"\xef\xbb\xbfuser\tnote\titem\n6\tx\t5\n")  # other columns are left out
    assert loaded(path, {"user": "id", "item": "id"})["user"].tolist() == [6]
    path = tmp_path / "movies.csv"
    path.write_text('id,title\n1,"Me, Myself ""and"" I"\n3,plain\n')
    assert loaded(path, {"title": "action"})["title"].tolist() == ['Me, Myself "and" I', "plain"]
    for text, kind in (b"id,title\n1,a\n2,\xff\n", "ArrowI"), (b"", "ArrowI"), ("id,title\n1,a\n".encode("utf16"), "Unicode"):
        path.write_bytes(text)
        message = rf"movies\.csv: unreadable file: expected text with a header in utf8, got {kind}"
        refused(ValueError, message, loaded, path, {"title": "action"})


@pytest.mark.parametrize(("text", "row", "message"), [  # text, row, the rest of the message
    ("1,2,3,pv\n1,2\n3,pv,1,2,3,pv\n", 2, "wrong number of fields: expected 4, got 2 in '1,2'"),
    ('1,2,3,"p\nv"\n1,,3,pv\n', 2, "column 'change': null: expected a value in every row, got nothing"),
    ("1,2,3,pv\n1,2,3.4.5,pv\n", 2, "column 'rating': wrong type: expected a number, got '3.4.5'"),
])  # fmt: skip
def test_wrong_values_are_named_by_row(tmp_path, text, row, message):
    path = tmp_path / "bad.csv"
    path.write_text(",".join(NAMES) + "\n" + text)
    refused(ValueError, f"^{re.escape(f'{path}, row {row} after the header')}.*{re.escape(message)}", loaded, path, KINDS)


def test_blocks_are_bounded_and_end_at_no_line_break_of_a_value(tmp_path):
    path, problems = tmp_path / "large.csv", Problems()
    path.write_bytes(b"a,b\n" + b'123456,"96\n4980499"\n' * 400_000)
    parts = [b.columns for b in batches(path, ["a", "b"], problems, name="t")]
    assert sum(p.num_rows for p in parts) == 400_000 and max(p.num_rows for p in parts) < 100_000 and not problems.totals
    assert {value for p in parts for value in p.column("b").unique().to_pylist()} == {"96\n4980499"}


def test_the_reader_of_a_file_without_a_header_makes_a_data_set(tmp_path):
    (tmp_path / "ratings.dat").write_text("1|7|5|100\n2|8|4|90\n1|8|3|50\n")
    names = csv.ReadOptions(column_names=["user", "item", "rating", "time"])
    events = csv.open_csv(tmp_path / "ratings.dat", read_options=names, parse_options=csv.ParseOptions(delimiter="|"))
    data = read(events, items={"item": [7, 8], "category": ["a", "b"]}, columns=Columns(action="rating"), name="ratings")
    assert data.name == "ratings" and data.log.item.tolist() == [2, 1, 2] and data.log.action.tolist() == [1, 3, 2]
