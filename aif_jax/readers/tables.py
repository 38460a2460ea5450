"""Tables as blocks of checked columns: every value is parsed as what `Columns` says it is, or its problem is noted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from aif_jax.encoding.columns import CODED, Columns, Kind
from aif_jax.encoding.raw import flat_lists
from aif_jax.encoding.times import FLOOR, PER_SECOND, Ticks, likely_unit, quoted, wrong_unit
from aif_jax.readers.problems import File, Problems
from aif_jax.readers.sources import Source, TableBatch, batches, pyarrow

PRESENT = {"id": "an id", "category": "a category in every row", "action": "an action in every event"}  # where null is wrong
WHOLE = r"^(0|-?[1-9][0-9]{0,17})$"  # integers as text, each in one spelling: "07" is none


class Coded(NamedTuple):
    """Categorical values of a block."""

    codes: np.ndarray  # int32 [n], or [n, length] for bags: position in `values`, -1 where there is none
    values: Any  # the distinct values: Arrow array of int64 or large_string; of text files always the latter


def blocks(source: Source, kinds: Mapping[str, Kind], problems: Problems, *, columns: Columns, name: str) -> Iterator[Any]:
    """Reads the columns `kinds` of a source, as `sources.batches`; `problems` receives every value that is not of its kind.

    A block has (values, good) of each column but those that are missing or cannot be read: `Coded`, `Ticks`, float32 [n] or
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
        return Coded(codes, coded.values), np.ones(len(rows), bool)

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

    def times(self, values: Any, rows: np.ndarray) -> tuple[Ticks, np.ndarray]:
        """Times in the unit that they came in."""
        arrow = pyarrow()
        dated = is_dated(self.type)
        good = self._not_null(values, rows, "a time")
        if self.text:
            target, expected = (self.type, "a date and time") if dated else (arrow.int64(), "a whole number")
            values, parsed = self._parse(values, rows, target, expected)
            good &= parsed
        if arrow.types.is_date(self.type):
            values = values.cast(arrow.timestamp("s"))
        unit = values.type.unit if dated else self.columns.time_unit
        array = values.cast(arrow.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        late, early = wrong_unit(array, unit=unit, dated=dated)
        for wrong, expected in ((late, "times before 2100"), (early, "times after 1973")):
            looks = "" if dated else ", which looks like {!r}"
            got = (f"{quoted(v, unit, dated=dated)}{looks.format(likely_unit(int(v)))}" for v in array[good & wrong])
            self.problems.add("time unit", self.file, rows[good & wrong], self.name, f"{expected} in {unit!r}", got)
        least = FLOOR * PER_SECOND[unit] // PER_SECOND["ns"]  # the year 1823: earlier ones could overflow in nanoseconds
        ancient = good & (array < least)
        expected = f"times of at least {quoted(least, unit, dated=dated)} in {unit!r}"
        got = (quoted(value, unit, dated=dated) for value in array[ancient])
        self.problems.add("time unit", self.file, rows[ancient], self.name, expected, got)
        return Ticks(np.where(ancient, 0, array), PER_SECOND[unit]), good & ~ancient

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
