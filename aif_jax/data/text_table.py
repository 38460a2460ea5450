"""Strict readers of delimited text: every value is checked, and a bad one is named by file, line, expected and got.

Two readers: `number_blocks` for large tables of numbers (vectorised over blocks of lines, bounded memory) and `text_rows` for
small tables with free text. Both want a line end after the last line: a file that was cut off would otherwise pass.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
from tqdm import tqdm

Kind: TypeAlias = Literal["id", "integer", "decimal"] | tuple[str, ...]
"""What a column holds: "id" (digits only), "integer", "decimal" (no exponent), or one of some words of up to 8 bytes."""

MEANING = {"id": "a non-negative whole number", "integer": "a whole number", "decimal": "a number such as 3 or 3.5"}
MAX_DIGITS = 18  # what an int64 surely holds
NEWLINE, DOT, MINUS, ZERO = (ord(c) for c in "\n.-0")


class DataError(ValueError):
    """A file that is not what its format says. The message names file, line, what was expected and what came."""

    def __init__(self, path: str | os.PathLike, line: int | None, expected: str, got: str):
        super().__init__(f"{path}{f', line {line}' if line else ''}: expected {expected}, got {got}")


def number_blocks(
    path: str | os.PathLike,
    columns: Mapping[str, Kind],
    *,
    separator: str = ",",
    header: bool = False,
    block_bytes: int = 1 << 22,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Reads a table of numbers block by block.

    Args:
      path: the file; lines end in LF or CRLF, a UTF-8 byte order mark is skipped.
      columns: name to kind. Without a header these are all the file's fields, in order; with one they are looked up by name,
        other columns are passed over, and a RecBole type suffix (`user_id:token`) is no part of the name.
      separator: one or more characters; there is no quoting.
      header: whether the first line holds the names.
      block_bytes: how much text is parsed at a time.

    Yields:
      (line number of the block's first row, name to array [rows]): int32 or int64 for "id", int64 for "integer",
      float64 for "decimal", int32 position in the tuple for words.

    Raises:
      DataError: no such file, empty file, no rows, missing column, wrong field count, or a value that is not of its kind.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "ratings.csv"
      >>> _ = path.write_text("userId,movieId,rating\\n7,30,4.5\\n8,31,x\\n")
      >>> try:
      ...     list(number_blocks(path, {"movieId": "id", "rating": "decimal"}, header=True))
      ... except DataError as error:
      ...     print(str(error).replace(str(path), "ratings.csv"))
      ratings.csv, line 3: expected rating to be a number such as 3 or 3.5, got 'x'
    """
    path = Path(path)
    first, wanted = 1, ", ".join(columns)
    names = list(columns)
    for data in _line_blocks(path, block_bytes, wanted):
        if header and first == 1:
            line, _, data = data.partition(b"\n")
            names = _header(path, line.decode("utf-8", "replace").split(separator), columns)
            first = 2
            if not data:
                continue
        yield first, _parse_block(path, first, data, names, columns, separator.encode())
        first += data.count(b"\n")
    if header and first == 2:
        raise DataError(path, 2, f"at least one row of {wanted}", "the end of the file")


def text_rows(
    path: str | os.PathLike,
    columns: tuple[str, ...],
    *,
    separator: str = ",",
    header: bool = False,
    quoted: bool = False,
    encoding: str = "utf-8",
) -> Iterator[tuple[int, list[str]]]:
    """Reads a table of text row by row; meant for tables that fit in memory.

    Args:
      path: the file; lines end in LF or CRLF. Blank lines at the end are passed over.
      columns: names; without a header all the file's fields in order, with one looked up by name as in `number_blocks`.
      separator: one or more characters.
      header: whether the first line holds the names.
      quoted: CSV quoting with double quotes (a field may then hold separators and line ends).
      encoding: of the whole file; a byte that does not fit is an error.

    Yields:
      (line number where the row starts, fields in the order of `columns`).

    Raises:
      DataError: no such file, empty file, missing column, wrong field count, bad quoting or bad encoding.
    """
    path = Path(path)
    text = _decode(path, encoding, ", ".join(columns))
    rows = _quoted_rows(path, text, separator) if quoted else _plain_rows(text, separator)
    names, at = list(columns), list(range(len(columns)))
    for line, row in rows:
        if header:
            names, header = _header(path, row, columns), False
            at = [names.index(column) for column in columns]
            continue
        if len(row) != len(names):
            _wrong_count(path, line, names, len(row), separator.join(row))
        yield line, [row[i] for i in at]


def whole_number(path: str | os.PathLike, line: int, name: str, text: str) -> int:
    """The non-negative whole number that `text` is; else a DataError for that line."""
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise DataError(path, line, f"{name} to be {MEANING['id']}", _shown(text))
    return int(text)


def _line_blocks(path: Path, block_bytes: int, wanted: str) -> Iterator[bytes]:
    """Blocks of whole lines, each line ended by LF."""
    if not path.is_file():
        raise DataError(path, None, f"a file with {wanted}", "no such file")
    size = path.stat().st_size
    if not size:
        raise DataError(path, 1, wanted, "an empty file")
    rest, lines = b"", 0
    # the bar appears for files that take more than a moment
    with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=path.name, delay=2, leave=False) as bar:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        while data := file.read(block_bytes):
            bar.update(len(data))
            head, newline, tail = data.rpartition(b"\n")
            if not newline:
                rest += tail
                continue
            block, rest = rest + head + newline, tail
            lines += block.count(b"\n")
            yield block.replace(b"\r\n", b"\n") if b"\r" in block else block
    if rest:
        _no_line_end(path, lines + 1, rest.decode("utf-8", "replace"))


