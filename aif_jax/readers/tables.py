"""Tables as blocks of checked columns: every value is parsed as what `Columns` says it is, or its problem is noted.

One pass over a table: every column in memory, categorical values as codes into distinct values that grow block by block.

From the distinct values of all tables to vocabularies, and from codes to their rows.

Parquet says whether ids are integers or text. In CSV they are integers where one column of the vocabulary begins with nothing
else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from aif_jax.encoding.columns import CODED, Columns, Kind
from aif_jax.encoding.columns import File as FileName
from aif_jax.encoding.encoder import Encoder, vocabulary_names
from aif_jax.encoding.raw import flat_lists
from aif_jax.encoding.times import PER_SECOND, earliest, history_order, likely_unit, quoted, rescaled, wrong_unit
from aif_jax.encoding.vocabulary import Kind as IdKind
from aif_jax.encoding.vocabulary import Vocabulary, id_array
from aif_jax.readers.sources import File, Problems, Source, TableBatch, TextFile, batches, pyarrow

PRESENT = {"id": "an id", "category": "a category in every row", "action": "an action in every event"}  # where null is wrong
WHOLE = r"^(0|-?[1-9][0-9]{0,17})$"  # integers as text, each in one spelling: "07" is none


class Coded(NamedTuple):
    """Categorical values of a block."""

    codes: np.ndarray  # int32 [n], or [n, length] for bags: position in `values`, -1 where there is none
    values: Any  # the distinct values: Arrow array of int64 or large_string; of text files always the latter
    cut: int = 0  # bags of more values than are kept


class Times(NamedTuple):
    """Times of a block."""

    value: np.ndarray  # int64 [n] in `Columns.time_unit`
    unit: str  # that of messages: the file's, or that of `Columns` where one of the times was rounded down
    dated: bool = False  # whether they came as dates, not as integers
    rounded: bool = False


def blocks(source: Source, kinds: Mapping[str, Kind], problems: Problems, *, columns: Columns, name: str) -> Iterator[Any]:
    """Reads the columns `kinds` of a source, as `sources.batches`; `problems` receives every value that is not of its kind.

    A block has (values, good) of each column but those that are missing or cannot be read: `Coded`, `Times`, float32 [n] or
    float32 [n, E], and bool [n], false where the value is a placeholder and its problem is noted.
    """
    widths: dict[str, int] = {}
    file, parsers = None, {}
    for batch in batches(source, list(kinds), problems, name=name):
        if batch.file != file:
            file, parsers = batch.file, _parsers(batch, kinds, problems, columns, widths)
        parsed = {column: parse(batch.columns.column(column), batch.rows) for column, parse in parsers.items()}
        yield batch._replace(columns=parsed)


def is_whole(values: Any) -> np.ndarray:
    """Which values of an Arrow array of strings are integers, bool [n]; all of an integer array."""
    if values.type == pyarrow().int64():
        return np.ones(len(values), bool)
    return pyarrow("pyarrow.compute").match_substring_regex(values, WHOLE).to_numpy(zero_copy_only=False)


def is_dated(type_: Any) -> bool:
    """Whether an Arrow type is one of dates or timestamps."""
    return type_ is not None and (pyarrow().types.is_timestamp(type_) or pyarrow().types.is_date(type_))


def _parsers(
    batch: TableBatch, kinds: Mapping[str, Kind], problems: Problems, columns: Columns, widths: dict[str, int]
) -> dict[str, Callable[[Any, np.ndarray], tuple[Any, np.ndarray]]]:
    """For every readable column of a file a function (values, rows) -> (column, good)."""
    test, text = pyarrow("pyarrow").types, batch.is_text
    parsers = {}
    for name, type_ in batch.types.items():
        value, kind = type_.value_type if test.is_dictionary(type_) else type_, kinds[name]
        word = test.is_string(value) or test.is_large_string(value)
        listed = test.is_list(value) or test.is_large_list(value) or test.is_fixed_size_list(value)
        integer = test.is_integer(value) or test.is_boolean(value)
        number = test.is_floating(value) or test.is_decimal(value)
        moment, empty = is_dated(value), test.is_null(value)
        column = _Column(batch.file, text, name, kind, type_, problems, columns, widths)
        boolean_id = test.is_boolean(value) and kind == "id"  # booleans can be an attribute, and name nobody
        named = text and (not number or name in columns.text)  # text may look like dates, and still name something
        fits, expected, parse = {
            "coded": ((word or integer or empty or named) and not boolean_id, "integers or text", column.coded),
            "bag": (word or listed or text or empty, "lists, or text to be split", column.bag),
            "float": (integer or number or text or empty, "numbers", column.floats),
            "number": (integer or number or text or empty, "numbers", column.numbers),
            "vector": (listed and not text, "lists of numbers (in text files give the content by itself)", column.vectors),
            "time": (test.is_integer(value) or moment or text or empty, "whole numbers or timestamps", column.times),
        }["coded" if kind in CODED and kind != "bag" else kind]
        if fits:
            parsers[name] = parse
        else:
            hint = " (pandas makes floats of integers where one is missing)" if number and kind in CODED else ""
            problems.add("wrong type", batch.file, None, name, expected, f"{type_}{hint}")
    return parsers


@dataclasses.dataclass(frozen=True)
class _Column:
    """One column of one file: how its values become arrays."""

    file: File
    text: bool
    name: str
    kind: Kind
    type: Any
    problems: Problems
    columns: Columns
    widths: dict[str, int]

    def coded(self, values: Any, rows: np.ndarray) -> tuple[Coded, np.ndarray]:
        """Ids and other categorical values."""
        expected = PRESENT.get(self.kind)
        good = np.ones(len(rows), bool) if expected is None else self._not_null(values, rows, expected)
        return self._encode(values, rows), good

    def bag(self, values: Any, rows: np.ndarray) -> tuple[Coded, np.ndarray]:
        """Lists of values, cut to the length kept."""
        arrow, length = pyarrow(), self.columns.bag_length
        if arrow.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if arrow.types.is_null(values.type):
            values = values.cast(arrow.list_(arrow.string()))
        if arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type):
            values = pyarrow("pyarrow.compute").split_pattern(values, self.columns.bag_separator)
        flat, row, place = flat_lists(values)
        coded = self._encode(flat, rows[row])
        codes = np.full((len(rows), length), -1, np.int32)
        kept = place < length
        codes[row[kept], place[kept]] = coded.codes[kept]
        return Coded(codes, coded.values, int(np.count_nonzero(place == length))), np.ones(len(rows), bool)

    def floats(self, values: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n]."""
        arrow = pyarrow()
        good = self._not_null(values, rows, "a number")
        if self.text:
            values, parsed = self._parse(values, rows, arrow.float64(), "a number")
            good &= parsed
        else:
            values = values.cast(arrow.float64())
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is found below
            array = values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float32)
        return self._finite(array, rows, good)

    def numbers(self, values: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n], NaN where there is no value: null, NaN, or nothing in a text file."""
        arrow = pyarrow()
        if arrow.types.is_null(values.type):
            return np.full(len(rows), np.nan, np.float32), np.ones(len(rows), bool)
        missing = values.is_null(nan_is_null=arrow.types.is_floating(values.type))
        zero = arrow.scalar("0" if self.text else 0).cast(values.type)
        array, good = self.floats(pyarrow("pyarrow.compute").if_else(missing, zero, values), rows)
        absent = missing.to_numpy(zero_copy_only=False).astype(bool)
        array[absent] = np.nan
        return array, good | absent

    def vectors(self, values: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, E], E being the length of the first list."""
        good = self._not_null(values, rows, "a list of numbers")
        flat, row, place = flat_lists(values)
        counts = np.bincount(row, minlength=len(rows))
        width = self.widths.setdefault(self.name, max(1, int(counts[good][0]))) if good.any() else self.widths.get(self.name, 0)
        wrong = good & (counts != width)
        expected = f"{width} numbers like the rows before"
        self.problems.add("wrong length", self.file, rows[wrong], self.name, expected, map(str, counts[wrong]))
        good &= ~wrong
        array = np.zeros((len(rows), width), np.float32)
        kept = good[row]
        numbers = flat.cast(pyarrow().float32(), safe=False)
        array[row[kept], place[kept]] = numbers.to_numpy(zero_copy_only=False)[kept]
        return self._finite(array, rows, good)

    def times(self, values: Any, rows: np.ndarray) -> tuple[Times, np.ndarray]:
        """Times as integers of `Columns.time_unit`, as `times.in_unit` makes them of what a request brings."""
        arrow, wanted = pyarrow(), self.columns.time_unit
        dated = is_dated(self.type)
        good = self._not_null(values, rows, "a time")
        if self.text:
            target, expected = (self.type, "a date and time") if dated else (arrow.int64(), "a whole number")
            values, parsed = self._parse(values, rows, target, expected)
            good &= parsed
        if arrow.types.is_date(values.type):
            values = values.cast(arrow.timestamp("s" if arrow.types.is_date32(values.type) else "ms"))
        unit = values.type.unit if dated else wanted
        values = values.fill_null(0) if arrow.types.is_uint64(values.type) else values.cast(arrow.int64()).fill_null(0)
        array = values.to_numpy(zero_copy_only=False)
        late, early, ancient = wrong_unit(array, unit=unit, dated=dated)
        least = quoted(earliest(unit), unit, dated=dated)
        for wrong, expected in (
            (late, "times before 2100"),
            (early, "times after 1973"),
            (ancient, f"times of at least {least}"),
        ):
            looks = "" if dated or wrong is ancient else ", which looks like {!r}"
            got = (f"{quoted(v, unit, dated=dated)}{looks.format(likely_unit(int(v)))}" for v in array[good & wrong])
            self.problems.add("time unit", self.file, rows[good & wrong], self.name, f"{expected} in {unit!r}", got)
        most = 2**62 // max(1, PER_SECOND[wanted] // PER_SECOND[unit])  # later ones, which are refused, would overflow
        array = np.where(ancient, 0, np.minimum(array, most)).astype(np.int64)
        made = rescaled(array, given=unit, unit=wanted)
        rounded = bool((rescaled(made, given=wanted, unit=unit) != array).any())
        return Times(made, wanted if rounded else unit, dated, rounded), good & ~ancient

    def _encode(self, values: Any, rows: np.ndarray) -> Coded:
        """Codes into the distinct values; `rows` are the numbers of the values' rows."""
        arrow, test = pyarrow(), pyarrow("pyarrow.types")
        if test.is_null(values.type):
            return Coded(np.full(len(values), -1, np.int32), arrow.array([], arrow.int64()))
        coded = values if test.is_dictionary(values.type) else values.dictionary_encode()
        codes, distinct = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32), coded.dictionary
        if test.is_uint64(distinct.type):
            beyond = np.append(distinct.to_numpy() >= 2**63, False)
            wrong = beyond[codes]
            got = map(str, (distinct[int(code)] for code in codes[wrong]))
            self.problems.add("wrong type", self.file, rows[wrong], self.name, "an integer below 2^63", got)
            distinct = arrow.array(np.where(beyond[:-1], 0, distinct.to_numpy()).astype(np.int64))
        word = test.is_string(distinct.type) or test.is_large_string(distinct.type)
        if test.is_boolean(distinct.type):
            distinct = distinct.cast(arrow.int8())
        if not word and self.name in self.columns.text:
            distinct, word = distinct.cast(arrow.string()), True
        return Coded(codes, distinct.cast(arrow.large_string() if word else arrow.int64()))

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
        arrow, good = pyarrow(), np.ones(len(values), bool)

        def cast(start: int, stop: int) -> list[Any]:  # by halves, so that a few bad values cost a few tries
            try:
                return [values[start:stop].cast(target)]
            except arrow.ArrowInvalid:
                if stop - start == 1:
                    good[start] = False
                    return [arrow.nulls(1, target)]
                middle = (start + stop) // 2
                return cast(start, middle) + cast(middle, stop)

        parts = cast(0, len(values))
        got = (repr(value.as_py()) for value in values.filter(arrow.array(~good))) if not good.all() else ""
        self.problems.add("wrong type", self.file, rows[~good], self.name, expected, got)
        return arrow.chunked_array(parts, target).combine_chunks(), good


