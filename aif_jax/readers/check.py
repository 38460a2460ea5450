"""Lists all problems of your files with row numbers, suspicious values, and a profile.

`aif-jax check --events events.parquet --items items.parquet` is the same from a shell.
"""

import dataclasses

from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.readers.read import events_of, expect_options, read_tables, suspicions_of
from aif_jax.readers.tables import CAP, Problem, Problems, Source, Suspicion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of `check`."""

    problems: list[Problem]  # kind by kind; at most `cap` of each kind
    totals: dict[str, int]  # how many there are of each kind, listed or not
    suspicions: list[Suspicion]  # what `read` accepts and is seldom meant
    profile: str  # events and users, time span, events of a user
    rows: dict[str, int]  # file to the rows of it that could be parsed, if there are any

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
        return "\n".join([*lines, f"profile: {self.profile}", f"{summary} ({rows})"])


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
    | missing column, missing action, wrong type, wrong number of fields, wrong length | not what `columns` describes |
    | no rows, unreadable file | not a table, or an incomplete one |
    | null, not finite, negative id | a value that must be there (an id of "" is not), be finite before scaling, be 0 or more |
    | position | no whole number from 0 to 2^24 - 1 |
    | unknown item, user, action, category | what the encoder, or else items, users, or `Columns.actions` lack; not in bags |
    | duplicate item, duplicate user | the same id twice |
    | time unit | times that are implausible in their unit: milliseconds read as seconds, dates such as 20240501 |

    A *suspicion* is what `read` takes and logs as a warning:

    | suspicion | means |
    |---|---|
    | duplicate event | the same user, item, action and time in several rows; half of all where a file is there twice |
    | future event | an event more than 24 hours after now |
    | rounded time | times finer than `Columns.time_unit`, and events of one user that are equal in it: an order may be lost |
    | cut bag | bags with more values than `Columns.bag_length` keeps |
    | outlier | a float far outside of all others, such as a price of 1e12; of 20 values or more, scales clip it |

    A *profile* follows: how many events and users, time span, events of a user.

    Args:
      events: Parquet, CSV or TSV, file or folder; a table in memory.
      items, users: likewise; None skips the checks that need them.
      columns: which column is what; default: the encoder's, or `Columns()`.
      encoder: encoder of a trained model; values that its vocabularies lack are problems, but in bags; files may lack its ids.
      cap: problems of one kind that are listed; the rest is counted.

    Raises ImportError without pyarrow, FileNotFoundError, ValueError for wrong options or a file name of another kind.

    Example:
      >>> table = {"user": [1, 1, 2], "item": [7, -8, 7], "time": [1_600_000_000, None, 1_600_000_060]}
      >>> print(check(table).problems[1])
      events, row 2, column 'item': negative id: expected 0 or more, got -8
    """
    expect_options(columns, encoder)
    problems, columns = Problems(cap), columns or (encoder.columns if encoder is not None else Columns())
    tables = read_tables({"events": events, "items": items, "users": users}, columns, problems, encoder=encoder)
    ordered = events_of(tables, columns)
    counts = [tables.tables[name].counts() for name in ("items", "users", "events") if name in tables.tables]
    return Report(
        problems=problems.listed(),
        totals=dict(problems.totals),
        suspicions=list(suspicions_of(tables, columns, ordered)),
        profile=str(ordered.log),
        rows={file: count for table in counts for file, count in table.items()},
    )