def _parse_block(
    path: Path, first: int, data: bytes, names: list[str], columns: Mapping[str, Kind], separator: bytes
) -> dict[str, np.ndarray]:
    original = data
    if len(separator) > 1:  # one byte stands for it, which then stands for nothing else
        data, separator = data.replace(b"\x1f", b"?").replace(separator, b"\x1f"), b"\x1f"
    text = np.frombuffer(data, np.uint8)
    stop = np.flatnonzero((text == NEWLINE) | (text == separator[0]))
    per_line = np.diff(np.flatnonzero(text[stop] == NEWLINE), prepend=-1)
    if (per_line != len(names)).any():
        row = int(np.flatnonzero(per_line != len(names))[0])
        line = original.split(b"\n", row + 1)[row].decode("utf-8", "replace")
        _wrong_count(path, first + row, names, int(per_line[row]), line)
    start = np.concatenate([[0], stop[:-1] + 1]).reshape(-1, len(names))
    stop = stop.reshape(-1, len(names))
    parsed = {}
    for name, kind in columns.items():
        at = names.index(name)
        values, bad = _parse_column(text, start[:, at], stop[:, at], kind)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            meaning = MEANING[kind] if isinstance(kind, str) else f"one of {', '.join(kind)}"
            field = data[start[row, at] : stop[row, at]].decode("utf-8", "replace")
            raise DataError(path, first + row, f"{name} to be {meaning}", _shown(field))
        parsed[name] = values
    return parsed


def _parse_column(text: np.ndarray, start: np.ndarray, stop: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Values and where they are bad, for the fields text[start:stop] of one column."""
    if not isinstance(kind, str):
        return _parse_words(text, start, stop, kind)
    length = stop - start
    bad = np.zeros(len(start), bool)
    negative = (text[start] == MINUS) & (kind != "id")
    start, length = start + negative, length - negative
    value = np.zeros(len(start), np.int64)
    digits = np.zeros(len(start), np.int64)
    point = np.full(len(start), -1, np.int64)  # how many digits stand before the decimal point
    for k in range(min(int(length.max()), MAX_DIGITS + 1)):
        inside = k < length
        char = text[np.minimum(start + k, len(text) - 1)]
        digit = char - np.uint8(ZERO)  # wraps round for characters below "0"
        is_digit = inside & (digit < 10)
        value = np.where(is_digit, value * 10 + digit, value)
        digits += is_digit
        other = inside & ~is_digit
        if kind == "decimal" and other.any():
            is_point = other & (char == DOT) & (point < 0)
            point = np.where(is_point, digits, point)
            other &= ~is_point
        bad |= other
    bad |= (digits == 0) | (length > MAX_DIGITS)
    if kind == "id":
        return (value.astype(np.int32) if value.max() < 2**31 else value), bad
    value = np.where(negative, -value, value)
    if kind == "integer":
        return value, bad
    return value / 10.0 ** np.where(point < 0, 0, digits - point), bad


def _parse_words(
    text: np.ndarray, start: np.ndarray, stop: np.ndarray, words: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Each field as one uint64 of its bytes, compared with those of the words."""
    length = stop - start
    packed = np.zeros(len(start), np.uint64)
    for k in range(min(int(length.max()), 8)):
        char = text[np.minimum(start + k, len(text) - 1)].astype(np.uint64)
        packed |= np.where(k < length, char << np.uint64(8 * k), np.uint64(0))
    code = np.full(len(start), -1, np.int32)
    for i, word in enumerate(words):
        code[(packed == int.from_bytes(word.encode(), "little")) & (length == len(word))] = i
    return code, code < 0


def _decode(path: Path, encoding: str, wanted: str) -> str:
    if not path.is_file():
        raise DataError(path, None, f"a file with {wanted}", "no such file")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(path, 1, wanted, "an empty file")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(path, line, f"text in {encoding}", f"the byte 0x{data[error.start]:02x}") from error
    text = text.replace("\r\n", "\n")
    if not text.endswith("\n"):
        _no_line_end(path, text.count("\n") + 1, text.rpartition("\n")[2])
    return text.rstrip("\n") + "\n"


def _plain_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    # not splitlines(): it also breaks at characters that titles hold, such as U+0085
    for number, line in enumerate(text[:-1].split("\n"), start=1):
        yield number, line.split(separator)


def _quoted_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for row in reader:
            yield line, row or [""]
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(path, line, "a row of quoted CSV", f"a row that is not: {error}") from error


def _header(path: Path, row: list[str], columns: Any) -> list[str]:
    names = [name.split(":")[0].strip() for name in row]
    for column in columns:
        if names.count(column) != 1:
            got = "more than one" if column in names else f"no such name in {_shown(','.join(names))}"
            raise DataError(path, 1, f"a header with a column {column!r}", got)
    return names


def _wrong_count(path: Path, line: int, names: list[str], count: int, text: str) -> NoReturn:
    got = f"{count} in {_shown(text)}" if text else "an empty line"
    raise DataError(path, line, f"{len(names)} fields ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})", got)


def _no_line_end(path: Path, line: int, text: str) -> NoReturn:
    raise DataError(path, line, "a line end after the last line (a file without one may be cut off)", _shown(text))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
