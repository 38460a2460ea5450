"""Lists every problem of your files, with row numbers: `aif-jax check --events events.parquet --items items.parquet`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import numpy as np

from aif_jax.checks import expect
from aif_jax.columns import Columns
from aif_jax.encoder import Encoder
from aif_jax.readers.problems import CAP, Problem, Problems
from aif_jax.readers.settle import Tables, read_tables
from aif_jax.readers.sources import Source

Order: TypeAlias = Literal["auto", "user", "time", "none"]
ORDERS: tuple[str, ...] = get_args(Order)
FAR = 10.0  # a mean further from 0, or a deviation further from 1 by this factor, wants scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found."""

    problems: list[Problem]  # by file and row; at most `cap` of each kind
    totals: dict[str, int]  # how many there are of each kind, listed or not
    rows: dict[str, int]  # file to rows of data
    order: str  # what the events were checked to be sorted by: "user" (and time), "time" or "none"

    @property
    def clean(self) -> bool:
        """Whether there is no problem."""
        return not self.totals

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        listed = {kind: sum(p.kind == kind for p in self.problems) for kind in self.totals}
        lines += [
            f"{kind}: {total} in all, {listed[kind]} listed" for kind, total in self.totals.items() if total > listed[kind]
        ]
        rows = "".join(f"{file}: {count} rows, " for file, count in self.rows.items())
        sorted_by = {"user": "sorted by user and time", "time": "sorted by time", "none": "in no order"}[self.order]
        count = sum(self.totals.values())
        verdict = {0: "no problem", 1: "1 problem"}.get(count, f"{count} problems")
        return "\n".join([*lines, f"{verdict} ({rows}events checked as {sorted_by})"])


def check(
    events: Source,
    *,
    items: Source | None = None,
    users: Source | None = None,
    columns: Columns | None = None,
    encoder: Encoder | None = None,
    order: Order = "auto",
    cap: int = CAP,
) -> Report:
    """Checks every value of every row and lists all that is wrong; nothing is raised for a wrong file.

    | kind | means |
    |---|---|
    | missing column, wrong type, wrong number of fields, wrong length | not the table that `columns` describes |
    | no rows, unreadable file, cut off | not a table, or an incomplete one |
    | null, not finite, negative id | a value that must be there, be finite, be 0 or more |
    | unknown item, unknown user | an event's id that the items or users file (or the encoder) lacks |
    | unknown action, unknown category | none of `Columns.actions`; a value that the encoder lacks |
    | duplicate item, duplicate user, duplicate event | the same id twice; the same user, item, action and time twice |
    | unsorted time | a file that looks sorted, or is said to be, has an earlier time after a later one |
    | history across users | the same of users: a user's events go on after those of another |
    | time unit | a time that is implausible in the unit stated, such as milliseconds read as seconds |
    | unscaled floats | a column far from mean 0 and deviation 1 although `Columns.scale` is off |

    Args:
      events: Parquet, CSV or TSV, file or folder; a table in memory.
      items, users: the same; None leaves out what only they can tell.
      columns: which column is what; default: the encoder's, or `Columns()`.
      encoder: of a trained model; values that its vocabularies lack are problems.
      order: what the events claim to be sorted by: "user" (and time), "time", "none"; "auto" looks. Reading needs no order.
      cap: problems of one kind that are listed; the rest is counted.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: a file is not there.
      ValueError: wrong options, or a file name that does not say what it is.

    Example:
      >>> table = {"user": [1, 1], "item": [7, -8], "time": [20, None]}
      >>> print(check(table, columns=Columns()))
      events, row 2, column 'time': null: expected a time, got nothing
      events, row 2, column 'item': negative id: expected 0 or more, got -8
      2 problems (events: 2 rows, events checked as in no order)
    """
    expect(order in ORDERS, "order", f"one of {', '.join(ORDERS)}", repr(order))
    problems = Problems(cap)
    columns = columns or (encoder.columns if encoder is not None else Columns())
    known = encoder.vocabularies if encoder is not None else None
    tables = read_tables({"events": events, "items": items, "users": users}, columns, problems, known=known)
    checked = _note_order(tables, columns, problems, order=order) if order != "none" else order
    _note_repeated_events(tables, columns, problems)
    if not columns.scale:
        _note_unscaled(tables, columns, problems)
    rows = {}
    for name in ("items", "users", "events"):
        rows |= tables.scans[name].counts() if name in tables.scans else {}
    return Report(problems=problems.listed(), totals=dict(problems.totals), rows=rows, order=checked)


