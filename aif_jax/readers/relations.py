"""What no single value tells: ids that repeat, events out of order, events that repeat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

from aif_jax.columns import Columns, File
from aif_jax.readers.problems import Problems
from aif_jax.readers.settle import Tables

Order: TypeAlias = Literal["auto", "user", "time", "none"]


def note_repeated_ids(tables: Tables, columns: Columns, problems: Problems) -> None:
    """Notes items and users that are in an earlier row of their table too."""
    keys: list[tuple[File, str, str]] = [("items", "item", columns.item_id), ("users", "user", columns.user_record_id)]
    for name, which, column in keys:
        if name not in tables.scans:
            continue
        table, ids, vocabulary = tables.scans[name], tables.rows[name][which], tables.vocabularies[which]
        first = np.zeros(len(vocabulary), np.int64)
        first[ids[::-1]] = np.arange(len(ids))[::-1]  # the first row of each id is written last
        again = (ids > 0) & (first[ids] != np.arange(len(ids)))

        def got(at: np.ndarray, table=table, ids=ids, known=vocabulary, first=first) -> Iterator[str]:
            return (f"{known.decode(i)!r}, which is in {table.place(int(first[i]))} too" for i in ids[at])

        table.note(problems, f"duplicate {which}", again, column, "every id once", got)


def note_order(tables: Tables, columns: Columns, problems: Problems, *, order: Order) -> Order:
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


def note_repeated_events(tables: Tables, columns: Columns, problems: Problems) -> None:
    """Notes events that are the same in user, item, action and time."""
    table, rows = tables.scans["events"], tables.rows["events"]
    at = np.flatnonzero(table.is_good(*table.kinds) & (rows["user"] > 0) & (rows["item"] > 0))
    parts = [rows["user"], rows["item"], rows.get("action"), table.seconds(columns.time), table.nanoseconds(columns.time)]
    keys = [part[at] for part in parts if part is not None]
    order = np.lexsort(keys[::-1])  # stable: the first of equals comes first
    same = np.logical_and.reduce([np.append(False, key[order][1:] == key[order][:-1]) for key in keys])[: len(at)]
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    first = np.full(table.count, -1)
    first[at[order[same]]] = at[order[heads[same]]]

    def got(wrong: np.ndarray) -> Iterator[str]:
        return (f"the user, item, action and time of {table.place(int(first[i]))}" for i in wrong)

    table.note(problems, "duplicate event", first >= 0, None, "every event once", got)
