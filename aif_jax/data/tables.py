"""Parquet and CSV files as blocks of NumPy columns, every value checked. Source: ours; the reader is Apache Arrow.

Needs the `data` extra. A file is never held as a whole: blocks of some 65,536 rows come one after the other, ids and other
categorical values as codes into the distinct values of the block. What is wrong is noted and passed over, see `problems`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from tqdm import tqdm

from aif_jax.data.problems import Problems, is_text

Kind: TypeAlias = Literal["id", "value", "category", "bag", "float", "vector", "time"]
"""What a column holds: "id" (integers from 0 or strings, none missing), "value" (integers or strings, may be missing),
"category" (the same, none missing), "bag" (lists of values), "float", "vector" (lists of floats), "time"."""

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
ROWS = 1 << 16  # of a block
CODED = ("id", "value", "category", "bag")


class Coded(NamedTuple):
    """Categorical values of a block."""

    codes: np.ndarray  # int32 [n], or [n, length] for bags: position in `values`, -1 where there is none
    values: np.ndarray  # the distinct values, int64 or str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some rows of one file.

    Attributes:
      file: where they stand.
      rows: int64 [n] row numbers, 1 for the first row of data of the file.
      columns: name to `Coded`, or to an array: float32 [n], float32 [n, E], int64 [n] seconds.
      good: name to bool [n]; where it is false the value is a placeholder and its problem is noted.
    """

    file: Path
    rows: np.ndarray
    columns: dict[str, Any]
    good: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How values are read.

    Attributes:
      time_unit: of integer times.
      text: columns that are text even where they look like numbers.
      bag_length: values of a bag that are kept.
      bag_separator: between the values of a bag that comes as text.
    """

    time_unit: TimeUnit = "s"
    text: tuple[str, ...] = ()
    bag_length: int = 8
    bag_separator: str = "|"


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or the Parquet, CSV and TSV files under a folder in the order of their names.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a file of another kind, or a folder without such files or with more than one kind.
    """
    root = Path(path)
    if root.is_dir():
        found = sorted(file for file in root.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        kinds = {is_text(file.name) for file in found}
        if len(kinds) != 1:
            raise ValueError(f"{root}: expected Parquet files or text files, one kind, got {[f.name for f in found[:8]]}")
        return found
    if not root.exists():
        raise FileNotFoundError(f"{root}: expected a file or folder, got no such file")
    if not root.name.endswith(SUFFIXES):
        raise ValueError(f"{root}: expected a name that ends in one of {', '.join(SUFFIXES)}, got {root.name!r}")
    return [root]


def blocks(
    path: str | os.PathLike[str], wanted: Mapping[str, Kind], problems: Problems, *, reading: Reading
) -> Iterator[Block]:
    """Reads some columns of a file, or of every file of a folder.

    Args:
      path: Parquet (.parquet), CSV (.csv) or tab-separated text (.tsv), text with a header and perhaps .gz; or a folder.
      wanted: column name to kind; other columns are not looked at.
      problems: receives every value that is not of its kind, every row with too few or too many fields, missing columns.
      reading: units and separators.

    Yields:
      Block; a column that is missing or of a type that cannot be read stands in none.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError, ValueError: as `files_of`.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "events.csv"
      >>> _ = path.write_text("user,time\\nann,5\\nbob,\\n")
      >>> problems = Problems()
      >>> (block,) = blocks(path, {"user": "id", "time": "time"}, problems, reading=Reading())
      >>> block.columns["user"].values.tolist(), block.good["time"].tolist(), problems.totals
      (['ann', 'bob'], [True, False], {'null': 1})
    """
    for file in files_of(path):
        parsers: dict[str, Callable] | None = None
        with tqdm(desc=file.name, unit="rows", unit_scale=True, delay=2, leave=False) as bar:
            for types, rows, batch in (
                _text(file, wanted, problems, reading) if is_text(file.name) else _parquet(file, wanted, problems)
            ):
                if parsers is None:
                    parsers = _parsers(file, wanted, types, problems, reading)
                columns, good = {}, {}
                for name, parse in parsers.items():
                    columns[name], good[name] = parse(batch.column(name), rows)
                bar.update(len(rows))
                yield Block(file=file, rows=rows, columns=columns, good=good)


def _parquet(file: Path, wanted: Mapping[str, Kind], problems: Problems) -> Iterator[tuple[dict[str, Any], np.ndarray, Any]]:
    arrow, parquet = pyarrow("pyarrow"), pyarrow("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            present = _present(file, schema.names, wanted, problems)
            types, first = {name: schema.field(name).type for name in present}, 1
            for batch in opened.iter_batches(batch_size=ROWS, columns=present):
                if batch.num_rows:
                    yield types, np.arange(first, first + batch.num_rows), batch
                    first += batch.num_rows
            if first == 1:
                problems.add("no rows", file, None, None, "at least one row", "none")
    except (arrow.ArrowException, OSError) as error:
        problems.add("unreadable file", file, None, None, "a complete Parquet file", _first_line(error))


def _text(
    file: Path, wanted: Mapping[str, Kind], problems: Problems, reading: Reading
) -> Iterator[tuple[dict[str, Any], np.ndarray, Any]]:
    arrow, csv = pyarrow("pyarrow"), pyarrow("pyarrow.csv")
    separator = "\t" if file.name.removesuffix(".gz").endswith(".tsv") else ","
    broken: set[int] = set()

    def refuse(row: Any) -> str:
        broken.add(row.number - 1)  # line 1 is the header
        problems.add(
            "wrong number of fields",
            file,
            [row.number - 1],
            None,
            f"{row.expected_columns}",
            f"{row.actual_columns} in {row.text!r}",
        )
        return "skip"

    def opened(handler: Callable[[Any], str], **options: Any) -> Any:
        return csv.open_csv(
            file,
            read_options=csv.ReadOptions(use_threads=False),  # with threads a broken row does not know its number
            parse_options=csv.ParseOptions(delimiter=separator, invalid_row_handler=handler, ignore_empty_lines=False),
            **options,
        )

    try:
        with opened(lambda row: "skip") as reader:
            schema = reader.schema
        present = _present(file, schema.names, wanted, problems)
        convert = csv.ConvertOptions(
            column_types={name: arrow.string() for name in schema.names},
            include_columns=present,
            strings_can_be_null=True,
            null_values=[""],
        )
        types, next_row = {name: schema.field(name).type for name in present}, 1
        with opened(refuse, convert_options=convert) as reader:
            for batch in reader:
                rows = np.empty(batch.num_rows, np.int64)
                for i in range(batch.num_rows) if broken else ():
                    while next_row in broken:
                        next_row += 1
                    rows[i], next_row = next_row, next_row + 1
                if not broken:
                    rows[:] = np.arange(next_row, next_row + batch.num_rows)
                    next_row += batch.num_rows
                if batch.num_rows:
                    yield types, rows, batch
        if next_row == 1:
            problems.add("no rows", file, None, None, "at least one row", "none")
    except (arrow.ArrowException, OSError) as error:
        problems.add("unreadable file", file, None, None, "text with a header in UTF-8", _first_line(error))


def _present(file: Path, names: list[str], wanted: Mapping[str, Kind], problems: Problems) -> list[str]:
    for name in wanted:
        if names.count(name) != 1:
            got = "more than one" if name in names else f"the columns {', '.join(map(repr, names))}"
            problems.add("missing column", file, None, name, "a column of this name", got)
    return [name for name in wanted if names.count(name) == 1]


def _parsers(
    file: Path, wanted: Mapping[str, Kind], types: Mapping[str, Any], problems: Problems, reading: Reading
) -> dict[str, Callable]:
    """For every readable column a function (values, rows) -> (column, good)."""
    test = pyarrow("pyarrow").types
    parsers = {}
    for name, type_ in types.items():
        value = type_.value_type if test.is_dictionary(type_) else type_
        is_word = test.is_string(value) or test.is_large_string(value)
        kind, text = wanted[name], is_text(file.name)
        column = _Column(file, name, kind, type_, problems, reading)
        listed = test.is_list(value) or test.is_large_list(value) or test.is_fixed_size_list(value)
        integer, number = test.is_integer(value) or test.is_boolean(value), test.is_floating(value) or test.is_decimal(value)
        empty = test.is_null(value)
        if kind in ("id", "value", "category"):
            # text may look like dates, and still name something
            fits, expected = is_word or integer or empty or (text and not number), "integers or text"
            if number and name in reading.text:
                fits = text
            parse = column.coded
        elif kind == "bag":
            fits, expected, parse = is_word or listed or text or empty, "lists, or text to be split", column.bag
        elif kind == "float":
            fits, expected, parse = integer or number or text or empty, "numbers", column.floats
        elif kind == "vector":
            fits, expected, parse = (
                listed and not text,
                "lists of numbers (in text files give the content by itself)",
                column.vectors,
            )
        else:
            moment = test.is_timestamp(value) or test.is_date(value)
            fits, expected, parse = integer or moment or text or empty, "whole numbers or timestamps", column.times
        if fits:
            parsers[name] = parse
        else:
            hint = (
                " (pandas makes floats of integers where one is missing)"
                if number and kind in ("id", "value", "category")
                else ""
            )
            problems.add("wrong type", file, None, name, expected, f"{type_}{hint}")
    return parsers


@dataclasses.dataclass(frozen=True)
class _Column:
    """One column of one file: how its values become arrays."""

    file: Path
    name: str
    kind: Kind
    type_: Any  # of Arrow: the file's, or in text what the first block looks like
    problems: Problems
    reading: Reading

    def coded(self, values: Any, rows: np.ndarray) -> tuple[Coded, np.ndarray]:
        """Ids and other categorical values."""
        arrow = pyarrow("pyarrow")
        good = np.ones(len(rows), bool)
        if self.kind != "value":
            good &= self._not_null(values, rows, "a category for every item" if self.kind == "category" else "an id")
        if is_text(self.file.name) and arrow.types.is_integer(self.type_) and self.name not in self.reading.text:
            values, parsed = self._parse(values, rows, arrow.int64(), "a whole number, like those before it")
            good &= parsed
        coded = _encode(values, as_text=self.name in self.reading.text)
        if coded.values.dtype.kind == "i" and self.kind == "id" and coded.values.size and coded.values.min() < 0:
            negative = (coded.codes >= 0) & (coded.values < 0)[coded.codes]
            raw = coded.values[coded.codes[negative]]
            self.problems.add("negative id", self.file, rows[negative], self.name, "0 or more", map(str, raw))
            good &= ~negative
        return coded, good

    def bag(self, values: Any, rows: np.ndarray) -> tuple[Coded, np.ndarray]:
        """Lists of values, cut to the length kept."""
        arrow, compute = pyarrow("pyarrow"), pyarrow("pyarrow.compute")
        if arrow.types.is_null(values.type):
            return Coded(np.full((len(rows), self.reading.bag_length), -1, np.int32), np.zeros(0, str)), np.ones(
                len(rows), bool
            )
        if arrow.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type):
            values = compute.split_pattern(values, self.reading.bag_separator)
        flat, at, place = _flatten(values)
        coded = _encode(flat, as_text=self.name in self.reading.text)
        codes = np.full((len(rows), self.reading.bag_length), -1, np.int32)
        kept = place < self.reading.bag_length
        codes[at[kept], place[kept]] = coded.codes[kept]
        return Coded(codes, coded.values), np.ones(len(rows), bool)

    def floats(self, values: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n]."""
        arrow = pyarrow("pyarrow")
        good = self._not_null(values, rows, "a number")
        if is_text(self.file.name):
            values, parsed = self._parse(values, rows, arrow.float64(), "a number")
            good &= parsed
        else:
            values = values.cast(arrow.float64())
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is found below
            array = values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float32)
        return self._finite(array, rows, good)

    def vectors(self, values: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, E], E being the length of the block's first list."""
        good = self._not_null(values, rows, "a list of numbers")
        flat, at, place = _flatten(values)
        counts = np.bincount(at, minlength=len(rows))
        width = int(counts[good][0]) if good.any() else 0
        wrong = good & (counts != width)
        self.problems.add(
            "wrong length", self.file, rows[wrong], self.name, f"{width} numbers like the rows before", map(str, counts[wrong])
        )
        good &= ~wrong
        array = np.zeros((len(rows), width), np.float32)
        kept = good[at]
        numbers = flat.cast(pyarrow("pyarrow").float32(), safe=False)
        array[at[kept], place[kept]] = numbers.to_numpy(zero_copy_only=False)[kept]
        return self._finite(array, rows, good)

    def times(self, values: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] seconds."""
        arrow = pyarrow("pyarrow")
        moment = arrow.types.is_timestamp(self.type_) or arrow.types.is_date(self.type_)
        good = self._not_null(values, rows, "a time")
        if is_text(self.file.name):
            target = self.type_ if moment else arrow.int64()
            expected = "a date and time" if moment else "a whole number"
            values, parsed = self._parse(values, rows, target, expected)
            good &= parsed
        if arrow.types.is_date(self.type_):
            values = values.cast(arrow.timestamp("s"))
        per_second = PER_SECOND[values.type.unit if moment else self.reading.time_unit]
        array = values.cast(arrow.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        return array.astype(np.int64) // per_second, good

    def _finite(self, array: np.ndarray, rows: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        finite = np.isfinite(array).reshape(len(rows), -1).all(1)
        wrong = good & ~finite
        got = (str(value[~np.isfinite(value)][0]) for value in array.reshape(len(rows), -1)[wrong])
        self.problems.add("not finite", self.file, rows[wrong], self.name, "a finite number", got)
        array[~finite] = 0
        return array, good & finite

    def _not_null(self, values: Any, rows: np.ndarray, expected: str) -> np.ndarray:
        missing = values.is_null().to_numpy(zero_copy_only=False).astype(bool)
        self.problems.add("null", self.file, rows[missing], self.name, expected, "nothing")
        return ~missing

    def _parse(self, values: Any, rows: np.ndarray, target: Any, expected: str) -> tuple[Any, np.ndarray]:
        """Text as `target`, nothing where it is not that; and where it is."""
        parts, good = [], np.ones(len(values), bool)
        _parse_some(values, 0, target, parts, good)
        bad = ~good
        got = (repr(value.as_py()) for value in values.filter(pyarrow("pyarrow").array(bad))) if bad.any() else ""
        self.problems.add("wrong type", self.file, rows[bad], self.name, expected, got)
        return pyarrow("pyarrow").chunked_array(parts, target).combine_chunks(), good


def _parse_some(values: Any, start: int, target: Any, parts: list[Any], good: np.ndarray) -> None:
    """Casts by halves, so that a few bad values cost a few tries."""
    arrow = pyarrow("pyarrow")
    try:
        parts.append(values.cast(target))
    except arrow.ArrowInvalid:
        if len(values) == 1:
            good[start] = False
            parts.append(arrow.nulls(1, target))
            return
        middle = len(values) // 2
        _parse_some(values[:middle], start, target, parts, good)
        _parse_some(values[middle:], start + middle, target, parts, good)


def _encode(values: Any, *, as_text: bool) -> Coded:
    """Codes into the distinct values, which are int64 or str."""
    arrow = pyarrow("pyarrow")
    if arrow.types.is_null(values.type):
        return Coded(np.full(len(values), -1, np.int32), np.zeros(0, str))
    if arrow.types.is_boolean(values.type):
        values = values.cast(arrow.int8())
    coded = values if arrow.types.is_dictionary(values.type) else values.dictionary_encode()
    distinct = coded.dictionary
    if as_text and not (arrow.types.is_string(distinct.type) or arrow.types.is_large_string(distinct.type)):
        distinct = distinct.cast(arrow.string())
    raw = distinct.to_numpy(zero_copy_only=False)
    raw = raw.astype(np.int64) if raw.dtype.kind in "iu" else raw.astype(str)
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    return Coded(codes, raw)


def _flatten(values: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """The values of all lists, and for each its row and its place in the list; lists that are null count as empty."""
    compute = pyarrow("pyarrow.compute")
    counts = compute.fill_null(compute.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    at = np.repeat(np.arange(len(values)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return compute.list_flatten(values), at, place


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def pyarrow(module: str) -> Any:
    """A module of pyarrow. Raises ImportError with what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("Parquet and CSV files of your own need pyarrow: pip install 'aif_jax[data]'") from error