def _note_unscaled(tables: Tables, columns: Columns, problems: Problems) -> None:
    for which, names in columns.floats.items():
        table = tables.scans.get("items" if which == "item" else "users")
        if table is None:
            continue
        for name in names:
            values = table.floats(name)[table.is_good(name)]
            if not len(values):
                continue
            mean, deviation = float(np.mean(values, dtype=np.float64)), float(np.std(values, dtype=np.float64))
            if abs(mean) > FAR or deviation > FAR or 0 < deviation < 1 / FAR:
                got = f"mean {mean:.3g}, deviation {deviation:.3g}"
                expected = "numbers of about -1..1 where Columns.scale is off"
                problems.add("unscaled floats", table.label, None, name, expected, got)


def _note_order(tables: Tables, columns: Columns, problems: Problems, *, order: Order) -> Order:
    """Notes events that break the order by user and time, or by time; returns the order checked: for "auto" the likely one."""
    table, users = tables.scans["events"], tables.rows["events"]["user"]
    at = np.flatnonzero(table.is_good(columns.user, columns.time) & (users > 0))
    user, time = users[at], table.seconds(columns.time)[at]
    starts, falls = (np.append(False, change) for change in (user[1:] != user[:-1], time[1:] < time[:-1]))
    runs = np.flatnonzero(starts | (np.arange(len(user)) == 0))  # where the events of a user begin
    again = np.zeros(len(user), bool)
    again[np.delete(runs, np.unique(user[runs], return_index=True)[1])] = True
    by_user, by_time = int(np.sum(falls & ~starts) + again.sum()), int(falls.sum())
    checked = order
    if order == "auto":
        checked = "user" if by_user <= by_time else "time"
        if 4 * min(by_user, by_time) > len(user) or len(user) < 2:  # among shuffled rows every second one falls back
            checked = "none"

    def note(kind: str, wrong: np.ndarray, column: str, expected: str, text) -> None:
        here = np.zeros(table.count, bool)
        here[at[wrong]] = True
        table.note(problems, kind, here, column, expected, lambda rows: map(text, np.searchsorted(at, rows)))

    def step(i: int) -> str:
        return f"{time[i]} after {time[i - 1]}"

    if checked == "time":
        note("unsorted time", falls, columns.time, "times that ascend", step)
    if checked == "user":
        known = tables.vocabularies["user"]
        note("unsorted time", falls & ~starts, columns.time, "times that ascend within a user", step)
        note(
            "history across users", again, columns.user, "all events of a user together",
            lambda i: f"user {known.decode(int(user[i]))!r} again, after events of other users",
        )  # fmt: skip
    return checked


def _note_repeated_events(tables: Tables, columns: Columns, problems: Problems) -> None:
    """Notes events that are the same in user, item, action and time."""
    table, rows = tables.scans["events"], tables.rows["events"]
    at = np.flatnonzero(table.is_good(*table.kinds) & (rows["user"] > 0) & (rows["item"] > 0))
    parts = [rows["user"], rows["item"], rows.get("action"), table.ticks(columns.time).value]
    keys = [part[at] for part in parts if part is not None]
    order = np.lexsort(keys[::-1])  # stable: the first of equals comes first
    same = np.logical_and.reduce([np.append(False, key[order][1:] == key[order][:-1]) for key in keys])[: len(at)]
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    first = np.full(table.count, -1)
    first[at[order[same]]] = at[order[heads[same]]]

    def got(wrong: np.ndarray) -> Iterator[str]:
        return (f"the user, item, action and time of {table.place(int(first[i]))}" for i in wrong)

    table.note(problems, "duplicate event", first >= 0, None, "every event once", got)