MERGE_AT = 1 << 20  # distinct values of blocks that are merged at a time


class Codes:
    """The codes of one categorical column: int32 [n] or [n, bag length], -1 where there is no value."""

    def __init__(self):
        self.is_text, self.cut = False, 0
        self.looks_whole: bool | None = None  # whether the first block with values holds integers and nothing else
        self._parts: list[np.ndarray] = []
        self._pending: list[tuple[int, Any]] = []  # part, its distinct values
        self._distinct: Any = pyarrow().array([], pyarrow().int64())

    def add(self, coded: Coded) -> None:
        """Appends the codes of a block."""
        self._parts.append(coded.codes)
        self.cut += coded.cut
        if len(coded.values):
            self.looks_whole = bool(is_whole(coded.values).all()) if self.looks_whole is None else self.looks_whole
            self._pending.append((len(self._parts) - 1, coded.values))
        if sum(len(values) for _, values in self._pending) > max(MERGE_AT, len(self._distinct)):
            self._merge()

    def differs(self, coded: Coded) -> bool:
        """Whether a block holds integers and those before it text, or the other way round."""
        before = self._pending[0][1] if self._pending else self._distinct
        return bool(len(before) and len(coded.values)) and before.type != coded.values.type

    @property
    def codes(self) -> np.ndarray:
        """Of all blocks."""
        self._merge()
        return _joined(self._parts, np.zeros(0, np.int32))

    @property
    def distinct(self) -> Any:
        """Arrow array of int64 or large_string."""
        self._merge()
        return self._distinct

    @property
    def is_integer(self) -> bool:
        """Whether the values came as integers."""
        return self.distinct.type == pyarrow().int64()

    def values(self, kind: IdKind | None) -> np.ndarray:
        """The values of a column without missing ones, [n] int64 or StringDType; 0 or "" for those of another kind."""
        ids, of_kind = self.distinct_ids(kind)
        values = id_array(ids)
        place = np.zeros(len(self.distinct) + 1, np.int64)
        place[of_kind] = np.arange(1, len(values) + 1)
        return np.concatenate([np.zeros(1, values.dtype), values])[place[self.codes]]

    def distinct_ids(self, kind: IdKind | None, *, is_text: bool = False) -> tuple[np.ndarray | list[str], np.ndarray]:
        """The distinct values that are of a kind (None: the column's own), and their codes, int64 [distinct]."""
        ids, fits = _as_kind(self, kind or _kind([self], is_text=is_text))
        return ids, np.flatnonzero(fits)

    def _merge(self) -> None:
        """Distinct values so far keep their codes; those of pending blocks are found among them or appended."""
        if not self._pending:
            return
        before = [self._distinct] if len(self._distinct) else []
        merged = pyarrow().chunked_array([*before, *(values for _, values in self._pending)]).dictionary_encode()
        self._distinct = merged.chunk(0).dictionary
        for (part, _), chunk in zip(self._pending, merged.chunks[len(before) :], strict=True):
            codes = np.append(chunk.indices.to_numpy(), -1).astype(np.int32)
            self._parts[part] = codes[self._parts[part]]
        self._pending = []


