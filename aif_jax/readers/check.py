"""Lists all problems of your files with row numbers, suspicious values, and a profile.

`aif-jax check --events events.parquet --items items.parquet` is the same from a shell.
"""

import dataclasses

import numpy as np

from aif_jax.encoding.columns import Columns, TableName
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.times import PER_SECOND, readable
from aif_jax.readers.read import FLOATS, Events, Tables, events_of, read_tables, suspicions_of
from aif_jax.readers.tables import CAP, Problem, Problems, Source, Suspicion

QUANTILES = {"min": 0.0, "1 %": 0.01, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "99 %": 0.99, "max": 1.0}


@dataclasses.dataclass(frozen=True)
class ColumnProfile:
    """One column: how many distinct `values`, shares of rows, and `quantiles` (see `QUANTILES`) of floats."""

    file: TableName
    column: str
    values: int | None  # None for floats
    missing: float
    unknown: float  # values that the items or users file, `Columns.actions` or the encoder lacks
    quantiles: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Counts, time span and columns of a data set."""

    events: int  # with a known user and a time
    first: str  # date and time of day (UTC) of the first event, and of the last one
    last: str
    per_user: dict[str, float]  # quantiles of the number of events of users who have any
    per_item: dict[str, float]
    duplicates: float  # share of events that an earlier row has already
    columns: tuple[ColumnProfile, ...]
    actions: dict[str, float]  # share of the events by raw action; {} without a column of actions

    def __str__(self) -> str:
        span = f", {self.first} to {self.last} (UTC)" if self.events else ""
        counts = {"events of a user": self.per_user, "events of an item": self.per_item}
        ranges = counts | {f"{c.file}, {c.column!r}": c.quantiles for c in self.columns if c.quantiles}
        numbers = [[name, *(f"{values[q]:,.6g}" for q in QUANTILES)] for name, values in ranges.items() if values]
        shares = [
            [f"{c.file}, {c.column!r}", "" if c.values is None else f"{c.values:,}", _percent(c.missing), _percent(c.unknown)]
            for c in self.columns
        ]
        title = f"profile: {self.events:,} events{span}, {_percent(self.duplicates)} of them duplicates"
        tables = [*_aligned([["", *QUANTILES], *numbers]), *_aligned([["", "values", "missing", "unknown"], *shares])]
        actions = ", ".join(f"{_percent(share)} {name!r}" for name, share in self.actions.items())
        return "\n".join([title, *tables, *([f"  events by action: {actions}"] if len(self.actions) > 1 else [])])


def _profile(tables: Tables, columns: Columns, events: Events) -> Profile:
    count, seconds = len(events.user), events.time // PER_SECOND[columns.time_unit]
    shares = []
    for (file, column), distinct in tables.distinct.items():
        rows, total = tables.rows[file].get(columns.vocabularies(file)[column]), max(1, tables.tables[file].count)
        strange = 0 if rows is None or rows.ndim > 1 else max(0, int(np.count_nonzero(rows == 0)) - distinct.missing)
        shares.append(ColumnProfile(file, column, distinct.values, distinct.missing / total, strange / total))
    for which, name, table in tables.float_columns(columns):
        floats = table.array(name)
        good = ~np.isnan(floats)
        missing = 1 - float(good.mean()) if table.count else 0.0
        shares.append(ColumnProfile(FLOATS[which], name, None, missing, 0.0, _quantiles(floats[good]) or None))
    names = list(columns.actions) or np.asarray(getattr(tables.vocabularies.get("action"), "raw", ())).tolist()
    counts = np.bincount(events.action, minlength=len(names) + 1)
    return Profile(
        events=count,
        first=readable(int(seconds.min())) if count else "",
        last=readable(int(seconds.max())) if count else "",
        per_user=_quantiles(np.unique(events.user, return_counts=True)[1]),
        per_item=_quantiles(np.unique(events.item[events.item > 0], return_counts=True)[1]),
        duplicates=int(np.count_nonzero(events.duplicate)) / max(1, count),
        columns=tuple(shares),
        actions={str(name): counts[row] / count for row, name in enumerate(names, 1) if counts[row]},
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """Return {} of no values."""
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="closest_observation")
    return {name: float(value) for name, value in zip(QUANTILES, found, strict=True)}


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return a table as lines: the first column to the left, the others to the right; nothing for a table without a body."""
    width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([name.ljust(width), *map(str.rjust, cells, widths)]) for name, *cells in rows]
    return [f"  {line.rstrip()}" for line in lines] if len(rows) > 1 else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of `check`."""

    problems: list[Problem]  # kind by kind; at most `cap` of each kind
    totals: dict[str, int]  # how many there are of each kind, listed or not
    suspicions: list[Suspicion]  # what `read` accepts and is seldom meant
    profile: Profile
    rows: dict[str, int]  # file to rows of data

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
        rows = ", ".join(f"{file}: {count} rows" for file, count in self.rows.items())
        counts = {"problem": sum(self.totals.values()), "suspicion": len(self.suspicions)}
        summary = ", ".join(f"{number:,} {noun}{'' if number == 1 else 's'}" for noun, number in counts.items())
        return "\n".join([*lines, str(self.profile), f"{summary} ({rows})"])


def check(
    events: Source,
    *,
    items: Source | None = None,
    users: Source | None = None,
    columns: Columns | None = None,
    encoder: Encoder | None = None,
    cap: int = CAP,
) -> Report:
    """Check every value of every row and list all that is wrong; nothing is raised for a wrong file.

    A *problem* is what `read` refuses:

    | problem | means |
    |---|---|
    | missing column, wrong type, wrong number of fields, wrong length | not the table that `columns` describes |
    | no rows, unreadable file | not a table, or an incomplete one |
    | null, not finite, negative id | a value that must be there, be finite, be 0 or more |
    | unknown item, user, action, category | a value that the items or users file, `Columns.actions` or the encoder lacks |
    | duplicate item, duplicate user | the same id twice |
    | time unit | a time that is implausible in the unit stated, such as milliseconds read as seconds |

    A *suspicion* is what `read` takes and logs as a warning:

    | suspicion | means |
    |---|---|
    | duplicate event | the same user, item, action and time in several rows; half of all where a file is there twice |
    | future event | an event later than today |
    | rounded time | events of one user that only parts of `Columns.time_unit` tell apart, and whose order is lost |
    | cut bag | bags with more values than `Columns.bag_length` keeps |
    | outlier | a float far outside of all others, such as a price of 1e12; scales are learned without it |

    A *profile* follows: time span, events of a user, of an item and of each action, ranges of floats, distinct, missing and
    unknown values.

    Args:
      events: Parquet, CSV or TSV, file or folder; a table in memory.
      items, users: likewise; None skips the checks that need them.
      columns: which column is what; default: the encoder's, or `Columns()`.
      encoder: encoder of a trained model; values that its vocabularies lack are problems.
      cap: problems of one kind that are listed; the rest is counted.

    Raises ImportError without pyarrow, FileNotFoundError, ValueError for wrong options or a file name of another kind.

    Example:
      >>> table = {"user": [1, 1, 2], "item": [7, -8, 7], "time": [1_600_000_000, None, 1_600_000_060]}
      >>> print(check(table).problems[1])
      events, row 2, column 'item': negative id: expected 0 or more, got -8
    """
    problems, columns = Problems(cap), columns or (encoder.columns if encoder is not None else Columns())
    tables = read_tables({"events": events, "items": items, "users": users}, columns, problems, encoder=encoder)
    ordered = events_of(tables, columns)
    counts = [tables.tables[name].counts() for name in ("items", "users", "events") if name in tables.tables]
    return Report(
        problems=problems.listed(),
        totals=dict(problems.totals),
        suspicions=list(suspicions_of(tables, columns, ordered)),
        profile=_profile(tables, columns, ordered),
        rows={file: count for table in counts for file, count in table.items()},
    )
