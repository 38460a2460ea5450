"""Tables: Parquet, CSV and TSV files, folders of them and tables in memory, as checked columns.

Arrow batches become one NumPy array a column; no file is held whole. One reading checks every value and lists all problems.
"""

import bisect
import collections
import dataclasses
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from aif_jax.checks import expect, needs_extra
from aif_jax.encoding.columns import CODED, Columns, Kind
from aif_jax.encoding.times import FLOOR, PER_SECOND, dates_as_numbers, likely_unit, quoted, rescaled, wrong_unit
from aif_jax.encoding.vocabulary import WHOLE, IdKind, id_array
from aif_jax.output import track

SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
ROWS = 1 << 16  # of a batch
MERGE_AT = 1 << 20  # distinct values of batches that are merged at a time
PRESENT = ("id", "action")  # coded kinds where null is wrong
STATISTIC = r"events_(so_far|half_life_\d+|rate)(_.*)?|since_(first|last)_event"  # names of `schema.statistic_names`
MISSING_TIME = np.iinfo(np.int64).min


def pyarrow(module: str = "pyarrow") -> Any:
    """Return a module of pyarrow. Raises ImportError with what to install where it is missing."""
    if (loaded := sys.modules.get(module)) is not None:  # 20 times as fast, which counts where one item is encoded
        return loaded
    with needs_extra("reading raw data needs pyarrow", "data"):
        return importlib.import_module(module)


readers: collections.deque[Any] = collections.deque(maxlen=2)  # the last: an Arrow thread that frees one as Python ends aborts
CAP = 5  # how many problems of one kind are listed; the rest is counted
HIVE = "pyarrow.dataset.dataset(FOLDER, partitioning='hive').scanner().to_reader()"
NAMED = 5  # problems that an error message lists, or one of each kind where there are more kinds

SKIPPED = ("unknown user", "unknown item", "unknown action", "unknown category")
"""Kinds of problems that `read(unknown="skip")` accepts."""


@dataclasses.dataclass(frozen=True, eq=False)
class File:
    """A table in messages: its name, and whether it is a text file, with a header in its first line."""

    name: str
    is_text: bool = False
    broken: list[int] = dataclasses.field(default_factory=list)  # numbers of rows that the parser left out so far, ascending

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Return row numbers of places among the rows read: 1, 3, 4, 6 of the places 0, 1, 2, 3 with rows 2 and 5 broken."""
        before = np.array(self.broken, int) - np.arange(len(self.broken)) - 1  # rows read before each broken one
        return places + 1 + np.searchsorted(before, places, side="right")

    def locate(self, row: int) -> str:
        """Return a row by its number, 1 for the first: "row 3"; a row of text may take several lines, if breaks are quoted."""
        return f"row {row} after the header" if self.is_text else f"row {row}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # "null", "negative id", "missing column", "wrong type", "unknown category", ...
    file: str  # the path
    row: int | None  # which row of data, 1 for the first; None where the problem is the file's or the column's
    column: str | None  # None where the problem is the row's or the file's
    expected: str  # in words
    got: str
    where: str  # file and row

    def __str__(self) -> str:
        column = "" if self.column is None else f", column {self.column!r}"
        return f"{self.where}{column}: {self.kind}: expected {self.expected}, got {self.got}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suspicion:
    """Something that `read` accepts and that is seldom meant, such as a file that is there twice."""

    kind: str  # "duplicate event", "future event", "outlier", ...: the table in `check` has all
    file: str  # the path
    column: str | None  # None for several columns
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
        """Note one problem for each of `rows` (ascending, 1 for the first row of data), or one of the file where that is None.

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
            where = file.name if number is None else f"{file.name}, {file.locate(number)}"
            self._listed[kind].append(
                Problem(kind=kind, file=file.name, row=number, column=column, expected=expected, got=str(text), where=where)
            )

    def listed(self) -> list[Problem]:
        """Return the problems listed, by kind, then by file and row."""
        return [p for listed in self._listed.values() for p in sorted(listed, key=lambda p: (p.file, p.row or 0))]

    def expect_none(self, *accepted: str, lists_all: str = "") -> None:
        """Drop problems of `accepted` kinds for good; raise ValueError where there are others. `lists_all` names a command."""
        for kind in accepted:
            self.totals.pop(kind, None)
            self._listed.pop(kind, None)
        if not self.totals:
            return
        kinds = {kind: listed[0] for kind, listed in self._listed.items()}
        more = [problem for problem in self.listed() if problem is not kinds[problem.kind]]
        shown, count = [*kinds.values(), *more][: max(NAMED, len(kinds))], self.totals.total()
        text = f"\n({count} problems in all{lists_all and f'; `{lists_all}` lists them'})" if count > 1 else ""
        raise ValueError("\n".join(str(problem) for problem in shown) + text)


Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Any
"""A path to a file or a folder, a mapping of columns (arrays or lists), or Arrow: a table, a record batch, a data frame that
gives its columns as Arrow (Polars, pandas), or a reader of batches, such as `pyarrow.csv.open_csv` gives of text without a
header or with other separators."""


