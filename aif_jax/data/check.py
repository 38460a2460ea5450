"""Lists every problem of one's own files, with row numbers. Source: ours.

python -m aif_jax.data check --events events.parquet --items items.parquet
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from aif_jax.data.columns import Columns
from aif_jax.data.problems import CAP, Problem, Problems, place
from aif_jax.data.schema import Vocabulary
from aif_jax.data.survey import PathLike, encode, encode_actions, integers, same_kind, survey_all
from aif_jax.data.tables import Block, Coded, blocks

Order: TypeAlias = Literal["auto", "user", "time", "none"]
ORDERS = ("auto", "user", "time", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found.

    Attributes:
      problems: by file and row; at most `cap` of each kind.
      totals: how many there are of each kind, listed or not.
      rows: file to rows of data.
      order: what the events were checked to be sorted by: "user" (and time), "time" or "none".
    """

    problems: list[Problem]
    totals: dict[str, int]
    rows: dict[str, int]
    order: str

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
    events: PathLike,
    *,
    items: PathLike | None = None,
    users: PathLike | None = None,
    columns: Columns,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    order: Order = "auto",
    cap: int = CAP,
) -> Report:
    """Looks at every value of every row and lists all that is wrong; nothing is raised for a wrong file.

    | kind | means |
    |---|---|
    | missing column, wrong type, wrong number of fields, wrong length, no rows, unreadable file | not the table that is said |
    | null, not finite, negative id | a value that must be there, be finite, be 0 or more |
    | unknown item, unknown user | an event's id that the items or users file (or a vocabulary given) lacks |
    | unknown action, unknown category | none of `Columns.actions`; a value that a vocabulary given lacks |
    | duplicate item, duplicate user, duplicate event | the same id twice; the same user, item, action and time twice |
    | unsorted time | a file that looks sorted, or is said to be, has an earlier time after a later one |
    | history across users | the same of users: a user's events go on after those of another |
    | time unit | a time that is implausible in the unit stated, such as milliseconds read as seconds |

    Args:
      events: Parquet, CSV or TSV, file or folder.
      items, users: the same; what they would tell is not looked at where they are None.
      columns: which column is what.
      vocabularies: of a trained model; values that they lack are problems.
      order: what the events claim to be sorted by: "user" (users together, times ascending in each), "time", "none"; "auto"
        looks. Reading needs no order: this is for files that claim one, and finds rows appended or shuffled by mistake.
      cap: problems of one kind that are listed; the rest is counted.

    Returns:
      Report.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: a file is not there.
      ValueError: wrong options, or a file name that does not say what it is.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "events.csv"
      >>> _ = path.write_text("user,item,time\\n1,7,20\\n1,-8,\\n")
      >>> print(str(check(path, columns=Columns())).replace(str(path), "events.csv"))
      events.csv, line 3, column 'time': null: expected a time, got nothing
      events.csv, line 3, column 'item': negative id: expected 0 or more, got -8
      2 problems (events.csv: 2 rows, events checked as in no order)
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    problems = Problems(cap)
    known = survey_all(events, items, users, columns, vocabularies, problems)
    rows, found = relations(events, items, users, columns, known, problems, order=order, duplicates=True)
    return Report(problems=problems.listed(), totals=problems.totals, rows=rows, order=found)


def relations(
    events: PathLike,
    items: PathLike | None,
    users: PathLike | None,
    columns: Columns,
    known: Mapping[str, Vocabulary],
    problems: Problems,
    *,
    order: Order,
    duplicates: bool,
) -> tuple[dict[str, int], str]:
    """Reads every file once more for what no single value tells: unknown and repeated ids, order, repeated events.

    Returns:
      Rows by file, and the order that was checked.
    """
    counts: dict[str, int] = {}
    for path, kinds, key in (
        (items, columns.of_items(), columns.item_id),
        (users, columns.of_users(), columns.user_key or columns.user),
    ):
        if path is not None:
            which = "item" if path is items else "user"
            once = _Once(key, f"duplicate {which}", problems)
            for block in _blocks(path, kinds, columns, counts):
                for name in block.columns:
                    _note_unknown(block, name, columns, known, problems)
                if key in block.columns:
                    once.add(block, encode(block.columns[key], known[which]))
    sequence = _Order(problems, columns, users=len(known["user"]))
    repeated = _Repeated(problems)
    for block in _blocks(events, columns.of_events(), columns, counts):
        for name in block.columns:
            _note_unknown(block, name, columns, known, problems)
        if not {columns.user, columns.item, columns.time} <= block.columns.keys():
            continue
        user = encode(block.columns[columns.user], known["user"])
        if order != "none":
            sequence.add(block, user)
        if duplicates:
            action = np.zeros(len(user), np.int32)
            if columns.action in block.columns:
                action = encode_actions(block.columns[columns.action], columns, known)
            item = encode(block.columns[columns.item], known["item"])
            repeated.add(block, user, item, action, block.columns[columns.time])
    repeated.note()
    return counts, sequence.conclude(order)


def _blocks(path: PathLike, kinds: Mapping[str, Any], columns: Columns, counts: dict[str, int]) -> Iterator[Block]:
    """The blocks of a file whose values were looked at before; counts rows."""
    for block in blocks(path, kinds, Problems(), reading=columns.reading):
        counts[str(block.file)] = counts.get(str(block.file), 0) + len(block.rows)
        yield block


def _note_unknown(block: Block, name: str, columns: Columns, known: Mapping[str, Vocabulary], problems: Problems) -> None:
    coded = block.columns[name]
    if not isinstance(coded, Coded) or coded.codes.ndim > 1:
        return
    vocabulary = columns.vocabulary_of(name)
    if vocabulary in known and not same_kind(coded.values, known[vocabulary].raw):
        wrong = block.good[name] & (integers(coded.values) < 0)[coded.codes]
        if not (integers(coded.values) < 0).all():  # else the whole column is of a wrong type, noted before
            got = map(repr, coded.values[coded.codes[wrong]].tolist())
            problems.add("wrong type", block.file, block.rows[wrong], name, "a whole number, like the others", got)
        return
    if vocabulary == "action":
        rows, kind = encode_actions(coded, columns, known), "unknown action"
        expected = f"one of {', '.join(map(repr, columns.actions))}" if columns.actions else "an action of the vocabulary"
    else:
        rows, kind = (
            encode(coded, known[vocabulary]),
            f"unknown {vocabulary}" if vocabulary in ("user", "item") else "unknown category",
        )
        expected = f"one of the {len(known[vocabulary]) - 1} known"
    strange = block.good[name] & (coded.codes >= 0) & (rows == 0)
    got = (repr(value) for value in coded.values[coded.codes[strange]].tolist())
    problems.add(kind, block.file, block.rows[strange], name, expected, got)


class _Once:
    """Notes ids that stood in an earlier row."""

    def __init__(self, column: str, kind: str, problems: Problems):
        self.column, self.kind, self.problems = column, kind, problems
        self.first = np.zeros(0, np.int64)  # by row of the vocabulary: where it stood first, 0 nowhere

    def add(self, block: Block, ids: np.ndarray) -> None:
        largest = int(ids.max(initial=0))
        if largest >= len(self.first):
            self.first = np.append(self.first, np.zeros(largest + 1 - len(self.first), np.int64))
        here, at = np.unique(ids, return_index=True)
        new = self.first[here] == 0
        self.first[here[new]] = block.rows[at[new]]
        again = (ids > 0) & (self.first[ids] != block.rows)
        raw = block.columns[self.column]
        got = (
            f"{raw.values[code].item()!r}, which stands in {place(block.file, row)} too"
            for code, row in zip(raw.codes[again], self.first[ids[again]], strict=True)
        )
        self.problems.add(self.kind, block.file, block.rows[again], self.column, "every id once", got)


class _Order:
    """Notes rows that break the order by user and time, and those that break the order by time; one of them is kept."""

    def __init__(self, problems: Problems, columns: Columns, *, users: int):
        self.problems, self.columns = problems, columns
        self.by_user, self.by_time = Problems(problems.cap), Problems(problems.cap)
        self.ended = np.zeros(users, bool)  # users whose events were followed by another user's
        self.last: tuple[int, int] | None = None
        self.rows = 0

    def add(self, block: Block, user: np.ndarray) -> None:
        columns = self.columns
        good = block.good[columns.user] & block.good[columns.time] & (user > 0)
        user, time, rows = user[good], block.columns[columns.time][good], block.rows[good]
        if not len(user):
            return
        before = self.last or (int(user[0]), int(time[0]))
        previous_user, previous_time = np.append(before[0], user[:-1]), np.append(before[1], time[:-1])
        self.last = int(user[-1]), int(time[-1])
        starts, falls = user != previous_user, time < previous_time
        self.rows += len(user)

        def note(problems: Problems, wrong: np.ndarray, expected: str) -> None:
            got = (f"{now} after {then}" for now, then in zip(time[wrong], previous_time[wrong], strict=True))
            problems.add("unsorted time", block.file, rows[wrong], columns.time, expected, got)

        note(self.by_user, falls & ~starts, "times that ascend within a user")
        note(self.by_time, falls, "times that ascend")
        again = np.zeros(len(user), bool)
        for i in np.flatnonzero(starts):
            self.ended[previous_user[i]] = True
            again[i] = self.ended[user[i]]
        raw = block.columns[columns.user]
        names = raw.values[raw.codes[good][again]].tolist()
        got = (f"user {name!r} again, after events of other users" for name in names)
        self.by_user.add("history across users", block.file, rows[again], columns.user, "all events of a user together", got)

    def conclude(self, order: Order) -> str:
        """Keeps the problems of the order claimed; "auto" takes the one that most rows follow, or none."""
        by_user, by_time = (sum(found.totals.values()) for found in (self.by_user, self.by_time))
        found = order
        if order == "auto":
            found = "user" if by_user <= by_time else "time"
            if 4 * min(by_user, by_time) > self.rows or self.rows < 2:  # among shuffled rows every second one falls back
                found = "none"
        kept = {"user": self.by_user, "time": self.by_time}.get(found)
        if kept is not None:
            self.problems.merge(kept)
        return found


class _Repeated:
    """Notes events that are the same in user, item, action and time; holds 28 bytes an event."""

    def __init__(self, problems: Problems):
        self.problems = problems
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.blocks: list[tuple[Any, np.ndarray]] = []

    def add(self, block: Block, user: np.ndarray, item: np.ndarray, action: np.ndarray, time: np.ndarray) -> None:
        good = np.logical_and.reduce(list(block.good.values())) & (user > 0)
        self.parts.append((user[good], item[good], action[good], time[good]))
        self.blocks.append((block.file, block.rows[good]))

    def note(self) -> None:
        """Adds the problems, in the order of the rows."""
        if not self.parts:
            return
        user, item, action, time = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        rows = np.concatenate([rows for _, rows in self.blocks])
        order = np.lexsort((time, action, item, user))  # stable: the first of equals stands first
        columns = [column[order] for column in (user, item, action, time)]
        same = (
            np.append(False, np.logical_and.reduce([column[1:] == column[:-1] for column in columns])) if len(order) else order
        )
        heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(order)))) if len(order) else order
        first = np.full(len(order), -1)
        first[order[same]] = order[heads[same]]
        start = 0
        for file, of_block in self.blocks:
            here = first[start : start + len(of_block)]
            again = here >= 0
            got = (f"the user, item, action and time of {place(file, row)}" for row in rows[here[again]])
            self.problems.add("duplicate event", file, of_block[again], None, "every event once", got)
            start += len(of_block)
