"""What is wrong with a table: every problem with file, row, column, expected and got, so that one reading lists all."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from aif_jax.checks import expect

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

    kind: str  # "null", "negative id", "missing column", "wrong type", "unknown category", "unsorted time", ...
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

    kind: str  # "repeated event", "future event", "outlier", "alike values", ...: the table in `check` has all
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