class TableBatch(NamedTuple):
    """Some rows of one file."""

    file: File
    start: int  # place of the first row among those of the file
    types: Mapping[str, Any]  # Arrow type of each column that is there; in text what the first block looks like
    columns: Any  # Arrow record batch of those columns; of a text file strings that still have to be parsed


def batches(source: Source, wanted: Sequence[str], problems: Problems, *, name: str) -> Iterator[TableBatch]:
    """Read the columns `wanted` of a source; `problems` receives missing columns, unreadable files and broken rows.

    Raises ImportError without pyarrow, FileNotFoundError, ValueError for a file of another kind or a folder without files or
    with files of more than one kind, TypeError for no source.
    """
    arrow, file = pyarrow(), File(name)
    if isinstance(source, str | os.PathLike):
        files = ((File(str(path), is_text=not path.name.endswith(".parquet")), path) for path in files_of(source))
        opened = ((file, (_text if file.is_text else _parquet)(file, path, wanted, problems)) for file, path in files)
    else:
        opened = [(file, _in_memory(file, source, wanted, problems))]
    some = False  # rows or a problem: of several files one may have a header alone, as of a day without events
    for file, parts in opened:
        start, expected = 0, "text with a header in utf8" if file.is_text else "complete Parquet or Arrow data"
        with track(label=file.name, unit="rows", leave=False) as bar:
            try:
                for types, part in parts:
                    bar.update(part.num_rows)
                    if part.num_rows:
                        some = True
                        yield TableBatch(file, start, types, part)
                    start += part.num_rows
            except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
                first = (str(error).splitlines() or [""])[0]
                problems.add("unreadable file", file, None, None, expected, f"{type(error).__name__}: {first}")
                some = True
    if not some:
        got = "none; a reader gives its rows once" if isinstance(source, arrow.RecordBatchReader) else "none"
        problems.add("no rows", file, None, None, "at least one row", got)


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the file itself, or the Parquet, CSV and TSV files under a folder in the order of their names, of one kind.

    Names that begin with "." or "_" are left out: what a writer has not finished. Others, links to folders too, are refused.
    """
    root = Path(path)
    expect(root.exists(), str(root), "a file or folder", "no such file", error=FileNotFoundError)
    under = root.rglob("*") if root.is_dir() else [root]
    names = [path.relative_to(root) for path in under if path.is_symlink() or not path.is_dir()]
    files = sorted(root / name for name in names if not any(part.startswith((".", "_")) for part in name.parts))
    other = [file.name for file in files if not file.name.endswith(SUFFIXES) or (file != root and not file.is_file())]
    expected = f"files {', '.join(SUFFIXES)}, no pipes or links to folders; names that begin with '_' or '.' are left out"
    expect(not other, str(root), expected, other[:8])
    kinds = {file.name.endswith(".parquet") for file in files}
    expect(len(kinds) == 1, str(root), "Parquet files or text files, one kind", [file.name for file in files[:8]])
    return files


Parts: TypeAlias = Iterator[tuple[Mapping[str, Any], Any]]
"""`TableBatch.types`, and Arrow record batches."""


def _parquet(file: File, path: Path, wanted: Sequence[str], problems: Problems) -> Parts:
    with pyarrow("pyarrow.parquet").ParquetFile(path, page_checksum_verification=True) as opened:
        types = _present(file, opened.schema_arrow, wanted, problems)
        yield from ((types, part) for part in opened.iter_batches(batch_size=ROWS, columns=list(types)))


def _in_memory(file: File, source: Any, wanted: Sequence[str], problems: Problems) -> Parts:
    arrow, name = pyarrow(), file.name
    if isinstance(source, Mapping):
        columns = {str(key): _array(values, f"{name}, column {key!r}") for key, values in source.items()}
        lengths = {key: len(column) for key, column in columns.items()}
        expect(len({*lengths.values()}) <= 1, name, "columns of one length", lengths)
        source = arrow.table(columns)
    if hasattr(source, "__arrow_c_stream__") and not isinstance(source, arrow.RecordBatchReader):
        source = arrow.table(source)  # of a record batch or a data frame
    if not isinstance(source, arrow.Table | arrow.RecordBatchReader):
        raise TypeError(f"{name}: expected a path, a mapping of columns or an Arrow table, got {type(source).__name__}")
    types = _present(file, source.schema, wanted, problems)
    parts = source.to_batches(max_chunksize=ROWS) if isinstance(source, arrow.Table) else source
    yield from ((types, part.select(list(types))) for part in parts)


def _array(values: Any, name: str) -> Any:
    """Return column in memory as an Arrow array; TypeError for values that Arrow does not hold."""
    arrow = pyarrow()
    if isinstance(values, arrow.Array | arrow.ChunkedArray):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return arrow.FixedSizeListArray.from_arrays(arrow.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
    if isinstance(values, np.ndarray) and values.dtype.kind in "UT":
        return arrow.array(values.tolist(), arrow.large_string())
    expect(hasattr(values, "__len__"), name, "a list or an array", f"{values!r:.80}", error=TypeError)
    kinds = set() if isinstance(values, np.ndarray) and values.dtype.kind != "O" else set(map(type, values)) - {type(None)}
    if np.bool_ in kinds and kinds - {np.bool_, bool}:  # Arrow would make 1 of np.True_
        raise TypeError(f"{name}: expected values of one kind, got booleans among others")
    try:
        return arrow.array(values, from_pandas=float in kinds and len(kinds) > 1)  # NaN among others is a missing value
    except (OverflowError, arrow.ArrowException) as error:
        raise TypeError(f"{name}: expected values that Arrow holds, got others: {error}") from error


def _text(file: File, path: Path, wanted: Sequence[str], problems: Problems) -> Parts:
    arrow, csv = pyarrow(), pyarrow("pyarrow.csv")

    def refuse(row: Any) -> str:
        file.broken.append(row.number - 1)  # which counts the header
        got = f"{row.actual_columns} in {row.text!r}"
        problems.add("wrong number of fields", file, [row.number - 1], None, f"{row.expected_columns}", got)
        return "skip"

    def opened(handler: Any, **options: Any) -> Any:
        mark = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
        parse = csv.ParseOptions(delimiter=mark, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=handler)
        # with threads a broken row does not know its number
        readers.append(csv.open_csv(str(path), read_options=csv.ReadOptions(use_threads=False), parse_options=parse, **options))
        return readers[-1]

    with opened(lambda row: "skip") as reader:  # first one block in types that Arrow infers, then all of the file as text
        types, strings = _present(file, reader.schema, wanted, problems), dict.fromkeys(reader.schema.names, arrow.string())
    convert = csv.ConvertOptions(column_types=strings, include_columns=list(types), strings_can_be_null=True, null_values=[""])
    with opened(refuse, convert_options=convert) as reader:
        yield from ((types, part) for part in reader)


def _present(file: File, schema: Any, wanted: Sequence[str], problems: Problems) -> dict[str, Any]:
    """Return the Arrow types of the columns wanted; a problem for each that is not there once."""
    names = schema.names
    if file.is_text and wanted and not set(names) & set(wanted):
        way_out = "has the file a header? Add one, or give pyarrow.csv.open_csv(...), which takes column_names and a delimiter"
        got = f"{', '.join(map(repr, names))[:200]}; {way_out}"
        problems.add("missing column", file, None, None, f"the columns {', '.join(map(repr, wanted))} in the first line", got)
        return {}
    for name in wanted:
        if names.count(name) != 1:
            got = "more than one" if name in names else f"the columns {', '.join(map(repr, names))}"
            got += "; add the columns of `Dataset.statistic_columns(ids, time)`" if re.fullmatch(STATISTIC, name) else ""
            got += f"; of {name}=... in its path, give {HIVE}" if f"{name}=" in file.name else ""
            problems.add("missing column", file, None, name, "a column of this name", got)
    return {name: schema.field(name).type for name in wanted if names.count(name) == 1}


class Cells(NamedTuple):
    """The values of one column in a batch, with their rows."""

    values: Any  # Arrow array
    start: int  # place of the first row in the file
    file: File
    column: str
    problems: Problems
    width: int = 1  # values of a row

    def note(self, kind: str, wrong: np.ndarray, expected: str, got: Any) -> None:
        """Add a problem for each value that is `wrong`, bool [n]."""
        rows = self.file.numbers(self.start + np.flatnonzero(wrong) // self.width)
        self.problems.add(kind, self.file, rows, self.column, expected, got)

    def valid(self) -> np.ndarray:
        """Return bool [n], which values are not null."""
        return self.values.is_valid().to_numpy(zero_copy_only=False)

    def note_nulls(self, expected: str) -> None:
        """Add a problem for each null."""
        if self.values.null_count:
            self.note("null", ~self.valid(), expected, "nothing")

    def cast(self, target: Any, expected: str) -> Self:
        """Return the values as another Arrow type; null, with a problem, where one is no such value."""
        arrow, values = pyarrow(), self.values
        good = np.ones(len(values), bool)

        def parse(start: int, stop: int) -> list[Any]:  # by halves, so that a few bad values cost a few tries
            try:
                return [values[start:stop].cast(target, safe=not arrow.types.is_floating(target))]  # no integer is too large
            except arrow.ArrowInvalid:
                if stop - start == 1:
                    good[start] = False
                    return [arrow.nulls(1, target)]
                middle = (start + stop) // 2
                return parse(start, middle) + parse(middle, stop)

        parsed = self._replace(values=arrow.chunked_array(parse(0, len(values)), target).combine_chunks())
        self.note("wrong type", ~good, expected, (repr(values[int(row)].as_py()) for row in np.flatnonzero(~good)))
        return parsed

    def floats(self, *, optional: bool) -> np.ndarray:
        """Return float32 [n], NaN where there is no value, which is a problem unless `optional`."""
        if not optional:
            self.note_nulls("a number")
        parsed = self.cast(pyarrow().float64(), "a number")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            array = (given := parsed.values.to_numpy(zero_copy_only=False)).astype(np.float32)
        wrong = np.isinf(array) if optional else ~np.isfinite(array) & parsed.valid()
        self.note("not finite", wrong, "a finite float32", map(str, given[wrong]))
        array[wrong] = np.nan
        return array

    def vectors(self, width: int) -> np.ndarray:
        """Return float32 [n, E], NaN in wrong rows; E is `width`, or for 0 the length of the first list."""
        self.note_nulls("a list of numbers")
        lengths, good = self.values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), self.valid()
        width = width or (max(1, int(lengths[good][0])) if good.any() else 0)
        wrong = good & (lengths != width)
        self.note("wrong length", wrong, f"{width} numbers like the encoder or the rows before", map(str, lengths[wrong]))
        good &= ~wrong
        array = np.full((len(good), width), np.nan, np.float32)
        numbers = self.values.flatten().cast(pyarrow().float32(), safe=False).to_numpy(zero_copy_only=False)
        array[good] = numbers[np.repeat(good, lengths)].reshape(np.count_nonzero(good), width)
        wrong = good & ~np.isfinite(array).all(1)
        self.note("not finite", wrong, "a finite float32", (str(row[~np.isfinite(row)][0]) for row in array[wrong]))
        return array

    def times(self, unit: str, looks: Any) -> tuple[np.ndarray, bool]:
        """Return times int64 [n] in `unit`, MISSING_TIME where there is none; and whether finer ones were rounded down.

        `looks` is the Arrow type of the column, which says of text whether it holds dates.
        """
        arrow, cells = pyarrow(), self
        cells.note_nulls("a time")
        if cells.file.is_text:
            zone = getattr(looks, "tz", None)
            date = arrow.timestamp("ns", zone), f"a date and time from 1823 to 2099, with{'' if zone else 'out'} a zone"
            number = arrow.int64(), "a whole number, or a date and time, all of them with a zone or none"
            cells = cells.cast(*(date if is_dated(looks) else number))
        values, dated = cells.values, is_dated(cells.values.type)
        if arrow.types.is_date(values.type):
            values = values.cast(arrow.timestamp("s" if arrow.types.is_date32(values.type) else "ms"))
        given = values.type.unit if dated else unit
        values = values if arrow.types.is_uint64(values.type) else values.cast(arrow.int64())
        array, valid = values.fill_null(0).to_numpy(zero_copy_only=False), cells.valid()
        some, like = array[valid], dates_as_numbers  # all times of a batch: single ones may look so; the first is quick
        numbers = valid & bool(not dated and len(some) and like(some[:1]).all() and like(some).all())
        late, coarse, ancient = (bad & valid & ~numbers for bad in wrong_unit(array, unit=given, dated=dated))
        least = f"times of at least {quoted(FLOOR * PER_SECOND[given], given, dated=dated)}"
        hint = "" if dated else ", which looks like {!r}"
        for bad, expected, text in (
            (numbers, "times (dates such as '2024-05-01')", ", a date written as a number"),
            (late, "times before 2100", hint),
            (coarse, "times that look like no coarser unit", hint),
            (ancient, least, ""),
        ):
            got = (f"{quoted(v, given, dated=dated)}{text.format(likely_unit(int(v)))}" for v in array[bad])
            self.note("time unit", bad, f"{expected} in {given!r}", got)
        good = valid & ~late & ~ancient & ~numbers  # coarse ones are noted, and still fit for the profile of `check`
        array = np.where(good, array, 0).astype(np.int64)
        times = rescaled(array, given=given, unit=unit)
        return np.where(good, times, MISSING_TIME), bool((rescaled(times, given=unit, unit=given) != array).any())

    def coded(self, *, text: bool) -> Any:
        """Return categorical values as an Arrow dictionary array of int64 or large_string; `text` makes text of numbers."""
        arrow, test, values = pyarrow(), pyarrow("pyarrow.types"), self.values
        if test.is_null(values.type):
            values = values.cast(arrow.int64())
        if not text and (test.is_uint64(values.type) or test.is_decimal(values.type)):
            values = self.cast(arrow.int64(), "an integer below 2^63, or text by Columns.text").values
        coded = values.dictionary_encode()
        target = arrow.large_string() if text or is_text(coded.dictionary.type) else arrow.int64()
        return arrow.DictionaryArray.from_arrays(coded.indices.cast(arrow.int32()), coded.dictionary.cast(target))

    def bags(self, columns: Columns) -> tuple[Any, int]:
        """Return `coded` of the first `bag_length` values of rows, [n * bag_length] with nulls; and how many have more."""
        arrow, compute, values, length = pyarrow(), pyarrow("pyarrow.compute"), self.values, columns.bag_length
        if arrow.types.is_null(values.type) or is_text(values.type):
            mark = re.escape(columns.bag_separator)  # one between two values, none at the ends: empty pieces are no values
            spare = f"^({mark})+|({mark})+$|({mark})({mark})+"
            values = compute.replace_substring_regex(values.cast(arrow.large_string()), spare, r"\3")
            values = compute.split_pattern(compute.if_else(compute.equal(values, ""), None, values), columns.bag_separator)
        first = compute.list_slice(values, 0, length, return_fixed_size_list=True)  # nulls where there are fewer
        lengths = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        coded = self._replace(values=plain(first.values), width=length).coded(text=self.column in columns.text)
        return coded, int(np.count_nonzero(lengths > length))


def plain(values: Any) -> Any:
    """Return an Arrow array as no dictionary, which may list unused values and null, and no view, which few functions take."""
    if pyarrow().types.is_dictionary(values.type):
        return plain(values.dictionary).take(values.indices)
    return values.cast(pyarrow().large_string()) if pyarrow().types.is_string_view(values.type) else values


def is_text(type_: Any) -> bool:
    """Return whether an Arrow type is one of text."""
    return str(type_) in ("string", "large_string", "string_view")


def is_dated(type_: Any) -> bool:
    """Return whether an Arrow type is one of dates or timestamps."""
    return type_ is not None and (pyarrow().types.is_timestamp(type_) or pyarrow().types.is_date(type_))


def expected_type(type_: Any, kind: Kind, *, parsed: bool, named: bool) -> str:
    """Return the type expected of a column, "" if the Arrow type fits; `parsed` from text, `named` in `Columns.text`."""
    test = pyarrow("pyarrow.types")
    listed = test.is_list(type_) or test.is_large_list(type_) or test.is_fixed_size_list(type_)
    value = type_.value_type if listed else type_
    value = value.value_type if test.is_dictionary(value) else value
    number = test.is_floating(value) or test.is_decimal(value)
    boolean, empty = test.is_boolean(value), test.is_null(value)
    integer = test.is_integer(value) or (kind != "time" and (boolean or (test.is_decimal(value) and value.scale == 0)))
    words = is_text(value) or empty or (parsed and (not number or named))  # text may look like dates
    # booleans can be an attribute, and name nobody
    names = (words or integer) and not listed and not (boolean and kind == "id")
    bag = parsed or is_text(value) or empty or (listed and integer)
    fits, expected = {
        "vector": (listed and (empty or integer or number), "lists of numbers, of Parquet or a table in memory"),
        "bag": (bag, "lists of integers or text, or text to be split"),
        "time": ((parsed or empty or integer or is_dated(value)) and not listed, "whole numbers or timestamps"),
        **dict.fromkeys(("float", "optional float"), ((parsed or empty or integer or number) and not listed, "numbers")),
    }.get(kind, (names, "integers or text"))
    return "" if fits else expected


class Codes:
    """A categorical column as codes into its distinct values, which grow batch by batch."""

    def __init__(self):
        self.parsed = False  # whether the values come from text files, one or all of a folder
        self.looks_whole: bool | None = None  # whether the first batch with values holds only integers
        self._chunks: list[Any] = []  # Arrow dictionary arrays of one type
        self._pending = 0  # distinct values of the chunks since the last merge

    def add(self, coded: Any) -> None:
        """Append the codes of a batch, of the type of those before it."""
        if len(coded.dictionary) and self.looks_whole is None:
            self.looks_whole = bool(whole(coded.dictionary).all())
        self._chunks.append(coded)
        self._pending += len(coded.dictionary)
        if self._pending > max(MERGE_AT, len(self._chunks[0].dictionary)):
            self._merge()

    @property
    def type(self) -> Any:
        """Arrow type of the values, int64 or large_string; None without any."""
        return next((chunk.dictionary.type for chunk in self._chunks if len(chunk.dictionary)), None)

    @property
    def codes(self) -> np.ndarray:
        """int32 [n] indices into `distinct`, -1 for a missing value."""
        return self._merge().indices.fill_null(-1).to_numpy()

    @property
    def distinct(self) -> Any:
        """Arrow array of the distinct values."""
        return self._merge().dictionary

    def of_kind(self, kind: IdKind) -> tuple[np.ndarray | list[str], np.ndarray]:
        """Return the m distinct values of that kind, and which they are, bool [distinct] with m true."""
        distinct, integers = self.distinct, kind == "integers"
        if not is_text(distinct.type):
            return (distinct.to_numpy() if integers else []), np.full(len(distinct), integers)
        if not integers:
            return distinct.to_pylist(), np.ones(len(distinct), bool)
        fits = whole(distinct)
        return distinct.filter(pyarrow().array(fits)).cast(pyarrow().int64()).to_numpy(), fits

    def values(self, kind: IdKind) -> np.ndarray:
        """Return int64 or StringDType [n]; 0 or "" for missing values and values of another kind."""
        ids, fits = self.of_kind(kind)
        values, place = id_array(ids), np.zeros(len(fits) + 1, np.int64)
        place[:-1][fits] = np.arange(1, len(values) + 1)
        return np.concatenate([np.zeros(1, values.dtype), values])[place[self.codes]]

    def shown(self, rows: np.ndarray) -> Iterator[str]:
        """Yield the values of some rows for a message; text is quoted, but for a number in a text file."""
        distinct, number = self.distinct, whole(self.distinct)
        for code in self.codes[rows]:
            value = distinct[int(code)].as_py()
            yield str(value) if isinstance(value, int) or (self.parsed and number[code]) else repr(value)

    def _merge(self) -> Any:
        arrow, type_ = pyarrow(), self.type or pyarrow().int64()
        if len(self._chunks) != 1 or self._chunks[0].dictionary.type != type_:
            none = arrow.array([], type_)  # in place of the values of a chunk that has none, of whichever type
            chunks = [c if len(c.dictionary) else arrow.DictionaryArray.from_arrays(c.indices, none) for c in self._chunks]
            joined = arrow.chunked_array(chunks, arrow.dictionary(arrow.int32(), type_))
            self._chunks, self._pending = [joined.unify_dictionaries().combine_chunks()], 0
        return self._chunks[0]


def whole(values: Any) -> np.ndarray:
    """Return which values of an Arrow array of text are integers, bool [n]; all of an integer array."""
    if not is_text(values.type):
        return np.ones(len(values), bool)
    return pyarrow("pyarrow.compute").match_substring_regex(values, WHOLE).to_numpy(zero_copy_only=False)


class LoadedTable:
    """A table that was read once, column by column; messages call it `label`, `problems` receives what is wrong.

    Vectors have `content` numbers; for 0 as many as the first one.
    """

    def __init__(self, label: File, kinds: Mapping[str, Kind], columns: Columns, problems: Problems, content: int = 0):
        self.label, self.kinds, self.columns, self.problems, self.content = label, kinds, columns, problems, content
        self.count = 0  # n, rows
        self.codes = {name: Codes() for name, kind in kinds.items() if kind in CODED}
        self.rounded: set[str] = set()  # "time" columns with times that are finer than `Columns.time_unit`
        self.cut: collections.Counter[str] = collections.Counter()  # bags of more values than are kept, by column
        self.noted: collections.Counter[str] = collections.Counter()  # problems that `note` added, by kind
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name, kind in kinds.items() if kind not in CODED}
        # file, its first row in this table, place of that row in the file: above 0 where the table is a later block of it
        self._files: list[tuple[File, int, int]] = []
        self._fitting: set[str] = set()  # columns of the current file whose type is right

    def add(self, batch: TableBatch) -> None:
        """Append a batch, and note every value that is not of its column's kind."""
        count = batch.columns.num_rows
        if not self._files or self._files[-1][0] is not batch.file:
            self._files.append((batch.file, self.count, batch.start))
            self._fitting = {name for name in batch.types if self._fits(name, batch)}
        self.count += count
        for name, kind in self.kinds.items():
            values = batch.columns.column(name) if name in self._fitting else pyarrow().nulls(count)
            noted = self.problems if name in self._fitting else Problems()  # that the type is wrong is said already
            cells = Cells(plain(values), batch.start, batch.file, name, noted)
            if kind in CODED:
                self._add_codes(cells, kind)
            elif kind == "time":
                times, rounded = cells.times(self.columns.time_unit, batch.types.get(name))
                self._arrays[name].append(times)
                self.rounded |= {name} if rounded else set()
            elif kind == "vector":
                width = next((part.shape[1] for part in self._arrays[name] if part.shape[1]), self.content)
                self._arrays[name] += [cells.vectors(width)] if name in self._fitting else []
            else:
                self._arrays[name].append(cells.floats(optional=kind == "optional float"))

    def array(self, name: str) -> np.ndarray:
        """Return a column that is not coded: float32 [n], of vectors [n, E], with NaN for a missing value; of times int64 [n].

        Times are in `Columns.time_unit`, missing ones MISSING_TIME. The array takes the place of its parts.
        """
        parts, none = self._arrays[name], np.zeros(0, np.int64 if self.kinds[name] == "time" else np.float32)
        parts[:] = parts if len(parts) == 1 else [np.concatenate(parts or [none])]
        return parts[0]

    def locate(self, row: int) -> str:
        """Return where row 0, 1, ... is, such as "row 4", with the file if there are several."""
        file, start, place = self._files[bisect.bisect_right(self._files, row, key=lambda each: each[1]) - 1]
        (number,) = file.numbers(np.array([row - start + place])).tolist()
        return file.locate(number) if len(self._files) == 1 else f"{file.locate(number)} of {file.name}"

    def counts(self) -> dict[str, int]:
        """Return rows by file."""
        return {file.name: stop - start for (file, start, _), stop in self._spans()}

    def note(
        self, kind: str, wrong: np.ndarray, column: str | None, expected: str, got: Callable[[np.ndarray], Iterable[str]]
    ) -> None:
        """Add one problem for each row with a value that is `wrong`, bool [n] or [n * bag_length]; `got` shows some of them."""
        if not wrong.any():
            return
        wrong = wrong.reshape(self.count, -1)
        for (file, start, place), stop in self._spans():
            here = start + np.flatnonzero(wrong[start:stop].any(1))
            first = here * wrong.shape[1] + wrong[here].argmax(1)  # wrong value of each row
            self.noted[kind] += len(here)
            self.problems.add(kind, file, file.numbers(here - start + place), column, expected, got(first))

    def _fits(self, name: str, batch: TableBatch) -> bool:
        """Return whether a column of a file is of its kind; adds a problem if not."""
        test, type_, kind = pyarrow("pyarrow.types"), batch.types[name], self.kinds[name]
        value = type_.value_type if test.is_dictionary(type_) else type_
        expected = expected_type(value, kind, parsed=batch.file.is_text, named=name in self.columns.text)
        if expected:
            lost = kind in CODED and (test.is_floating(value) or test.is_decimal(value))
            why = "write integers as such: pandas makes floats of them where one is missing, astype('Int64') does not"
            why += "; Columns.text is for text such as 1.10, and for whole numbers from 2^63 on" if batch.file.is_text else ""
            self.problems.add("wrong type", batch.file, None, name, expected, f"{type_} ({why})" if lost else str(type_))
        return not expected

    def _add_codes(self, cells: Cells, kind: Kind) -> None:
        codes = self.codes[cells.column]
        codes.parsed = cells.file.is_text
        if kind in PRESENT:
            if is_text(cells.values.type):  # an empty text names nobody; of CSV it is null already
                compute = pyarrow("pyarrow.compute")
                cells = cells._replace(values=compute.if_else(compute.equal(cells.values, ""), None, cells.values))
            cells.note_nulls("an id" if kind == "id" else "a value in every row")
        if kind == "bag":
            coded, cut = cells.bags(self.columns)
            self.cut += collections.Counter({cells.column: cut})  # which leaves out 0
        else:
            coded = cells.coded(text=cells.column in self.columns.text)
        if len(coded.dictionary) and codes.type not in (None, coded.dictionary.type):
            expected, got = ("integers", "text") if is_text(coded.dictionary.type) else ("text", "integers")
            cells.problems.add("wrong type", cells.file, None, cells.column, f"{expected} as in the files before", got)
            coded = cells._replace(values=pyarrow().nulls(len(coded))).coded(text=False)
        codes.add(coded)

    def _spans(self) -> Iterator[tuple[tuple[File, int, int], int]]:
        """Return the entries of `_files`, each with the row at which it ends."""
        return zip(self._files, [start for _, start, _ in self._files[1:]] + [self.count], strict=False)


def read_table(
    source: Source, kinds: Mapping[str, Kind], problems: Problems, *, columns: Columns, name: str, content: int = 0
) -> LoadedTable:
    """Read the columns `kinds` of a table; arguments and errors as `batches`, `content` as of `LoadedTable`."""
    label = File(str(source) if isinstance(source, str | os.PathLike) else name)
    table = LoadedTable(label, kinds, columns, problems, content)
    for batch in batches(source, list(kinds), problems, name=name):
        table.add(batch)
    return table
