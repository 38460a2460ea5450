"""Text files that their name does not describe: other separators, no header, other encodings, files that were cut off."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aif_jax.encoding.columns import Columns
from aif_jax.readers import TextFile, load_columns, read
from aif_jax.readers.tables import Problems, batches
from tests.refusals import refused

NAMES = ("user", "change", "rating", "action")
KINDS = {"user": "id", "change": "category", "rating": "float", "action": "category"}

row = st.tuples(
    st.integers(0, 10**18 - 1),
    st.integers(-(10**17), 10**17),
    st.tuples(st.sampled_from(["", "-"]), st.integers(0, 10**4), st.sampled_from(["", ".", ".5", ".25", ".100000"])),
    st.sampled_from(["pv", "cart", "a:b"]),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row, min_size=1, max_size=20), separator=st.sampled_from([",", "\t", "::", "|-|"]),
       end=st.sampled_from(["\n", "\r\n"]), header=st.booleans())  # fmt: skip
def test_values_are_what_python_reads(tmp_path, rows, separator, end, header):
    path = tmp_path / "table.txt"
    fields = [(str(a), str(b), f"{c[0]}{c[1]}{c[2]}", d) for a, b, c, d in rows]
    lines = [separator.join(NAMES)] * header + [separator.join(f) for f in fields]
    path.write_bytes("".join(line + end for line in lines).encode())
    file = TextFile(path=path, names=() if header else NAMES, separator=separator, whole=True)
    _, got = load_columns(file, KINDS, columns=Columns(text=("action",)))
    assert got["user"].tolist() == [int(f[0]) for f in fields]
    assert got["change"].tolist() == [int(f[1]) for f in fields]
    assert got["rating"].tolist() == [np.float32(f[2]) for f in fields]
    assert got["action"].tolist() == [f[3] for f in fields]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_separator_across_the_border_of_two_pieces(tmp_path, monkeypatch, size):
    import pyarrow as pa

    text = b"".join(b"%d::%d::a:b:\n" % (i, 2 * i) for i in range(50))
    whole = pa.TransformInputStream
    cut = lambda stream, translate: whole(stream, lambda data: b"".join(  # noqa: E731
        translate(bytes(data)[i : i + size]) for i in range(0, len(data), size)) if len(data) else translate(data))  # fmt: skip
    (tmp_path / "ratings.dat").write_bytes(text)
    monkeypatch.setattr(pa, "TransformInputStream", cut)
    file = TextFile(path=tmp_path / "ratings.dat", names=("a", "b", "c"), separator="::")
    _, got = load_columns(file, {"a": "id", "b": "id", "c": "category"})
    assert got["b"].tolist() == [2 * i for i in range(50)] and set(got["c"].tolist()) == {"a:b:"}


def test_a_byte_order_mark_encodings_and_quotes(tmp_path):
    path = tmp_path / "table.inter"
    path.write_bytes(b"\xef\xbb\xbfuser\tnote\titem\n6\tx\t5\n")  # other columns are left out
    assert load_columns(TextFile(path=path, separator="\t"), {"user": "id", "item": "id"})[1]["user"].tolist() == [6]
    path = tmp_path / "u.item"
    path.write_bytes('1|Caf\xe9\x85 (1995)\r\n2|say "hi"\n'.encode("latin-1"))
    file = TextFile(path=path, names=("id", "title"), separator="|", encoding="latin-1", quoted=False)
    assert load_columns(file, {"title": "category"})[1]["title"].tolist() == ["Caf\xe9\x85 (1995)", 'say "hi"']
    path = tmp_path / "movies.csv"
    path.write_text('id,title\n1,"Me, Myself ""and"" I"\n3,plain\n')
    assert load_columns(path, {"title": "category"})[1]["title"].tolist() == ['Me, Myself "and" I', "plain"]
    path.write_bytes(b"id,title\n1,a\n2,\xff\n")
    with pytest.raises(ValueError, match=r"movies\.csv: unreadable file: expected text with a header in utf8, got"):
        load_columns(path, {"title": "category"})


@pytest.mark.parametrize(("text", "line", "message"), [  # text, line, the rest of the message
    ("1,2,3,pv\n1,2,3\n", 2, "wrong number of fields: expected 4, got 3 in '1,2,3'"),
    ("1,2,3,pv\n1,2\n3,pv,1,2,3,pv\n", 2, "wrong number of fields: expected 4, got 2 in '1,2'"),
    ("-1,2,3,pv\n", 1, "column 'user': negative id: expected 0 or more, got -1"),
    ("1,,3,pv\n", 1, "column 'change': null: expected a value in every row, got nothing"),
    ("1,2,3,pv\n1,2,3.4.5,pv\n", 2, "column 'rating': wrong type: expected a number, got '3.4.5'"),
    ("1,2,1e300,pv\n", 1, "column 'rating': not finite: expected a finite number, got inf"),
])  # fmt: skip
@pytest.mark.parametrize("header", [False, True])
def test_wrong_values_are_named_by_line(tmp_path, text, line, message, header):
    path = tmp_path / "bad.csv"
    path.write_text((",".join(NAMES) + "\n") * header + text)
    told = f"^{re.escape(f'{path}, line {line + header}')}.*{re.escape(message)}"
    refused(ValueError, told, load_columns, TextFile(path=path, names=() if header else NAMES), KINDS)


def test_an_empty_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "bad.csv").write_text("")
    message = "unreadable file: expected text with a header in utf8, got ArrowInvalid: Empty CSV file"
    refused(ValueError, message, load_columns, tmp_path / "bad.csv", {"a": "id"})
    for source in (tmp_path / "no.csv", TextFile(path=tmp_path / "no.dat", names=("a",))):
        refused(FileNotFoundError, r"no\.(csv|dat): expected a file", load_columns, source, {"a": "id"})


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_file_that_was_cut_off(tmp_path, name):
    import gzip

    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb") as file:
        file.write(b"1,2\n1,345")
    text = {"path": tmp_path / name, "names": ("a", "b")}
    assert load_columns(TextFile(**text), {"a": "id"})[1]["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"cut off: expected a line end after the last line, got '1,345'"):
        load_columns(TextFile(**text, whole=True), {"a": "id"})


def test_blocks_are_bounded(tmp_path):
    path = tmp_path / "large.csv"
    path.write_bytes(b"a,b\n" + b"123456,964980499\n" * 400_000)
    sizes = [len(b.rows) for b in batches(path, ["a"], Problems(), name="t")]
    assert sum(sizes) == 400_000 and max(sizes) < 100_000


def test_files_without_a_header_make_a_data_set(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::7::5::100\n2::8::4::90\n1::8::3::50\n")
    events = TextFile(path=tmp_path / "ratings.dat", names=("user", "item", "rating", "time"), separator="::")
    data = read(events, items={"item": [7, 8], "category": ["a", "b"]}, columns=Columns(action="rating"))
    assert data.name == "ratings" and data.log.item.tolist() == [2, 1, 2] and data.log.action.tolist() == [1, 3, 2]
