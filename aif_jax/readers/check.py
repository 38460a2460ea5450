"""Lists every problem of your files with row numbers, what is suspicious in them, and a profile.

`aif-jax check --events events.parquet --items items.parquet` is the same from a shell.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.columns import Columns, File, Kind
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.raw import bulk_of
from aif_jax.encoding.times import PER_SECOND, readable
from aif_jax.readers.sources import CAP, Problem, Problems, Source, Suspicion
from aif_jax.readers.tables import EXAMPLES, Scan, Tables, Values, read_tables

FILES: dict[str, File] = {"item": "items", "user": "users"}
BLOCK = 1 << 22  # rows looked at in one go
SAMPLE = 1 << 18  # times that a quantile is taken of
YEAR = 366 * 86_400  # seconds
QUANTILES = {"min": 0.0, "1 %": 0.01, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "99 %": 0.99, "max": 1.0}
MOST = 0.1, 10  # a user with more than this share of all events, and with so many times the mean of the others
UNIQUE = 0.99, 20  # an attribute with another value in this share of its rows, of at least so many
FEW = 20  # of so many events one can be far from the others
FAR = 100  # an outlier is outside of the bulk of a column by at least so many times the width of the bulk
NEWEST = 0.1  # share of the events that `fit` holds out for the test, by time
LEVELS = 10  # a single negative value is no level of a scale where there are at least so many others
UNSCALED = 10.0  # a mean further from 0, or a deviation further from 1 by this factor, wants scaling
ALL_TWICE = 0.45  # share of repeated events that a file read twice explains


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Events that are the same as another in user, item, action and time, the first of each set aside."""

    count: int
    examples: tuple[str, ...] = ()  # where the first ones are


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnProfile:
    """One column: `values` are distinct; shares are of rows; `quantiles` (see `QUANTILES`) are those of floats."""

    file: File
    column: str
    kind: Kind
    values: int | None  # None for floats
    missing: float
    unknown: float  # values that the items or users file, `Columns.actions` or the encoder lacks
    quantiles: dict[str, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    """Events of one user at one moment: a list that was shown, where the events are an impression log.

    Attributes:
      count: how many there are.
      one_action: share of those whose events are of one action, and so of one label.
      actions: share of the events by raw action; {} without a column of actions.
      new_events, new_lists: among the newest tenth of the events, the share of events whose item has no event before it, and
        the share of lists that hold such an item; None with fewer than ten events.
    """

    count: int
    one_action: float
    actions: dict[str, float]
    new_events: float | None
    new_lists: float | None

    def __str__(self) -> str:
        parts = [f"{self.count:,} lists (events of one user at one moment)"]
        if len(self.actions) > 1:
            parts.append(f"{_percent(self.one_action)} of them of one action")
            parts.append("events by action: " + ", ".join(f"{_percent(s)} {name!r}" for name, s in self.actions.items()))
        if self.new_events is not None and self.new_lists is not None:
            new = f"{_percent(self.new_events)} of the events and {_percent(self.new_lists)} of the lists"
            parts.append(f"newest tenth: {new} have an item without an earlier event")
        return "; ".join(parts)


def lists_of(tables: Tables, columns: Columns) -> Lists | None:
    """The lists among events of known users at good times; None without such an event."""
    table, rows = tables.scans["events"], tables.rows["events"]
    good = np.flatnonzero(table.is_good(columns.user, columns.time) & (rows["user"] > 0))
    if not len(good):
        return None
    time, user, item = table.times(columns.time)[good], rows["user"][good], rows["item"][good]
    action = rows["action"][good] if "action" in rows else np.ones(len(good), np.int32)
    order = np.lexsort((time, user))
    starts = np.append(True, (np.diff(user[order]) != 0) | (np.diff(time[order]) != 0))
    firsts = np.flatnonzero(starts)
    least, most = (ends.reduceat(action[order], firsts) for ends in (np.minimum, np.maximum))
    names = list(columns.actions) or np.asarray(getattr(tables.vocabularies.get("action"), "raw", ())).tolist()
    counts = np.bincount(action, minlength=len(names) + 1)
    shares = {str(name): counts[row] / len(good) for row, name in enumerate(names, 1) if counts[row]}
    new_events = new_lists = None
    if (newest := round(NEWEST * len(good))) and (cut := np.sort(time)[-newest]) > time.min():
        late = time >= cut
        new = late & ~np.isin(item, item[~late])
        of_list = np.cumsum(starts) - 1
        held, hold = (np.unique(of_list[part[order]]) for part in (late, new))
        new_events, new_lists = float(new.sum() / late.sum()), len(hold) / len(held)
    one = float((least == most).mean())
    return Lists(count=len(firsts), one_action=one, actions=shares, new_events=new_events, new_lists=new_lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What a data set looks like."""

    events: int  # with a known user and a time
    first: str  # date and time of day (UTC) of the first event, and of the last one
    last: str
    per_user: dict[str, float]  # quantiles of the number of events, of users who have any
    per_item: dict[str, float]
    repeated: float  # share of events that are in an earlier row too
    columns: tuple[ColumnProfile, ...]
    lists: Lists | None = None  # of `check` alone; None without events

    def __str__(self) -> str:
        span = f", {self.first} to {self.last} (UTC)" if self.events else ""
        counts = {"events of a user": self.per_user, "events of an item": self.per_item}
        ranges = {f"{c.file}, {c.column!r}": c.quantiles for c in self.columns if c.quantiles is not None}
        numbers = [["", *QUANTILES]] + [
            [name, *(f"{values[q]:,.6g}" for q in QUANTILES)] for name, values in (counts | ranges).items() if values
        ]
        shares = [["", "values", "missing", "unknown"]] + [
            [f"{c.file}, {c.column!r}", "" if c.values is None else f"{c.values:,}", _percent(c.missing), _percent(c.unknown)]
            for c in self.columns
        ]
        title = f"profile: {self.events:,} events{span}, {_percent(self.repeated)} of them duplicates"
        return "\n".join([title, *_aligned(numbers), *_aligned(shares), *([] if self.lists is None else [f"  {self.lists}"])])


def profile_of(tables: Tables, columns: Columns, *, repeats: Repeats) -> tuple[Profile, list[Suspicion]]:
    """The profile of tables that were read, and what is suspicious in them."""
    table, rows = tables.scans["events"], tables.rows["events"]
    good = table.is_good(columns.user, columns.time) & (rows["user"] > 0)
    at = slice(None) if good.all() else good
    per_second = PER_SECOND[columns.time_unit]
    moments, events = table.times(columns.time)[at], int(np.count_nonzero(good))
    users, items = (_counts(rows[name][at], len(tables.vocabularies[name])) for name in ("user", "item"))
    profile = Profile(
        events=events,
        first=readable(int(moments.min()) // per_second) if events else "",
        last=readable(int(moments.max()) // per_second) if events else "",
        per_user=_quantiles(users[users > 0]),
        per_item=_quantiles(items[items > 0]),
        repeated=repeats.count / events if events else 0.0,
        columns=tuple(_columns(tables, columns)),
    )
    suspicions = [
        *_suspect_repeats(table, repeats, events),
        *_suspect_times(table, columns.time, moments, per_second),
        *_suspect_rounding(table, columns, rows["user"][at], moments),
        *_suspect_share(table, columns.user, users, tables.vocabularies["user"]),
        *_suspect_share(table, columns.item, items, tables.vocabularies["item"]),
    ]
    for (file, column), values in tables.values.items():
        suspicions += _suspect_values(tables.scans[file], column, values, columns)
    for which, scan, name in _floats(tables, columns):
        suspicions += _suspect_floats(scan, name, scaled=columns.scale or name not in columns.floats[which])
    return profile, suspicions


def _columns(tables: Tables, columns: Columns) -> Iterator[ColumnProfile]:
    for (file, column), values in tables.values.items():
        count = max(1, tables.scans[file].count)
        rows = tables.rows[file].get(columns.vocabularies(file)[column])
        strange = 0 if rows is None or rows.ndim > 1 else max(0, int(np.count_nonzero(rows == 0)) - values.missing)
        shares = {"missing": values.missing / count, "unknown": strange / count}
        yield ColumnProfile(file=file, column=column, kind=values.kind, values=values.count, quantiles=None, **shares)
    for which, scan, name in _floats(tables, columns):
        good = scan.is_good(name)
        file, quantiles = FILES[which], _quantiles(scan.floats(name)[good])
        shares = {"missing": 1 - float(good.mean()) if scan.count else 0.0, "unknown": 0.0}
        yield ColumnProfile(file=file, column=name, kind="float", values=None, quantiles=quantiles or None, **shares)


def _floats(tables: Tables, columns: Columns) -> Iterator[tuple[str, Scan, str]]:
    """("item" or "user", table, name) of every float column that is there."""
    names = {"item": (*columns.item_floats, *columns.side), "user": columns.user_floats}
    for which, file in FILES.items():
        if file in tables.scans:
            yield from ((which, tables.scans[file], name) for name in names[which])


def _suspect_repeats(table: Scan, repeats: Repeats, events: int) -> Iterator[Suspicion]:
    if repeats.count:
        twice = "; is a file there twice?" if repeats.count >= ALL_TWICE * events else ""
        such = f", such as {', '.join(repeats.examples)}" if repeats.examples else ""
        got = f"the same user, item, action and time as another row: {repeats.count:,} of {events:,} events{such}{twice}"
        yield Suspicion(kind="repeated event", file=table.label.name, column=None, got=got)


def _suspect_times(table: Scan, column: str, moments: np.ndarray, per_second: int) -> Iterator[Suspicion]:
    """Events later than today, and single ones that are far from all others."""
    if not len(moments):
        return
    now, file = int(time.time()), table.label.name
    future = int(np.count_nonzero(moments > (now + 86_400) * per_second))
    if future:
        last = readable(int(moments.max()) // per_second)
        got = f"later than today, {readable(now)[:10]}: {future:,} of {len(moments):,} events, the last at {last}"
        yield Suspicion(kind="future event", file=file, column=column, got=got)
    sample = moments if len(moments) <= SAMPLE else moments[np.random.default_rng(0).integers(len(moments), size=SAMPLE)]
    if len(sample) < FEW:
        return
    last = len(sample) - 1
    at = [math.ceil(0.001 * last), math.floor(0.999 * last)]  # one event at least is outside
    low, high = (int(value) // per_second for value in np.partition(sample, at)[at])
    reach = max(YEAR, high - low)
    stray = {
        f"after {readable(high)}": (int(np.count_nonzero(moments > (high + reach) * per_second)), moments.max()),
        f"before {readable(low)}": (int(np.count_nonzero(moments < (low - reach) * per_second)), moments.min()),
    }
    for where, (count, most) in stray.items():
        if count and not (future and where.startswith("after")):
            got = f"more than a year {where}: {count:,} of {len(moments):,} events, such as {readable(int(most) // per_second)}"
            yield Suspicion(kind="stray time", file=file, column=column, got=got)


def _suspect_rounding(table: Scan, columns: Columns, users: np.ndarray, moments: np.ndarray) -> Iterator[Suspicion]:
    """Events of one user whose order is in the file and is lost, because `Columns.time_unit` is coarser."""
    if columns.time not in table.rounded:
        return
    order = np.lexsort((moments, users))
    same = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in (users, moments)])
    if count := int(np.count_nonzero(same)):
        got = (
            f"finer than Columns.time_unit={columns.time_unit!r}, to which times are rounded down: {count:,} of {len(users):,}"
            " events then share the time of another of their user and are ordered by item; a finer time_unit keeps their order"
        )
        yield Suspicion(kind="rounded time", file=table.label.name, column=columns.time, got=got)


def _suspect_share(table: Scan, column: str, counts: np.ndarray, vocabulary: Any) -> Iterator[Suspicion]:
    """A user or an item with a large share of all events."""
    total, active = int(counts.sum()), int(np.count_nonzero(counts))
    if active < 2:
        return
    row = int(np.argmax(counts))
    share, times = counts[row] / total, counts[row] * (active - 1) / (total - counts[row])
    if share > MOST[0] and times > MOST[1]:
        many = f"has {int(counts[row]):,} of {total:,} events ({_percent(share)})"
        got = f"{vocabulary.decode(row)!r} {many}; is it a placeholder or a robot?"
        yield Suspicion(kind="one for many", file=table.label.name, column=column, got=got)


def _suspect_values(table: Scan, column: str, values: Values, columns: Columns) -> Iterator[Suspicion]:
    file, present = table.label.name, table.count - values.missing
    if values.alike:
        pairs = ", ".join(f"{one!r} and {other!r}" for one, other in values.alike)
        got = f"{values.alikes:,} of {values.count:,} values differ from another by blanks or upper case alone: {pairs}"
        yield Suspicion(kind="alike values", file=file, column=column, got=got)
    if values.separator is not None:
        separator, count, example = values.separator
        got = f"no row has two values, and {count:,} of {values.count:,} values hold {separator!r}, such as {example!r}"
        got = f"{got}; Columns.bag_separator is {columns.bag_separator!r}"
        yield Suspicion(kind="bag separator", file=file, column=column, got=got)
    if values.cut:
        kept = f"the first {columns.bag_length}, which Columns.bag_length keeps"
        got = f"{values.cut:,} of {present:,} rows have more values than {kept}"
        yield Suspicion(kind="cut bag", file=file, column=column, got=got)
    share, least = UNIQUE
    if values.kind in ("category", "value") and present >= least and values.count >= share * present:
        got = f"{values.count:,} values in {present:,} rows; an attribute that differs in each row adds nothing to the id"
        yield Suspicion(kind="unique values", file=file, column=column, got=got)


def _suspect_floats(table: Scan, name: str, *, scaled: bool) -> Iterator[Suspicion]:
    good, file = table.is_good(name), table.label.name
    values = table.floats(name)[good]
    if not len(values):
        return
    low, high = bulk_of(values)
    width = high - low or max(1.0, abs(low))
    for outside, end, most in ((values - np.float64(high), high, values.max()), (np.float64(low) - values, low, values.min())):
        wrong = outside > FAR * width
        if wrong.any():
            row = int(np.flatnonzero(good)[np.argmax(wrong)])
            side = "above" if most > end else "below"
            got = f"far {side} {end:.6g}: {int(wrong.sum()):,} of {len(values):,} values, such as {most:.6g}"
            yield Suspicion(kind="outlier", file=file, column=name, got=f"{got}; the first is in {table.place(row)}")
    negative = values < 0
    count = int(np.count_nonzero(negative))
    if 0 < count < len(values) / 2 and (value := values[negative]).min() == value.max():
        row = int(np.flatnonzero(good)[np.argmax(negative)])
        if len(np.unique(values[~negative][:SAMPLE])) >= LEVELS:
            got = f"{value[0]:g} is the only negative value, in {count:,} of {len(values):,} rows"
            got = f"{got}, the first in {table.place(row)}; does it mean that there is none?"
            yield Suspicion(kind="placeholder", file=file, column=name, got=got)
    mean, deviation = float(np.mean(values, dtype=np.float64)), float(np.std(values, dtype=np.float64))
    if not scaled and (abs(mean) > UNSCALED or deviation > UNSCALED or 0 < deviation < 1 / UNSCALED):
        got = f"mean {mean:.3g}, deviation {deviation:.3g}; numbers of about -1..1 suit a network where Columns.scale is off"
        yield Suspicion(kind="unscaled floats", file=file, column=name, got=got)


def _counts(rows: np.ndarray, size: int) -> np.ndarray:
    """int64 [size]: how often each row but 0 comes; block by block, since NumPy makes int64 of what it counts."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(rows), BLOCK):
        counts += np.bincount(rows[start : start + BLOCK], minlength=size)
    counts[0] = 0
    return counts


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """{} of no values."""
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="closest_observation")
    return {name: float(value) for name, value in zip(QUANTILES, found, strict=True)}


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _aligned(rows: list[list[str]]) -> list[str]:
    """A table as lines: the first column to the left, the others to the right; nothing for a table without a body."""
    width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([name.ljust(width), *map(str.rjust, cells, widths)]) for name, *cells in rows]
    return [f"  {line.rstrip()}" for line in lines] if len(rows) > 1 else []


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
    | rounded time | events of one user that only parts of `Columns.time_unit` tell apart, and whose order is lost |
    | stray time | a few events that are more than a year, and more than the span of all others, from the others |
    | one for many | a user or an item with more than a tenth of all events, and ten times as many as the others |
    | alike values | values that differ by blanks around them or, but for ids, by upper case: "Sport" and "Sport " |
    | bag separator | values of bags that hold another separator than `Columns.bag_separator`, and never that one |
    | cut bag | bags with more values than `Columns.bag_length` keeps |
    | unique values | an attribute with another value in each row, such as the item id as category |
    | outlier | a float far outside of all others, such as a price of 1e12; scales are learned without it |
    | placeholder | a single negative value such as -1 among others from 0 |
    | unscaled floats | a column far from mean 0 and deviation 1 although `Columns.scale` is off |

    The report ends with a *profile*: the time span, the events of a user and of an item, ranges of floats, for each
    categorical column the number of distinct values and the shares of missing and unknown ones, and `Lists`: how many lists
    have one label, how often each action comes, how many items of the newest events are new.

    Args:
      events: Parquet, CSV or TSV, file or folder; a table in memory.
      items, users: the same; None leaves out what only they can tell.
      columns: which column is what; default: the encoder's, or `Columns()`.
      encoder: encoder of a trained model; values that its vocabularies lack are problems.
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
      profile: 2 events, 2020-09-13 12:26:40 to 2020-09-13 12:27:40 (UTC), 0 % of them duplicates
                           min  1 %  25 %  median  75 %  99 %  max
        events of a user     1    1     1       1     1     1    1
        events of an item    2    2     2       2     2     2    2
                        values  missing  unknown
        events, 'user'       2      0 %      0 %
        events, 'item'       2      0 %      0 %
        2 lists (events of one user at one moment)
      2 problems, 0 suspicions (events: 3 rows, events sorted by user and time)
    """
    expect(order in ORDERS, "order", f"one of {', '.join(ORDERS)}", repr(order))
    problems = Problems(cap)
    columns = columns or (encoder.columns if encoder is not None else Columns())
    tables = read_tables({"events": events, "items": items, "users": users}, columns, problems, encoder=encoder)
    checked, unsorted = _note_order(tables, columns, problems, order=order)
    profile, suspicions = profile_of(tables, columns, repeats=_repeats(tables, columns))
    profile = dataclasses.replace(profile, lists=lists_of(tables, columns))
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
    user, time = users[at], table.times(columns.time)[at]
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
    parts = [rows["user"], rows["item"], rows.get("action"), table.times(columns.time)]
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