class Scan:
    """A table that was read once; messages call it `label`."""

    def __init__(self, label: File, kinds: Mapping[str, Kind], columns: Columns):
        self.label, self.kinds, self.columns = label, kinds, columns
        self.count = 0  # n, rows
        self.codes = {name: Codes() for name, kind in kinds.items() if kind in CODED}
        self.bad: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in kinds}  # (first row, whether a placeholder)
        self._arrays: dict[str, list[Any]] = {name: [] for name, kind in kinds.items() if kind not in CODED}
        self._parts: list[tuple[File, int, int | np.ndarray]] = []  # file, first row here, number of the first or of each row
        self._units: dict[str, list[tuple[str, bool]]] = {name: [] for name, kind in kinds.items() if kind == "time"}
        self.rounded: set[str] = set()  # "time" columns with times that are finer than `Columns.time_unit`

    def add(self, block: TableBatch, problems: Problems) -> None:
        """Appends a block of `tables.blocks`."""
        rows, count = block.rows, len(block.rows)
        regular = rows[-1] - rows[0] + 1 == count
        self._parts.append((block.file, self.count, int(rows[0]) if regular else rows))
        for name, kind in self.kinds.items():
            values, good = block.columns.get(name, (None, np.zeros(count, bool)))
            if kind in CODED:
                codes = self.codes[name]
                codes.is_text = block.is_text
                if values is not None and codes.differs(values):
                    expected, got = ("text", "integers") if values.values.type == pyarrow().int64() else ("integers", "text")
                    problems.add("wrong type", block.file, None, name, f"{expected} as in the files before", got)
                    values, good = None, np.zeros(count, bool)
                shape = (count, self.columns.bag_length) if kind == "bag" else (count,)
                codes.add(values or Coded(np.full(shape, -1, np.int32), ()))
            elif kind == "time":
                times = values or Times(np.zeros(count, np.int64), self.columns.time_unit)
                self._arrays[name].append(times.value)
                self._units[name].append((times.unit, times.dated))
                self.rounded |= {name} if times.rounded else set()
            elif kind in ("float", "number") or values is not None:
                self._arrays[name].append(np.zeros(count, np.float32) if values is None else values)
            if not good.all():
                self.bad[name].append((self.count, ~good))
        self.count += count

    def is_good(self, *names: str) -> np.ndarray:
        """bool [n]: rows where the values of all these columns are no placeholders."""
        good = np.ones(self.count, bool)
        for start, bad in (part for name in names for part in self.bad[name]):
            good[start : start + len(bad)] &= ~bad
        return good

    def floats(self, name: str) -> np.ndarray:
        """float32 [n] or [n, E] of a "float", "number" or "vector" column."""
        return _joined(self._arrays[name], np.zeros(0, np.float32))

    def times(self, name: str) -> np.ndarray:
        """int64 [n] of a "time" column, in `Columns.time_unit`."""
        return _joined(self._arrays[name], np.zeros(0, np.int64))

    def seconds(self, name: str) -> np.ndarray:
        """The same in whole seconds."""
        return self.times(name) // PER_SECOND[self.columns.time_unit]

    def time(self, name: str, row: int) -> str:
        """The value of a "time" column in row 0, 1, ... as its file has it."""
        unit, dated = self._units[name][self._part(row)]
        value = rescaled(self.times(name)[row], given=self.columns.time_unit, unit=unit)
        return quoted(int(value), unit, dated=dated)

    def place(self, row: int) -> str:
        """The place of row 0, 1, ..., such as "line 4", with the file where there are several."""
        file, start, rows = self._parts[self._part(row)]
        number = rows + row - start if isinstance(rows, int) else int(rows[row - start])
        return file.place(number) if file == self._parts[0][0] == self._parts[-1][0] else f"{file.place(number)} of {file}"

    def counts(self) -> dict[str, int]:
        """Rows by file."""
        counts: dict[str, int] = {}
        for file, start, stop, _ in self._spans():
            counts[file.name] = counts.get(file.name, 0) + stop - start
        return counts

    def note(
        self, problems: Problems, kind: str, wrong: np.ndarray, column: str | None, expected: str,
        got: Callable[[np.ndarray], Iterable[str]],
    ) -> None:  # fmt: skip
        """Adds one problem for each row in which `wrong` [n] is true; `got` makes the texts of some of those rows."""
        for file, start, stop, rows in self._spans():
            here = np.flatnonzero(wrong[start:stop])
            if len(here):
                numbers = here + rows if isinstance(rows, int) else rows[here]
                problems.add(kind, file, numbers, column, expected, got(here + start))

    def _part(self, row: int) -> int:
        return int(np.searchsorted([start for _, start, _ in self._parts], row, side="right")) - 1

    def _spans(self) -> Iterator[tuple[File, int, int, int | np.ndarray]]:
        """(file, first row, row after the last, number of the first or of each row) of every block."""
        stops = [start for _, start, _ in self._parts[1:]] + [self.count]
        return ((file, start, stop, rows) for (file, start, rows), stop in zip(self._parts, stops, strict=False))


