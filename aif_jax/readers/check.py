"""Lists every problem of your files with row numbers, what is suspicious in them, and a profile.

`aif-jax check --events events.parquet --items items.parquet` is the same from a shell.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.readers.problems import CAP, Problem, Problems, Suspicion
from aif_jax.readers.profile import Profile, Repeats, profile_of
from aif_jax.readers.sources import Source
from aif_jax.readers.validate import EXAMPLES, Tables, read_tables

Order: TypeAlias = Literal["auto", "user", "time", "none"]
ORDERS: tuple[str, ...] = get_args(Order)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found."""

    problems: list[Problem]  # kind by kind; at most `cap` of each kind
    totals: dict[str, int]  # how many there are of each kind, listed or not
    suspicions: list[Suspicion]  # what `read` accepts and is seldom meant
    profile: Profile
    rows: dict[str, int]  # file to rows of data
    order: str  # what the events are sorted by: "user" (and time), "time" or "none"
    unsorted: int  # events that break this order

    @property
    def clean(self) -> bool:
        """Whether there is no problem, so that `read` takes the files; suspicions do not count."""
        return not self.totals

    def __str__(self) -> str:
        lines = []
        for kind, total in self.totals.items():
            listed = [problem for problem in self.problems if problem.kind == kind]
            lines += [f"{kind}: {total:,}", *(f"  {problem}" for problem in listed)]
            lines += [f"  and {total - len(listed):,} more"] if total > len(listed) else []
        lines += [f"suspicion: {suspicion}" for suspicion in self.suspicions]
        rows = "".join(f"{file}: {count} rows, " for file, count in self.rows.items())
        order = {"user": "sorted by user and time", "time": "sorted by time", "none": "in no order"}[self.order]
        broken = f" but for {self.unsorted:,}" if self.unsorted else ""
        counts = [_count(sum(self.totals.values()), "problem"), _count(len(self.suspicions), "suspicion")]
        return "\n".join([*lines, str(self.profile), f"{', '.join(counts)} ({rows}events {order}{broken})"])


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

    A *problem* is what `read` refuses, and what contradicts `order`. Problems are listed kind by kind with their number and the
    first examples; values are quoted as they are in the file.

    | problem | means |
    |---|---|
    | missing column, wrong type, wrong number of fields, wrong length | not the table that `columns` describes |
    | no rows, unreadable file, cut off | not a table, or an incomplete one |
    | null, not finite, negative id | a value that must be there, be finite, be 0 or more |
    | unknown item, unknown user | an event's id that the items or users file (or the encoder) lacks |
    | unknown action, unknown category | none of `Columns.actions`; a value that the encoder lacks |
    | duplicate item, duplicate user | the same id twice |
    | time unit | a time that is implausible in the unit stated, such as milliseconds read as seconds |
    | unsorted time | with `order="user"` or `order="time"`: an earlier time after a later one |
    | history across users | with `order="user"`: a user's events go on after those of another |

    A *suspicion* is what `read` takes, logs as a warning, and what is seldom meant:

    | suspicion | means |
    |---|---|
    | repeated event | the same user, item, action and time in several rows; half of all where a file is there twice |
    | future event | an event later than today |
    | stray time | a few events that are more than a year, and more than the span of all others, from the others |
    | one for many | a user or an item with more than a tenth of all events, and ten times as many as the others |
    | alike values | values that differ by blanks around them or, but for ids, by upper case: "Sport" and "Sport " |
    | bag separator | values of bags that hold another separator than `Columns.bag_separator`, and never that one |
    | unique values | an attribute with another value in each row, such as the item id as category |
    | outlier | a float far outside of all others, such as a price of 1e12; scales are learned without it |
    | placeholder | a single negative value such as -1 among others from 0 |
    | unscaled floats | a column far from mean 0 and deviation 1 although `Columns.scale` is off |

    The report ends with a *profile*: the time span, the events of a user and of an item, ranges of floats, and for each
    categorical column the number of distinct values and the shares of missing and unknown ones.

    Args:
      events: Parquet, CSV or TSV, file or folder; a table in memory.
      items, users: the same; None leaves out what only they can tell.
      columns: which column is what; default: the encoder's, or `Columns()`.
      encoder: of a trained model; values that its vocabularies lack are problems.
      order: what the events must be sorted by: "user" (and time) or "time"; "none" demands no order, as `read` does not.
        "auto" reports the likely order, and how many events break it; these are no problems.
      cap: problems of one kind that are listed; the rest is counted.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: a file is not there.
      ValueError: wrong options, or a file name that does not say what it is.

    Example:
      >>> table = {"user": [1, 1, 2], "item": [7, -8, 7], "time": [1_600_000_000, None, 1_600_000_060]}
      >>> print(check(table, columns=Columns()))
      null: 1
        events, row 2, column 'time': null: expected a time, got nothing
      negative id: 1
        events, row 2, column 'item': negative id: expected 0 or more, got -8
      profile: 2 events, 2020-09-13 12:26:40 to 2020-09-13 12:27:40 (UTC), 0 % of them repeated
                           min  1 %  25 %  median  75 %  99 %  max
        events of a user     1    1     1       1     1     1    1
        events of an item    2    2     2       2     2     2    2
                        values  missing  unknown
        events, 'user'       2      0 %      0 %
        events, 'item'       2      0 %      0 %
      2 problems, 0 suspicions (events: 3 rows, events sorted by user and time)
    """
    expect(order in ORDERS, "order", f"one of {', '.join(ORDERS)}", repr(order))
    problems = Problems(cap)
    columns = columns or (encoder.columns if encoder is not None else Columns())
    known = encoder.vocabularies if encoder is not None else None
    tables = read_tables({"events": events, "items": items, "users": users}, columns, problems, known=known)
    checked, unsorted = _note_order(tables, columns, problems, order=order)
    profile, suspicions = profile_of(tables, columns, repeats=_repeats(tables, columns))
    rows = {}
    for name in ("items", "users", "events"):
        rows |= tables.scans[name].counts() if name in tables.scans else {}
    return Report(
        problems=problems.listed(),
        totals=dict(problems.totals),
        suspicions=suspicions,
        profile=profile,
        rows=rows,
        order=checked,
        unsorted=unsorted,
    )


def _note_order(tables: Tables, columns: Columns, problems: Problems, *, order: Order) -> tuple[Order, int]:
    """The order of the events, by user and time or by time, and how many break it; the likely one for "auto".

    Those are problems where the order is not "auto".
    """
    if order == "none":
        return order, 0
    table, users = tables.scans["events"], tables.rows["events"]["user"]
    at = np.flatnonzero(table.is_good(columns.user, columns.time) & (users > 0))
    user, time = users[at], table.ticks(columns.time).value[at]
    changes = user[1:] != user[:-1], time[1:] < time[:-1]
    starts, falls = (np.append(False, change)[: len(user)] for change in changes)
    runs = np.flatnonzero(starts | (np.arange(len(user)) == 0))  # where the events of a user begin
    again = np.zeros(len(user), bool)
    again[np.delete(runs, np.unique(user[runs], return_index=True)[1])] = True
    by_user, by_time = int(np.sum(falls & ~starts) + again.sum()), int(falls.sum())
    if order == "auto":
        likely: Order = "user" if by_user <= by_time else "time"
        unsorted = min(by_user, by_time)
        # among shuffled rows every second one falls back
        return ("none", 0) if 4 * unsorted > len(user) or len(user) < 2 else (likely, unsorted)

    def note(kind: str, wrong: np.ndarray, column: str, expected: str, text) -> None:
        here = np.zeros(table.count, bool)
        here[at[wrong]] = True
        table.note(problems, kind, here, column, expected, lambda rows: map(text, np.searchsorted(at, rows)))

    def step(i: int) -> str:
        return f"{table.time(columns.time, int(at[i]))} after {table.time(columns.time, int(at[i - 1]))}"

    if order == "time":
        note("unsorted time", falls, columns.time, "times that ascend", step)
        return order, by_time
    known = tables.vocabularies["user"]
    note("unsorted time", falls & ~starts, columns.time, "times that ascend within a user", step)
    note(
        "history across users", again, columns.user, "all events of a user together",
        lambda i: f"user {known.decode(int(user[i]))!r} again, after events of other users",
    )  # fmt: skip
    return order, by_user


def _repeats(tables: Tables, columns: Columns) -> Repeats:
    """Events that are the same as an earlier one in user, item, action and time."""
    table, rows = tables.scans["events"], tables.rows["events"]
    at = np.flatnonzero(table.is_good(*table.kinds) & (rows["user"] > 0) & (rows["item"] > 0))
    parts = [rows["user"], rows["item"], rows.get("action"), table.ticks(columns.time).value]
    keys = [part[at] for part in parts if part is not None]
    order = np.lexsort(keys[::-1])  # stable: the first of equals comes first
    same = np.logical_and.reduce([np.append(False, key[order][1:] == key[order][:-1]) for key in keys])[: len(at)]
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    again = np.flatnonzero(same)
    first = again[np.argsort(order[again])[:EXAMPLES]]  # by row
    examples = (f"{table.place(int(at[order[i]]))} (as {table.place(int(at[order[heads[i]]]))})" for i in first)
    return Repeats(len(again), tuple(examples))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
