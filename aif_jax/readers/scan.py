"""One pass over a table: every column in memory, categorical values as codes into distinct values that grow block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from aif_jax.encoding.columns import CODED, Columns, Kind
from aif_jax.encoding.times import PER_SECOND, Ticks, quoted
from aif_jax.readers.problems import File, Problems
from aif_jax.readers.sources import Source, TableBatch, TextFile, pyarrow
from aif_jax.readers.tables import Coded, blocks, is_dated, is_whole

MERGE_AT = 1 << 20  # distinct values of blocks that are merged at a time


class Codes:
    """The codes of one categorical column: int32 [n] or [n, bag length], -1 where there is no value."""

    def __init__(self):
        self.is_text = False
        self.looks_whole: bool | None = None  # whether the first block with values holds integers and nothing else
        self._parts: list[np.ndarray] = []
        self._pending: list[tuple[int, Any]] = []  # part, its distinct values
        self._distinct: Any = pyarrow().array([], pyarrow().int64())

    def add(self, coded: Coded) -> None:
        """Appends the codes of a block."""
        self._parts.append(coded.codes)
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
        self._units: dict[str, list[tuple[int, bool]]] = {name: [] for name, kind in kinds.items() if kind == "time"}

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
                ticks = values or Ticks(np.zeros(count, np.int64), 1)
                self._arrays[name].append(ticks)
                self._units[name].append((ticks.per_second, is_dated(block.types.get(name))))
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

    def ticks(self, name: str) -> Ticks:
        """int64 [n] of a "time" column, in the finest unit that its files have."""
        parts = self._arrays[name]
        finest = max((part.per_second for part in parts), default=1)
        for i, (value, per_second) in enumerate(parts):
            if per_second != finest:
                parts[i] = Ticks(value * (finest // per_second), finest)
        parts[:] = [Ticks(_joined([part.value for part in parts], np.zeros(0, np.int64)), finest)]
        return parts[0]

    def seconds(self, name: str) -> np.ndarray:
        """int64 [n] of a "time" column, whole seconds."""
        return self.ticks(name).seconds

    def time(self, name: str, row: int) -> str:
        """The value of a "time" column in row 0, 1, ... as its file has it."""
        ticks, (per_second, dated) = self.ticks(name), self._units[name][self._part(row)]
        unit = next(unit for unit, count in PER_SECOND.items() if count == per_second)
        return quoted(int(ticks.value[row]) // (ticks.per_second // per_second), unit, dated=dated)

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
        self,
        problems: Problems,
        kind: str,
        wrong: np.ndarray,
        column: str | None,
        expected: str,
        got: Callable[[np.ndarray], Iterable[str]],
    ) -> None:
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