def scan(source: Source, kinds: Mapping[str, Kind], problems: Problems, *, columns: Columns, name: str) -> Scan:
    """Reads a table once; arguments as `tables.blocks`."""
    label = source.path if isinstance(source, TextFile) else source
    table = Scan(File(str(label) if hasattr(label, "__fspath__") or isinstance(label, str) else name), kinds, columns)
    for block in blocks(source, kinds, problems, columns=columns, name=name):
        table.add(block, problems)
    return table


def _joined(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """The parts as one array, which takes their place in the list, so that nothing is held twice."""
    parts[:] = parts if len(parts) == 1 else [np.concatenate(parts) if parts else empty]
    return parts[0]


class Values(NamedTuple):
    """What `check` tells of the distinct values of a categorical column; they are not kept."""

    distinct: int
    missing: int  # rows without one
    cut: int  # bags of more values than are kept


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Events, items and users, read once; rows int32 [n] or [n, bag length], 0 where a value is missing or unknown."""

    scans: Mapping[FileName, Scan]
    rows: Mapping[FileName, Mapping[str, np.ndarray]]
    vocabularies: Mapping[str, Vocabulary]
    values: Mapping[tuple[FileName, str], Values]


def read_tables(
    sources: Mapping[FileName, Source | None], columns: Columns, problems: Problems, *, encoder: Encoder | None,
    grow: bool = False,
) -> Tables:  # fmt: skip
    """Reads every table once, in the order of `sources`: the last one with a vocabulary's ids says which are known.

    An `encoder` says it in their place; with `grow` both do, but for actions. `problems` receives what is wrong with values,
    and ids that an items or users table has twice.
    """
    scans: dict[FileName, Scan] = {
        name: scan(source, columns.of(name, computed=False), problems, columns=columns, name=name)
        for name, source in sources.items()
        if source is not None
    }
    members: dict[str, list[tuple[FileName, str]]] = {}
    values: dict[tuple[FileName, str], Values] = {}
    for name in scans:
        for column, vocabulary in columns.vocabularies(name).items():
            members.setdefault(vocabulary, []).append((name, column))
            codes = scans[name].codes[column]
            first = codes.codes if codes.codes.ndim == 1 else codes.codes[:, 0]
            values[name, column] = Values(len(codes.distinct), int(np.count_nonzero(first < 0)), codes.cut)
    rows: dict[FileName, dict[str, np.ndarray]] = {name: {} for name in scans}
    known = {} if encoder is None else dict(encoder.vocabularies)
    if "action" in members and columns.actions:
        _settle_actions(scans["events"], columns, rows["events"], problems)
        del members["action"]
    for vocabulary, places in members.items():
        tables = [(scans[name], column) for name, column in places]
        given, grows = known.get(vocabulary), grow and vocabulary != "action"
        known[vocabulary], settled = validate(vocabulary, tables, columns, problems, given=given, grow=grows)
        for (name, _), of_table in zip(places, settled, strict=True):
            rows[name][vocabulary] = of_table
    vocabularies = {name: known.get(name, Vocabulary([])) for name in vocabulary_names(columns)}
    tables = Tables(scans=scans, rows=rows, vocabularies=vocabularies, values=values)
    _note_repeated_ids(tables, columns, problems)
    return tables


def validate(
    name: str, members: list[tuple[Scan, str]], columns: Columns, problems: Problems, *, given: Vocabulary | None = None,
    grow: bool = False,
) -> tuple[Vocabulary, list[np.ndarray]]:  # fmt: skip
    """The vocabulary of some columns and int32 rows of each in it: `given`, or that of the last member with values; both with
    `grow`."""
    held = [table.codes.pop(column) for table, column in members]
    kind = given.kind if given is not None else None
    kind = kind or _kind(held, is_text=any(column in columns.text for _, column in members))
    values = [_as_kind(codes, kind) for codes in held]
    vocabulary = given
    if vocabulary is None or grow:
        newer = Vocabulary(next((ids for ids, _ in reversed(values) if len(ids)), []))
        vocabulary = newer if vocabulary is None else vocabulary.with_ids(newer)
    rows = []
    for (table, column), codes, (ids, fits) in zip(members, held, values, strict=True):
        place = np.append(fits, False)  # the last one is code -1, no value
        of_code = np.zeros(len(place), np.int32)
        of_code[place] = vocabulary.encode(ids)
        rows.append(of_code[codes.codes])
        if len(fits) and not fits.any():
            others = [other.label for other, _ in members if other is not table]
            like = f"like the {name}s of {others[0]}" if given is None else f"like the vocabulary {name!r} given"
            expected, got = ("text", "integers") if kind == "strings" else ("integers", "text")
            problems.add("wrong type", table.label, None, column, f"{expected} {like}", got)
        elif codes.codes.ndim == 1:
            _note_values(table, column, codes, place, ids, problems)
            expected = f"one of the {len(vocabulary.raw)} known"
            unknown = f"unknown {name if name in ('user', 'item', 'action') else 'category'}"
            strange = table.is_good(column) & (codes.codes >= 0) & (rows[-1] == 0)
            table.note(problems, unknown, strange, column, expected, lambda at, codes=codes: _shown(codes, at))
    return vocabulary, rows


def _kind(members: list[Codes], *, is_text: bool = False) -> IdKind:
    """Whether a vocabulary is of integers or of text."""
    typed = {codes.is_integer for codes in members if not codes.is_text and len(codes.distinct)}
    if is_text:
        return "strings"
    if typed:
        return "integers" if True in typed else "strings"
    whole = [codes.looks_whole for codes in members if len(codes.distinct)]
    return "integers" if any(whole) or not whole else "strings"


def _as_kind(codes: Codes, kind: IdKind) -> tuple[np.ndarray | list[str], np.ndarray]:
    """The distinct values that are of a kind, and which of all those are, bool [distinct]."""
    arrow, distinct = pyarrow(), codes.distinct
    if codes.is_integer:
        fits = np.full(len(distinct), kind == "integers")
        return (distinct.to_numpy() if kind == "integers" else []), fits
    if kind == "strings":
        return distinct.to_pylist(), np.ones(len(distinct), bool)
    fits = is_whole(distinct)
    return distinct.filter(arrow.array(fits)).cast(arrow.int64()).to_numpy(), fits


def _note_values(
    table: Scan, column: str, codes: Codes, fits: np.ndarray, ids: np.ndarray | list[str], problems: Problems
) -> None:
    """Notes text among integers and negative ids, and marks them as no good."""
    negative = np.zeros(len(fits), bool)
    if isinstance(ids, np.ndarray) and table.kinds[column] == "id":
        negative[fits] = ids < 0
    strange = ~fits
    strange[-1] = False
    for kind, wrong, expected in (
        ("wrong type", strange, "a whole number, like the others (Columns.text keeps a column text)"),
        ("negative id", negative, "0 or more"),
    ):
        if wrong.any():
            here = wrong[codes.codes]
            table.note(problems, kind, here, column, expected, lambda at: _shown(codes, at))
            table.bad[column].append((0, here))


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
    """Events of known users with a time, by user and in the order of histories; arrays [n]."""

    at: np.ndarray  # int64, rows of the table
    user: np.ndarray
    time: np.ndarray  # in `Columns.time_unit`
    item: np.ndarray
    action: np.ndarray
    again: np.ndarray  # bool, whether an event is the one before it once more, of a known item


def events_of(tables: Tables, columns: Columns) -> Events:
    """The events of tables that were read."""
    table, rows = tables.scans["events"], tables.rows["events"]
    good = table.is_good(columns.user, columns.time) & (rows["user"] > 0)
    parts = rows["user"], table.times(columns.time), rows["item"], rows.get("action", np.ones(table.count, np.int32))
    user, time, item, action = parts if good.all() else [part[good] for part in parts]
    order = history_order(time, item, action, user=user)
    user, time, item, action = (part[order] for part in (user, time, item, action))
    same = np.logical_and.reduce([part[1:] == part[:-1] for part in (user, time, item, action)])
    return Events(np.flatnonzero(good)[order], user, time, item, action, np.append(False, same)[: len(user)] & (item > 0))


def _note_repeated_ids(tables: Tables, columns: Columns, problems: Problems) -> None:
    """Notes items and users that are in an earlier row of their table too."""
    keys: list[tuple[FileName, str, str]] = [("items", "item", columns.item_id), ("users", "user", columns.user_record_id)]
    for name, which, column in keys:
        if name not in tables.scans:
            continue
        table, ids, vocabulary = tables.scans[name], tables.rows[name][which], tables.vocabularies[which]
        first = np.zeros(len(vocabulary), np.int64)
        first[ids[::-1]] = np.arange(len(ids))[::-1]  # the first row of each id is written last
        again = (ids > 0) & (first[ids] != np.arange(len(ids)))

        def got(at: np.ndarray, table=table, ids=ids, known=vocabulary, first=first) -> Iterator[str]:
            return (f"{known.decode(i)!r}, which is in {table.place(int(first[i]))} too" for i in ids[at])

        table.note(problems, f"duplicate {which}", again, column, "every id once", got)


def _settle_actions(table: Scan, columns: Columns, rows: dict[str, np.ndarray], problems: Problems) -> None:
    """Rows of `Columns.actions`, which may name integers as text."""
    column = str(columns.action)
    codes = table.codes.pop(column)
    numbers = {str(value): number for number, value in enumerate(columns.actions, start=1)}
    of_code = np.array([*(numbers.get(str(value), 0) for value in codes.distinct.to_pylist()), 0], np.int32)
    rows["action"] = of_code[codes.codes]
    strange = table.is_good(column) & (codes.codes >= 0) & (rows["action"] == 0)
    expected = f"one of {', '.join(map(repr, columns.actions))}"
    table.note(problems, "unknown action", strange, column, expected, lambda at: _shown(codes, at))


def _shown(codes: Codes, at: np.ndarray) -> Any:
    """Values of some rows for a message, one after another; text is quoted."""
    whole = is_whole(codes.distinct)
    for code in codes.codes[at]:
        value = codes.distinct[int(code)].as_py()
        yield str(value) if isinstance(value, int) or (codes.is_text and whole[code]) else repr(value)
