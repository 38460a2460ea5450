"""Where tables come from: Parquet, CSV and TSV files, folders of them, and tables in memory, as Arrow record batches.

A file is never held as a whole; rows keep their numbers for messages.

*Problems.* What is wrong with a table: every problem with file, row, column, expected and got, so that one reading lists all.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from aif_jax.checks import expect, needs_extra
from aif_jax.output import track

SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
ROWS = 1 << 16  # of a batch
UNIT_SEPARATOR = b"\x1f"  # replaces a separator of several characters

PathLike: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = "PathLike | TextFile | Mapping[str, Any] | Any"
"""A path to a file or a folder, a `TextFile`, a mapping of columns (arrays or lists), or Arrow: a table, a record batch, or a
reader of batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile:
    """A text file that its name does not describe.

    Example:
      >>> TextFile(path="ratings.dat", names=("user", "item", "rating", "time"), separator="::").separator
      '::'
    """

    path: PathLike  # ".gz" is unpacked
    names: tuple[str, ...] = ()  # of the columns, for a file without a header
    separator: str = ","  # between fields, one or more characters
    encoding: str = "utf8"
    quoted: bool = True  # whether double quotes keep separators within a field
    whole: bool = False  # refuses a last line without a line end, which may have been cut off


class TableBatch(NamedTuple):
    """Some rows of one file."""

    file: File
    types: Mapping[str, Any]  # Arrow type of each column that is there; in text what the first block looks like
    rows: np.ndarray  # int64 [n] row numbers, 1 for the first row of data of the file
    columns: Any  # Arrow record batch of those columns, strings in text; of `tables.blocks`: (values, good) by name

    @property
    def is_text(self) -> bool:
        """Whether the values are text that still has to be parsed."""
        return self.file.first_line is not None


def batches(source: Source, wanted: Sequence[str], problems: Problems, *, name: str) -> Iterator[TableBatch]:
    """Reads the columns `wanted` of a source; `problems` receives missing columns, unreadable files and broken rows.

    Raises ImportError without pyarrow, FileNotFoundError, ValueError for a file of another kind or a folder without files or
    with files of more than one kind, TypeError for no source.
    """
    if isinstance(source, TextFile):
        expect(Path(source.path).is_file(), f"{source.path}", "a file", "no such file", error=FileNotFoundError)
        files = [(Path(source.path).name, _text(source, wanted, problems))]
    elif isinstance(source, str | os.PathLike):
        files = ((file.name, _file(file, wanted, problems)) for file in files_of(source))
    else:
        files = [(name, _in_memory(source, wanted, problems, name))]
    for label, opened in files:
        with track(label=label, unit="rows", leave=False) as bar:
            for batch in opened:
                bar.update(len(batch.rows))
                yield batch


