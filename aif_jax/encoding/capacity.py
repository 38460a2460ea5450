"""Ids that come and go in a vocabulary of fixed size: who has a row, by exact counts and the time of the last event.

The embedding table of such a vocabulary keeps its shape, and so do compiled programs and optimizer states. An id keeps its row
for as long as it stays; no two ids ever share one. The counts are exact: 16 bytes and the id itself for each id that was seen
since `evict_after`, those without a row among them.

Everything here is a pure function of counts and times: the same events give the same rows, whatever the order of the files.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from aif_jax.checks import expect, expect_types
from aif_jax.encoding.vocabulary import IdCounts, Kind, Vocabulary, as_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """The rule by which ids of one vocabulary get a row and lose it.

    Attributes:
      rows: ids that have a row at most; the table has one row more, the unknown row 0. It cannot change later.
      admit_after: events after which an id gets a row; before, it is encoded as 0, unknown.
      evict_after: seconds without an event after which an id loses its row and its count; None never.
      when_full: "evict": of all ids that could have a row those that were seen last have one, so a new id takes the row of the
        one that was seen the longest ago; that one keeps its count and may come back. "refuse": ids with a row keep it, and
        of the others those that were seen last get the rows that are free.
    """

    rows: int
    admit_after: int = 1
    evict_after: int | None = None
    when_full: Literal["evict", "refuse"] = "evict"

    def __post_init__(self):
        expect_types(self)
        expect(1 <= self.rows < 2**31, "Capacity.rows", "1 to 2^31 - 1", self.rows)
        expect(self.admit_after >= 1, "Capacity.admit_after", "at least 1", self.admit_after)
        expect((self.evict_after or 0) >= 0, "Capacity.evict_after", "0 seconds or more, or None", self.evict_after)
        expect(self.when_full in ("evict", "refuse"), "Capacity.when_full", "'evict' or 'refuse'", repr(self.when_full))


class Turnover(NamedTuple):
    """How many ids of a vocabulary came and went."""

    held: int  # ids with a row now
    admitted: int  # of them new
    evicted: int  # lost their row, because they were not seen for too long or others were seen later
    forgotten: int  # lost their count too, with a row before or without
    waiting: int  # ids without a row that have too few events yet
    refused: int  # ids without a row that have enough
    free: int  # rows without an id


def add_counts(counts: IdCounts | None, raw: Any, last: Any, count: Any = None) -> IdCounts:
    """Counts with more events added.

    Args:
      counts: so far; None for none.
      raw: ids [n], repeated or not, of the kind of those before.
      last: integers [n], the time of each event in seconds since 1970, or of the last of several.
      count: integers [n], events of each; None for one each.

    Raises:
      TypeError, ValueError: ids of another kind, arrays of other lengths.

    Example:
      >>> counts = add_counts(None, [7, 9, 7], [10, 20, 30])
      >>> counts.ids.raw.tolist(), counts.count.tolist(), counts.last.tolist()
      ([7, 9], [2, 1], [30, 20])
    """
    kind: Kind | None = None if counts is None else counts.ids.kind
    ids = as_ids(raw, "add_counts", like=kind, short=False)
    last = np.asarray(last, np.int64)
    count = np.ones(len(ids), np.int64) if count is None else np.asarray(count, np.int64)
    same = last.shape == count.shape == (len(ids),)
    expect(same, "add_counts", f"a time and a count for each of {len(ids)} ids", [last.shape, count.shape])
    if counts is not None and len(known := counts.ids.raw):
        ids = [*known.tolist(), *ids] if known.dtype.kind == "T" else np.append(known, ids)
        count, last = np.append(counts.count, count), np.append(counts.last, last)
    new = Vocabulary(ids)
    place, counted = new.encode(ids) - 1, np.zeros(len(new.raw), np.int64)
    seen = np.full(len(new.raw), np.iinfo(np.int64).min)
    np.add.at(counted, place, count)
    np.maximum.at(seen, place, last)
    return IdCounts(new, counted, seen)


def assign(vocabulary: Vocabulary, counts: IdCounts, capacity: Capacity, *, now: int) -> tuple[Vocabulary, Turnover]:
    """The vocabulary after ids came and went.

    Args:
      vocabulary: before. An id with a row that `counts` lacks, as of a vocabulary that was made without a capacity, counts as
        seen a second before all others. One without a fixed size gets the capacity's, and its ids keep their rows.
      counts: counts of all events so far.
      now: second from which the time since an id was last seen is taken, such as the last event's.

    Returns:
      The vocabulary, of size `capacity.rows` + 1, with the counts that go on; and what changed.

    Raises:
      ValueError: a vocabulary of another fixed size, or of more ids than the capacity has rows; ids of two kinds.

    Example:
      >>> rule = Capacity(rows=2, admit_after=2)
      >>> first, _ = assign(Vocabulary([]), add_counts(None, [5, 5, 7, 7, 9], [1, 2, 3, 4, 5]), rule, now=5)
      >>> first.encode([5, 7, 9]).tolist()
      [2, 1, 0]
      >>> second, turnover = assign(first, add_counts(first.counts, [9], [6]), rule, now=6)
      >>> second.encode([5, 7, 9]).tolist(), turnover.evicted
      ([0, 1, 2], 1)
    """
    size = capacity.rows + 1
    fits = len(vocabulary) == size if vocabulary.fixed else len(vocabulary) <= size
    way_out = "the capacity is fixed ahead, because the rows of a trained table do not move"
    expect(fits, "Capacity.rows", f"those of the vocabulary, {len(vocabulary) - 1}", f"{capacity.rows}; {way_out}")
    if len(vocabulary.raw):
        start = int(counts.last.min(initial=now)) - 1
        none = np.zeros(len(vocabulary.raw), np.int64)
        counts = add_counts(counts, vocabulary.raw, none + start, none)
    stale = np.zeros(len(counts.last), bool) if capacity.evict_after is None else now - counts.last > capacity.evict_after
    row_before = vocabulary.encode(counts.ids.raw)
    has_row = row_before > 0
    enough = ~stale & (has_row | (counts.count >= capacity.admit_after))
    latest, place = -counts.last, np.arange(len(stale))
    last = (~has_row, latest) if capacity.when_full == "evict" else (latest, ~has_row)
    order = np.lexsort((place, -counts.count, *last))
    order = order[enough[order]]
    held = order[: capacity.rows]
    rows = row_before[held]
    new = rows == 0
    free = np.setdiff1d(np.arange(1, size, dtype=np.int32), rows[~new])
    rows[new] = free[: np.count_nonzero(new)]
    kept = np.flatnonzero(~stale)
    remaining = IdCounts(Vocabulary(_taken(counts.ids.raw, kept)), counts.count[kept], counts.last[kept])
    made = Vocabulary(_taken(counts.ids.raw, held), rows=rows, size=size, counts=remaining)
    admitted = int(np.count_nonzero(new))
    turnover = Turnover(
        held=len(held),
        admitted=admitted,
        evicted=int(np.count_nonzero(has_row)) - (len(held) - admitted),
        forgotten=int(np.count_nonzero(stale)),
        waiting=int(np.count_nonzero(~stale & ~enough)),
        refused=len(order) - len(held),
        free=capacity.rows - len(held),
    )
    return made, turnover


def new_rows(before: Vocabulary, after: Vocabulary) -> np.ndarray:
    """Where each row of a vocabulary is in the one after it: int32 [len(before)], -1 for a row that lost its id or had none.

    Example:
      >>> new_rows(Vocabulary([5, 7]), Vocabulary([7, 9], rows=[2, 1], size=4)).tolist()
      [0, -1, 2]
    """
    place = np.full(len(before), -1, np.int32)
    place[0] = 0
    if before.kind is not None and after.kind in (before.kind, None):
        row = after.encode(before.raw)
        place[before.rows] = np.where(row > 0, row, -1)
    return place


def _taken(raw: np.ndarray, at: np.ndarray) -> Any:
    """Some ids, as `Vocabulary` takes them; an empty choice keeps no kind."""
    return raw[at] if len(at) else []
