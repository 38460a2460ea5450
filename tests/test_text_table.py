"""Strict text tables: right values for right files, and for wrong ones the file, the line, what was expected and what came."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.data.text_table import DataError, number_blocks, text_rows

COLUMNS = {"user": "id", "change": "integer", "rating": "decimal", "action": ("pv", "cart")}


def read_all(path, columns, **options):
    blocks = [block for _, block in number_blocks(path, columns, **options)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


row = st.tuples(
    st.integers(0, 10**18 - 1),
    st.integers(-(10**17), 10**17),
    st.tuples(st.sampled_from(["", "-"]), st.integers(0, 10**9), st.sampled_from(["", ".", ".5", ".25", ".100000"])),
    st.sampled_from(["pv", "cart"]),
)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(row, min_size=1, max_size=20), separator=st.sampled_from([",", "\t", "::"]), block=st.integers(1, 200),
       end=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_numbers_are_what_python_reads(tmp_path_factory, rows, separator, block, end):
    path = tmp_path_factory.mktemp("t") / "table.txt"
    fields = [(str(a), str(b), f"{c[0]}{c[1]}{c[2]}", d) for a, b, c, d in rows]
    path.write_bytes("".join(separator.join(f) + end for f in fields).encode())
    got = read_all(path, COLUMNS, separator=separator, block_bytes=block)
    assert got["user"].tolist() == [int(f[0]) for f in fields]
    assert got["change"].tolist() == [int(f[1]) for f in fields]
    assert got["rating"].tolist() == [float(f[2]) for f in fields]
    assert [COLUMNS["action"][a] for a in got["action"]] == [f[3] for f in fields]


def test_line_numbers_of_blocks_count_the_header(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("b,a\n" + "10,20\n" * 10)
    blocks = list(number_blocks(path, {"a": "id"}, header=True, block_bytes=13))
    assert [line for line, _ in blocks] == list(np.cumsum([2] + [len(b["a"]) for _, b in blocks[:-1]]))
    assert sum(len(b["a"]) for _, b in blocks) == 10 and len(blocks) > 2


def test_header_finds_columns_by_name_and_passes_over_others(tmp_path):
    path = tmp_path / "table.inter"
    path.write_bytes(b"\xef\xbb\xbfuser_id:token\tnote:token\titem_id:token\n6\tx\t5\n")
    assert read_all(path, {"user_id": "id", "item_id": "id"}, separator="\t", header=True)["user_id"].tolist() == [6]
    assert list(text_rows(path, ("user_id", "note"), separator="\t", header=True)) == [(2, ["6", "x"])]


def test_words_are_compared_whole(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"favorite\npv\n")
    assert read_all(path, {"word": ("pv", "favorite")})["word"].tolist() == [1, 0]
    for other in (b"favorites\n", b"favorit\n", b"pv\0\n", b"p\n", b"\n"):
        path.write_bytes(other)
        with pytest.raises(DataError, match="expected word to be one of pv, favorite"):
            read_all(path, {"word": ("pv", "favorite")})


def test_ids_are_int32_where_they_fit(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("2147483647\n")
    assert read_all(path, {"id": "id"})["id"].dtype == np.int32
    path.write_text("2147483648\n")
    assert read_all(path, {"id": "id"})["id"].tolist() == [2**31]


WRONG_NUMBERS = [  # text, line, expected, got
    ("1,2,3,pv\n1,2,3\n", 2, "4 fields (user, change, rating, action)", "3 in '1,2,3'"),
    ("1,2,3,pv\n1,2,3,pv,9\n", 2, "4 fields", "5 in '1,2,3,pv,9'"),
    ("1,2,3,pv\n\n1,2,3,pv\n", 2, "4 fields", "an empty line"),
    ("1,2,3,pv\n1,2\n3,pv,1,2,3,pv\n", 2, "4 fields", "2 in '1,2'"),
    ("-1,2,3,pv\n", 1, "user to be a non-negative whole number", "'-1'"),
    ("1.5,2,3,pv\n", 1, "user to be a non-negative whole number", "'1.5'"),
    ("x,2,3,pv\n", 1, "user to be a non-negative whole number", "'x'"),
    (",2,3,pv\n", 1, "user to be a non-negative whole number", "''"),
    (" 1,2,3,pv\n", 1, "user to be a non-negative whole number", "' 1'"),
    ("1000000000000000000,2,3,pv\n", 1, "user to be a non-negative whole number", "'1000000000000000000'"),
    ("1,-,3,pv\n", 1, "change to be a whole number", "'-'"),
    ("1,--2,3,pv\n", 1, "change to be a whole number", "'--2'"),
    ("1,2.0,3,pv\n", 1, "change to be a whole number", "'2.0'"),
    ("1,2,3,pv\n1,2,3.4.5,pv\n", 2, "rating to be a number such as 3 or 3.5", "'3.4.5'"),
    ("1,2,.,pv\n", 1, "rating to be a number", "'.'"),
    ("1,2,nan,pv\n", 1, "rating to be a number", "'nan'"),
    ("1,2,1e3,pv\n", 1, "rating to be a number", "'1e3'"),
    ("1,2,3,pv\n1,2,3,click\n", 2, "action to be one of pv, cart", "'click'"),
    ("1,2,3,pvpvpvpvpv\n", 1, "action to be one of pv, cart", "'pvpvpvpvpv'"),
    ("1,2,3,p\n", 1, "action to be one of pv, cart", "'p'"),
    ("1,2,3,pv\n1,2,3,pv", 2, "a line end after the last line", "'1,2,3,pv'"),
    ("", 1, "user, change, rating, action", "an empty file"),
]  # fmt: skip


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(("text", "line", "expected", "got"), WRONG_NUMBERS)
def test_wrong_numbers_are_named(tmp_path, text, line, expected, got, block):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(number_blocks(path, COLUMNS, block_bytes=block))
    message = str(error.value)
    assert message.startswith(f"{path}, line {line}: expected {expected}") and message.endswith(f", got {got}")


@pytest.mark.parametrize(("text", "line", "expected"), [
    ("a,c\n1,2\n", 1, "a header with a column 'b', got no such name in 'a,c'"),
    ("a,b,b\n1,2,3\n", 1, "a header with a column 'b', got more than one"),
    ("a,b\n", 2, "at least one row of a, b, got the end of the file"),
    ("a,b\n1,2\n1,x\n", 3, "b to be a non-negative whole number, got 'x'"),
])  # fmt: skip
def test_wrong_headers_are_named(tmp_path, text, line, expected):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(number_blocks(path, {"a": "id", "b": "id"}, header=True))
    assert str(error.value) == f"{path}, line {line}: expected {expected}"


def test_missing_file_is_named(tmp_path):
    for read in (number_blocks(tmp_path / "no.csv", {"a": "id"}), text_rows(tmp_path / "no.csv", ("a",))):
        with pytest.raises(DataError, match=r"no\.csv: expected a file with a, got no such file"):
            list(read)


def test_memory_stays_bounded(tmp_path):
    path = tmp_path / "large.csv"
    path.write_bytes(b"123456,123456,4.5,964980499\n" * 400_000)
    tracemalloc.start()
    rows = sum(len(b["a"]) for _, b in number_blocks(path, dict.fromkeys("abcd", "decimal"), block_bytes=1 << 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 400_000 and peak < path.stat().st_size / 3


def test_quoted_text(tmp_path):
    path = tmp_path / "movies.csv"
    path.write_text('id,title\n1,"Me, Myself ""and"" I"\n2,"two\nlines"\n3,plain\n')
    assert list(text_rows(path, ("title", "id"), header=True, quoted=True)) == [
        (2, ['Me, Myself "and" I', "1"]),
        (3, ["two\nlines", "2"]),
        (5, ["plain", "3"]),
    ]


def test_plain_text_keeps_odd_characters_and_passes_over_blank_lines_at_the_end(tmp_path):
    path = tmp_path / "u.item"
    path.write_bytes("1|Caf\xe9\x85 (1995)\r\n2|B\n\n\n".encode("latin-1"))
    assert list(text_rows(path, ("id", "title"), separator="|", encoding="latin-1")) == [
        (1, ["1", "Caf\xe9\x85 (1995)"]),
        (2, ["2", "B"]),
    ]


@pytest.mark.parametrize(("data", "line", "expected"), [
    (b"1,a\n2\n", 2, "2 fields (id, title), got 1 in '2'"),
    (b"1,a\n\n2,b\n", 2, "2 fields (id, title), got an empty line"),
    (b"1,a\n2,\xff\n", 2, "text in utf-8, got the byte 0xff"),
    (b'1,a\n2,"b\n', 2, "a row of quoted CSV, got a row that is not: unexpected end of data"),
    (b"1,a\n2,b", 2, "a line end after the last line (a file without one may be cut off), got '2,b'"),
    (b"\n", 1, "id, title, got an empty file"),
])  # fmt: skip
def test_wrong_text_is_named(tmp_path, data, line, expected):
    path = tmp_path / "bad.csv"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        list(text_rows(path, ("id", "title"), quoted=True))
    assert str(error.value) == f"{path}, line {line}: expected {expected}"
