"""What the readers of public data share: text files as columns, checks that name file and line, and the way to a `Dataset`.

Each reader takes a folder with the publisher's files, or excerpts of them, and gives a data set whose rows follow the
ascending raw ids. It raises FileNotFoundError for a file that is missing, and ValueError for a malformed one (file, line,
column, expected and got), and for a wrong option.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import csv

from aif_jax import Dataset, Vocabulary
from aif_jax.checks import expect
from aif_jax.encoding.columns import Columns, Kind
from aif_jax.encoding.encoder import Encoder
from aif_jax.readers import read

UNKNOWN = ""
"""Stands for a missing value of a text column; vocabularies do not have it."""
UNIT_SEPARATOR = "\x1f"  # replaces a separator of several characters, which Arrow does not know


class Table:
    """Columns of one text file.

    `kinds` by column are "integer", "float", and "text" that may be missing, which becomes UNKNOWN. `names` are the columns of
    a file without a header.
    """

    def __init__(
        self, path: Path, kinds: Mapping[str, str],
        *, names: tuple[str, ...] = (), separator: str = ",", encoding: str = "utf8", quoted: bool = True,
    ):  # fmt: skip
        expect(path.is_file(), str(path), "a file", "no such file", error=FileNotFoundError)
        long = len(separator) > 1
        types = {"integer": arrow.int64(), "float": arrow.float64(), "text": arrow.dictionary(arrow.int32(), arrow.string())}
        convert: dict[str, Any] = {"column_types": {name: types[kind] for name, kind in kinds.items()}}
        convert |= {"include_columns": list(kinds), "strings_can_be_null": True, "null_values": [""]}
        parse = {"delimiter": UNIT_SEPARATOR if long else separator, "quote_char": '"' if quoted else False}
        data = io.BytesIO(path.read_bytes().replace(separator.encode(), UNIT_SEPARATOR.encode())) if long else str(path)
        read = csv.ReadOptions(use_threads=False, column_names=list(names) or None, encoding=encoding)  # errors then have rows
        options = read, csv.ParseOptions(**parse, ignore_empty_lines=False), csv.ConvertOptions(**convert)
        try:
            table = csv.read_csv(data, *options)
        except arrow.ArrowException as error:
            raise ValueError(f"{path}: {str(error).replace(UNIT_SEPARATOR, separator)}") from error
        with open(path, "rb") as end:
            end.seek(-1, 2)
            expect(end.read() == b"\n", str(path), "a line end after the last line", "none: the file may be cut off")
        self._path, self._first = path, 1 if names else 2  # the line of the first row
        words = {name: table[name].combine_chunks() for name, kind in kinds.items() if kind == "text"}
        self._words = {name: (v.dictionary.to_pylist(), v.indices.fill_null(-1).to_numpy()) for name, v in words.items()}
        self._columns = {name: table[name].to_numpy() for name, kind in kinds.items() if kind != "text"}
        for name in self._columns:
            self.expect(table[name].is_valid().to_numpy(), name, "a value in every line", lambda row: "nothing")

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column: int64 [n], float64 [n], or StringDType [n]."""
        if name in self._columns:
            return self._columns[name]
        words, codes = self._words[name]
        return np.array([*words, UNKNOWN], np.dtypes.StringDType())[codes]

    def expect(self, good: np.ndarray, column: str, expected: str, got: Callable[[int], str] | None = None) -> None:
        """Raise ValueError with the first line where `good` [n] is false, and `got` of it: what the column has there."""
        if not good.all():
            row = int(np.argmin(good))
            shown = got(row) if got else repr(self[column][[row]].tolist()[0])
            expect(False, f"{self._path}, line {row + self._first}, column {column!r}", expected, shown)

    def words(self, column: str, words: tuple[str, ...]) -> np.ndarray:
        """Return a text column as int64 [n] positions in `words`. Raises as `expect`."""
        known, codes = self._words[column]
        positions = np.array([*(words.index(word) if word in words else -1 for word in known), -1])[codes]
        self.expect(positions >= 0, column, f"one of {', '.join(words)}")
        return positions

    def expect_once(self, column: str) -> None:
        """Raise ValueError where an id is in an earlier line too."""
        values = self._columns[column]
        _, first, which = np.unique(values, return_index=True, return_inverse=True)
        once, line = first[which] == np.arange(len(values)), first[which] + self._first
        self.expect(once, column, "every id once", lambda row: f"{values[row]}, which is in line {line[row]} too")


def dataset(
    name: str,
    *,
    events: Mapping[str, Any],
    items: Mapping[str, Any],
    users: Mapping[str, Any] | None = None,
    columns: Columns,
    vocabularies: Mapping[str, Vocabulary],
) -> Dataset:
    """Return a `Dataset` of raw values by column whose ids have been checked.

    An attribute without a value is UNKNOWN, or None in a list. `vocabularies` are of attributes whose values are fixed
    beforehand; others take the values that their table has.
    """
    known = dict(vocabularies)
    for table, which in ((items, "items"), (users, "users"), (events, "events")):
        for column, vocabulary in columns.vocabularies(which).items() if table is not None else ():  # type: ignore[arg-type]
            if vocabulary not in known and not (vocabulary == "action" and columns.actions):
                values = table[column]  # type: ignore[index]
                if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
                    values = [value for value in values if value is not None and value != UNKNOWN]
                known[vocabulary] = Vocabulary(values)
    tables = [_nulls(items, columns.of("items", statistics=False)), _nulls(users, columns.of("users"))]
    width = 0 if columns.content is None else items[columns.content].shape[1]
    encoder = Encoder(columns=columns, vocabularies=known, content=width)
    made = read(events, items=tables[0], users=tables[1], encoder=encoder, unknown="skip", name=name)
    if len(made.log) != len(events[columns.time]) or not made.log.item.all() or not made.log.action.all():
        raise ValueError(f"{name}: expected events of known users, items and actions, got others")
    return made


def coded(positions: np.ndarray, words: tuple[str, ...]) -> Any:
    """Return words at positions int [n], as an Arrow column of codes."""
    return arrow.DictionaryArray.from_arrays(arrow.array(positions.astype(np.int32)), arrow.array(words))


def _nulls(table: Mapping[str, Any] | None, kinds: Mapping[str, Kind]) -> dict[str, Any] | None:
    """Return a table with None in place of UNKNOWN in columns whose values may be missing."""
    if table is None:
        return None
    return {
        name: [None if value == UNKNOWN else value for value in values] if kinds.get(name) == "value" else values
        for name, values in table.items()
    }


def one_file(folder: Path, pattern: str) -> Path:
    """Return the only file of a pattern. Raises ValueError unless there is exactly one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one file {pattern}, got {len(found)}: {[file.name for file in found[:8]]}")
    return found[0]
