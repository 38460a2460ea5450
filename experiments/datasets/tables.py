"""What the readers of public data share: text files as columns, checks that name file and line, and the way to a `Dataset`.

Each reader takes a folder with the publisher's files, or excerpts of them, and gives a data set whose rows follow the
ascending raw ids. It raises FileNotFoundError for a file that is missing, and ValueError for a malformed one (file, line,
column, expected and got), for a wrong option, and for a content embedding that does not fit. `content` is None for none, a path
to an .npz with `embedding` and item ids, or (raw item ids [n], embeddings [n, E]).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import Dataset, Vocabulary
from aif_jax.encoding.columns import Columns, Kind
from aif_jax.encoding.encoder import Encoder, schema_of
from aif_jax.readers import TextFile, load_columns, read
from aif_jax.readers.tables import Problems, pyarrow
from experiments.datasets.content import Content, lookup

UNKNOWN = ""
"""Stands for a missing value of a text column; vocabularies do not have it."""


class Table:
    """Columns of one text file.

    `kinds` are those of `readers.load_columns` by column, and "text" for text that may be missing, which becomes UNKNOWN.
    """

    def __init__(self, file: TextFile, kinds: Mapping[str, str]):
        columns = Columns(text=tuple(name for name, kind in kinds.items() if kind == "text"))
        parsed: dict[str, Kind] = {name: "value" if kind == "text" else kind for name, kind in kinds.items()}  # type: ignore[misc]
        self._scan, self._columns = load_columns(file, parsed, columns=columns)
        for name in [name for name, kind in kinds.items() if kind == "id" and self._columns[name].dtype.kind == "T"]:
            self._columns[name] = self.integers(name)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column: int64 [n] ids or seconds, float32 [n], or StringDType [n]."""
        return self._columns[name] if name in self._columns else self._scan.codes[name].values("strings")

    def __len__(self) -> int:
        return self._scan.count

    def expect(self, good: np.ndarray, column: str, expected: str, got: Callable[[int], str] | None = None) -> None:
        """Raise ValueError with the lines where `good` [n] is false, and `got` of them: what the column has there."""
        if not good.all():
            problems, values = Problems(), self[column]
            shown = got or (lambda row: _shown(values[row]))
            self._scan.note(problems, "unexpected value", ~good, column, expected, lambda rows: map(shown, rows))
            problems.expect_none()

    def words(self, column: str, words: tuple[str, ...]) -> np.ndarray:
        """Return a text column as int64 [n] positions in `words`. Raises as `expect`."""
        codes = self._scan.codes[column]
        place = [words.index(word) if word in words else -1 for word in codes.distinct.to_pylist()]
        positions = np.array([*place, -1])[codes.codes]
        self.expect(positions >= 0, column, f"one of {', '.join(words)}")
        return positions

    def integers(self, column: str) -> np.ndarray:
        """Return a text column as int64 [n]. Raises as `expect`."""
        text = self[column]
        self.expect(np.strings.isdigit(text), column, "a whole number of 0 or more")
        return text.astype(np.int64)

    def expect_once(self, column: str) -> None:
        """Raise ValueError where an id is in an earlier line too."""
        values = self._columns[column]
        _, first, which = np.unique(values, return_index=True, return_inverse=True)
        first = first[which]

        def got(row: int) -> str:
            return f"{values[row]}, which is in {self._scan.locate(int(first[row]))} too"

        self.expect(first == np.arange(len(values)), column, "every id once", got)


def dataset(
    name: str,
    *,
    events: Mapping[str, Any],
    items: Mapping[str, Any],
    users: Mapping[str, Any] | None = None,
    columns: Columns,
    vocabularies: Mapping[str, Vocabulary],
    content: Content | None = None,
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
    tables = [_nulls(table, columns.of(which)) for table, which in ((items, "items"), (users, "users"))]  # type: ignore[arg-type]
    width = 0
    if content is not None:
        columns = dataclasses.replace(columns, content="content")
        vectors = lookup(content, np.asarray(items[columns.item_id]))
        tables[0], width = {**tables[0], "content": vectors}, vectors.shape[1]  # type: ignore[dict-item]
    encoder = Encoder(schema=schema_of(columns, known, content=width), columns=columns, vocabularies=known)
    made = read(events, items=tables[0], users=tables[1], encoder=encoder, unknown="skip", name=name)
    if len(made.log) != len(events[columns.time]) or not made.log.item.all() or not made.log.action.all():
        raise ValueError(f"{name}: expected events of known users, items and actions, got others")
    return made


def coded(positions: np.ndarray, words: tuple[str, ...]) -> Any:
    """Return words at positions int [n], as an Arrow column of codes."""
    arrow = pyarrow()
    return arrow.DictionaryArray.from_arrays(arrow.array(positions.astype(np.int32)), arrow.array(words))


def _nulls(table: Mapping[str, Any] | None, kinds: Mapping[str, Kind]) -> dict[str, Any] | None:
    """Return a table with None in place of UNKNOWN in columns whose values may be missing."""
    if table is None:
        return None
    return {
        name: [None if value == UNKNOWN else value for value in values] if kinds.get(name) == "value" else values
        for name, values in table.items()
    }


def text_file(path: Path, **options: Any) -> TextFile:
    """Return a text file whose last line has a line end; one without may be cut off."""
    return TextFile(path=path, whole=True, **options)


def one_file(folder: Path, pattern: str) -> Path:
    """Return the only file of a pattern. Raises ValueError unless there is exactly one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one file {pattern}, got {len(found)}: {[file.name for file in found[:8]]}")
    return found[0]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(str(value))
    return f"{value:g}" if isinstance(value, np.floating) else str(value)