def files_of(path: PathLike) -> list[Path]:
    """The file itself, or the Parquet, CSV and TSV files under a folder in the order of their names, of one kind.

    Files and folders whose name begins with "." or "_" are left out: what a writer has not finished, such as `_temporary/`.
    """
    root = Path(path)
    if root.is_dir():
        names = (file.relative_to(root) for file in root.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        files = sorted(root / name for name in names if not any(part.startswith((".", "_")) for part in name.parts))
        if len({file.name.endswith(".parquet") for file in files}) != 1:
            raise ValueError(f"{root}: expected Parquet files or text files, one kind, got {[f.name for f in files[:8]]}")
        return files
    expect(root.exists(), str(root), "a file or folder", "no such file", error=FileNotFoundError)
    expect(root.name.endswith(SUFFIXES), str(root), f"a name that ends in one of {', '.join(SUFFIXES)}", repr(root.name))
    return [root]


def pyarrow(module: str = "pyarrow") -> Any:
    """A module of pyarrow. Raises ImportError with what to install where it is missing."""
    with needs_extra("reading raw data needs pyarrow", "data"):
        return importlib.import_module(module)


def _file(path: Path, wanted: Sequence[str], problems: Problems) -> Iterator[TableBatch]:
    if path.name.endswith(".parquet"):
        return _parquet(path, wanted, problems)
    separator = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    return _text(TextFile(path=path, separator=separator), wanted, problems)


def _parquet(path: Path, wanted: Sequence[str], problems: Problems) -> Iterator[TableBatch]:
    arrow, parquet, file = pyarrow(), pyarrow("pyarrow.parquet"), File(str(path))
    try:
        with parquet.ParquetFile(path) as opened:
            types = _present(file, opened.schema_arrow, wanted, problems)
            yield from _numbered(file, types, opened.iter_batches(batch_size=ROWS, columns=list(types)), problems)
    except (arrow.ArrowException, OSError) as error:
        problems.add("unreadable file", file, None, None, "a complete Parquet file", _first_line(error))


def _in_memory(source: Any, wanted: Sequence[str], problems: Problems, name: str) -> Iterator[TableBatch]:
    arrow, file = pyarrow(), File(name)
    if isinstance(source, Mapping):
        columns = {str(key): _array(values, f"{name}, column {key!r}") for key, values in source.items()}
        lengths = {key: len(column) for key, column in columns.items()}
        expect(len({*lengths.values()}) <= 1, name, "columns of one length", lengths)
        source = arrow.table(columns)
    if isinstance(source, arrow.RecordBatch):
        source = arrow.Table.from_batches([source])
    if not isinstance(source, arrow.Table | arrow.RecordBatchReader):
        raise TypeError(f"{name}: expected a path, a mapping of columns or an Arrow table, got {type(source).__name__}")
    types = _present(file, source.schema, wanted, problems)
    parts = source.to_batches() if isinstance(source, arrow.Table) else source
    slices = (part.slice(start, ROWS) for part in parts for start in range(0, part.num_rows, ROWS))
    yield from _numbered(file, types, (part.select(list(types)) for part in slices), problems)


def _numbered(
    file: File, types: Mapping[str, Any], parts: Iterable[Any], problems: Problems, broken: set[int] | None = None
) -> Iterator[TableBatch]:
    """Arrow record batches with the numbers of their rows; `broken` has the numbers of rows that the batches leave out."""
    first, broken = 1, set() if broken is None else broken
    for part in parts:
        rows = np.arange(first, first + part.num_rows + len(broken))
        rows = np.setdiff1d(rows, list(broken), assume_unique=True)[: part.num_rows] if broken else rows
        if part.num_rows:
            first = int(rows[-1]) + 1
            broken -= {number for number in broken if number < first}
            yield TableBatch(file, types, rows, part)
    if first == 1:
        problems.add("no rows", file, None, None, "at least one row", "none")


def _array(values: Any, name: str) -> Any:
    """A column in memory as an Arrow array; TypeError for numbers that Arrow does not hold, or booleans among numbers."""
    arrow = pyarrow()
    if isinstance(values, arrow.Array | arrow.ChunkedArray):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return arrow.FixedSizeListArray.from_arrays(arrow.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
    if isinstance(values, np.ndarray) and values.dtype.kind in "UT":
        return arrow.array(values.tolist(), arrow.large_string())
    is_plain = isinstance(values, np.ndarray) and values.dtype.kind != "O"
    kinds = set() if is_plain else set(map(type, values)) - {type(None)}
    if np.bool_ in kinds and kinds - {np.bool_, bool}:  # Arrow would make 1 of np.True_
        raise TypeError(f"{name}: expected values of one kind, got booleans among others")
    try:
        return arrow.array(values)
    except OverflowError as error:
        raise TypeError(f"{name}: expected integers from -2^63 to below 2^63, got larger ones") from error
    except arrow.ArrowException as error:
        raise TypeError(f"{name}: expected values that Arrow holds, got others: {error}") from error


def _text(text: TextFile, wanted: Sequence[str], problems: Problems) -> Iterator[TableBatch]:
    arrow, csv = pyarrow(), pyarrow("pyarrow.csv")
    file = File(str(text.path), first_line=1 if text.names else 2)
    header = file.first_line or 0
    broken: set[int] = set()

    def refuse(row: Any) -> str:
        number = row.number + 1 - header
        broken.add(number)
        got = f"{row.actual_columns} in {row.text.replace(UNIT_SEPARATOR.decode(), text.separator)!r}"
        problems.add("wrong number of fields", file, [number], None, f"{row.expected_columns}", got)
        return "skip"

    def opened(handler: Any, **options: Any) -> Any:
        delimiter = text.separator if len(text.separator) == 1 else UNIT_SEPARATOR.decode()
        # with threads a broken row does not know its number
        read = csv.ReadOptions(use_threads=False, column_names=list(text.names) or None, encoding=text.encoding)
        fields = {"delimiter": delimiter, "quote_char": '"' if text.quoted else False, "ignore_empty_lines": False}
        parse = csv.ParseOptions(**fields, invalid_row_handler=handler)
        return csv.open_csv(_characters(text), read_options=read, parse_options=parse, **options)

    try:
        with opened(lambda row: "skip") as reader:  # reads one block, which tells what the columns look like
            schema = reader.schema
        types = _present(file, schema, wanted, problems)
        strings = {name: arrow.string() for name in schema.names}
        convert = csv.ConvertOptions(
            column_types=strings, include_columns=list(types), strings_can_be_null=True, null_values=[""]
        )
        with opened(refuse, convert_options=convert) as reader:
            yield from _numbered(file, types, reader, problems, broken)
        if text.whole and (tail := _unended(text.path)):
            problems.add("cut off", file, None, None, "a line end after the last line", repr(tail))
    except (arrow.ArrowException, OSError) as error:
        expected = f"text {'without' if text.names else 'with'} a header in {text.encoding}"
        problems.add("unreadable file", file, None, None, expected, _first_line(error))


def _characters(text: TextFile) -> Any:
    """The file for Arrow, which knows separators of one character only."""
    separator, held = text.separator.encode(), b""
    if len(separator) == 1:
        return str(text.path)

    def translate(data: Any) -> bytes:
        nonlocal held
        if UNIT_SEPARATOR in bytes(data):
            raise ValueError(f"{text.path}: expected text without {UNIT_SEPARATOR.decode()!r}, got some; use another separator")
        joined = (held + bytes(data)).replace(separator, UNIT_SEPARATOR)
        # a separator may go on in the next piece; the last piece is empty
        cut = max((k for k in range(len(separator)) if joined.endswith(separator[:k])), default=0) if len(data) else 0
        held = joined[len(joined) - cut :]
        return joined[: len(joined) - cut]

    arrow = pyarrow()
    return arrow.TransformInputStream(arrow.input_stream(str(text.path)), translate)


def _unended(path: PathLike) -> str:
    """The end of a file whose last line has no line end; "" where it has one."""
    with pyarrow().input_stream(str(path)) as stream:
        tail = b""
        while data := stream.read(1 << 20):
            tail = data[-60:]
    return "" if tail.endswith(b"\n") else tail.rpartition(b"\n")[2].decode("utf8", "replace")


def _present(file: File, schema: Any, wanted: Sequence[str], problems: Problems) -> dict[str, Any]:
    """The Arrow types of the columns wanted; a problem for each that is not there once."""
    names = schema.names
    if file.first_line == 2 and wanted and not set(names) & set(wanted):
        way_out = "has the file a header? Add one, or name the columns by readers.TextFile(names=)"
        got = f"{', '.join(map(repr, names))[:200]}; {way_out}"
        problems.add("missing column", file, None, None, f"the columns {', '.join(map(repr, wanted))} in the first line", got)
        return {}
    for name in wanted:
        if names.count(name) != 1:
            got = "more than one" if name in names else f"the columns {', '.join(map(repr, names))}"
            made = re.fullmatch(
                r"events_(so_far|half_life_\d+|rate)(_.*)?|since_(first|last)_event", name
            )  # see `statistic_names`
            got += "; add the columns of `Dataset.statistic_columns(ids, time)`" if made else ""
            problems.add("missing column", file, None, name, "a column of this name", got)
    return {name: schema.field(name).type for name in wanted if names.count(name) == 1}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


CAP = 5  # how many problems of one kind are listed; the rest is counted
NAMED = 5  # problems that an error message lists, or one of each kind where there are more kinds

SKIPPED = ("unknown user", "unknown item", "unknown action", "unknown category")
"""Kinds of problems that `read(unknown="skip")` accepts."""


@dataclasses.dataclass(frozen=True)
class File:
    """The name of a table in messages; `first_line` is that of the first row of data of a text file, else None."""

    name: str
    first_line: int | None = None

    def __str__(self) -> str:
        return self.name

    def place(self, row: int) -> str:
        """A row by its number, 1 for the first: "row 3", or "line 4" of a text file with a header."""
        return f"row {row}" if self.first_line is None else f"line {row - 1 + self.first_line}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # "null", "negative id", "missing column", "wrong type", "unknown category", ...
    file: str  # the path
    row: int | None  # which row of data, 1 for the first; None where the problem is the file's or the column's
    column: str | None  # None where the problem is the row's or the file's
    expected: str  # in words
    got: str
    where: str  # file and row; in text files the line

    def __str__(self) -> str:
        column = "" if self.column is None else f", column {self.column!r}"
        return f"{self.where}{column}: {self.kind}: expected {self.expected}, got {self.got}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suspicion:
    """Something that `read` accepts and that is seldom meant, such as a file that is there twice."""

    kind: str  # "repeated event", "future event", "outlier", ...: the table in `check` has all
    file: str  # the path
    column: str | None  # None where the suspicion is that of several columns
    got: str  # in words, with counts and examples

    def __str__(self) -> str:
        column = "" if self.column is None else f", column {self.column!r}"
        return f"{self.file}{column}: {self.kind}: {self.got}"


class Problems:
    """Collects problems: the first `cap` of each kind, and the number of all."""

    def __init__(self, cap: int = CAP):
        expect(cap >= 1, "cap", "at least 1 problem of a kind", cap)
        self.cap = cap
        self._listed: dict[str, list[Problem]] = collections.defaultdict(list)
        self.totals: collections.Counter[str] = collections.Counter()  # how many there are of each kind, listed or not

    def add(
        self, kind: str, file: File, rows: Sequence[int] | np.ndarray | None, column: str | None, expected: str, got: Any
    ) -> None:
        """One problem for each of `rows` (ascending, 1 for the first row of data), or one of the file where that is None.

        `got` is one text for all rows, or an iterable of one for each, of which only those listed are drawn.
        """
        numbers: Any = [None] if rows is None else rows
        if not len(numbers):
            return
        self.totals[kind] += len(numbers)
        room = max(0, self.cap - len(self._listed[kind]))
        texts = itertools.repeat(got) if isinstance(got, str) else iter(got)
        for row, text in zip(numbers[:room], texts, strict=False):
            number = None if row is None else int(row)
            where = file.name if number is None else f"{file}, {file.place(number)}"
            self._listed[kind].append(
                Problem(kind=kind, file=file.name, row=number, column=column, expected=expected, got=str(text), where=where)
            )

    def drop(self, kind: str) -> None:
        """Forgets the problems of one kind."""
        self.totals.pop(kind, None)
        self._listed.pop(kind, None)

    def listed(self) -> list[Problem]:
        """The problems listed, kind by kind, those of one kind by file and row."""
        return [p for listed in self._listed.values() for p in sorted(listed, key=lambda p: (p.file, p.row or 0))]

    def expect_none(self) -> None:
        """Raises ValueError where there is any problem: names the first problems, at least one of each kind."""
        if not self.totals:
            return
        kinds = {kind: listed[0] for kind, listed in self._listed.items()}
        more = [problem for problem in self.listed() if problem is not kinds[problem.kind]]
        shown = [*kinds.values(), *more][: max(NAMED, len(kinds))]
        count = self.totals.total()
        text = f"\n({count} problems in all; `aif-jax check` lists them)" if count > 1 else ""
        raise ValueError("\n".join(str(problem) for problem in shown) + text)
