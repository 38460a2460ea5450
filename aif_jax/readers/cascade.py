"""Readers of requests with all their candidates: a cascade's log with stages and ranker scores, or retrieved items alone."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import numpy as np

from aif_jax.checks import expect
from aif_jax.data.cascade import STAGES, from_columns
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.columns import Kind
from aif_jax.encoding.times import PER_SECOND
from aif_jax.readers.read import encode_columns, encode_listed
from aif_jax.readers.tables import SKIPPED, LoadedTable, Problems, Source, read_table

logger = logging.getLogger(__name__)


def read_cascade(
    source: Source, data: Dataset, *, labels: Mapping[str, str] | tuple[str, ...] = (), candidates: int = 1024
) -> Dataset:
    """Read a cascade's log and return the data with it; users, items and times are as in the events; errors as `read`.

    A request is all lines of one user and second. Its history is what the event log has of the user strictly earlier, so
    requests without an event of the user in that second (nothing was shown) are left out; the logger "aif_jax.readers.cascade"
    counts them, lines of unknown items, and candidates beyond M.

    Args:
      source: Parquet, CSV or TSV, a folder of them, or columns in memory: one line for each candidate, once in a request, with
        a column "stage" of how far it came: "exposed", "ranked", "pre_ranked" or "retrieved".
      data: what `read` gave.
      labels: columns of numbers: the objectives' labels, the ranker's score; or their new names by column. NaN, or an empty
        value in CSV, where the log does not know.
      candidates: M, of a request at most: those of the furthest stages, of one the first lines; stored by stage and item.

    Example:
      >>> import aif_jax as aif
      >>> events = {"user": ["ann", "ann"], "item": [7, 8], "time": [10, 20]}
      >>> data = aif.read(events, items={"item": [7, 8, 9], "category": ["tea", "cup", "tea"]}, columns=aif.Columns())
      >>> lines = {"user": ["ann"] * 3, "item": [8, 9, 7], "time": [20] * 3, "stage": ["exposed", "ranked", "retrieved"]}
      >>> data = read_cascade(lines | {"score": [2.5, 1.5, float("nan")]}, data, labels={"score": "ranker"})
      >>> data.cascade
      Cascade(1 requests of up to 1,024 candidates: 1 exposed, 1 ranked, 0 pre_ranked, 1 retrieved; labels ['ranker'])
    """
    named = dict(labels) if isinstance(labels, Mapping) else {name: name for name in labels}
    taken = ("stage", data.columns.user, data.columns.item, data.columns.time)
    good = not isinstance(labels, str) and not set(taken) & set(named) and len(set(named.values())) == len(named)
    expect(good, "labels", f"columns other than {taken}, each under another name, such as ('score',)", repr(labels))
    kinds: dict[str, Kind] = {"stage": "action", **dict.fromkeys(named, "optional float")}
    lines, users, rows, time = _lines(source, data, kinds, name="cascade")
    codes, known = encode_listed("stage", lines, "stage", STAGES) - 1, np.flatnonzero((rows > 0) & (users > 0))
    order = known[np.lexsort((rows[known], time[known], users[known]))]  # stable: equal ones in the order of the lines
    again = np.zeros(lines.count, bool)
    again[order[1:]] = np.logical_and.reduce([np.diff(values[order]) == 0 for values in (users, time, rows)])

    def got(at: np.ndarray) -> Iterator[str]:
        pairs = zip(data.items.ids_of(rows[at]).tolist(), data.users.ids_of(users[at]).tolist(), strict=True)
        return (f"{item!r} twice in the request of user {user!r}" for item, user in pairs)

    lines.note("duplicate item", again, data.columns.item, "every item once in a request (one user and second)", got)
    lines.problems.expect_none()
    named_labels = {new: lines.array(name) for name, new in named.items()}
    cascade, without, cut = from_columns(
        data.log, user=users, time=time, rows=rows, stage=codes, labels=named_labels, candidates=candidates
    )
    expect(len(cascade), lines.label.name, "a known item, at the user and time of an event", f"none in {lines.count:,} lines")
    if without or len(known) < lines.count:
        text = "cascade: %d requests without an event in the log and %d lines of unknown ids are left out"
        logger.warning(text, without, lines.count - len(known))
    if cut:
        logger.warning("cascade: %d candidates of requests with more than candidates=%d are left out", cut, candidates)
    return dataclasses.replace(data, cascade=cascade)


def read_candidates(source: Source, data: Dataset) -> np.ndarray:
    """Read what retrieval found for requests: int32 [n, N] catalogue rows for each event of the log, for `train.Teacher`.

    A request is all lines of one user and second, and its events are those of the log. Lines of requests that the log does not
    have are left out, and so are unknown items, which the logger "aif_jax.readers.cascade" counts.

    Args:
      source: Parquet, CSV or TSV, a folder of them, or columns in memory: one line for each candidate, in the order of
        retrieval, with the columns of user, item and time that the events have.
      data: what `read` gave.

    Raises:
      ValueError: no line of a known item for a request of the log; and as `read`.
    """
    log, (lines, users, rows, time) = data.log, _lines(source, data, {}, name="candidates")
    first = log.request_start(users, time)
    there = (rows > 0) & (users > 0) & (first >= 0)
    expect(there.any(), lines.label.name, "a known item, at the user and time of an event", f"none in {len(there):,} lines")
    if lost := int(np.count_nonzero(~there)):
        logger.warning("candidates: %d of %d lines are of no event in the log, or of unknown items", lost, len(there))
    order = np.flatnonzero(there)[np.argsort(first[there], kind="stable")]
    first, rows = first[order], rows[order]
    place = np.arange(len(first)) - np.searchsorted(first, first)
    lists = np.zeros((len(log), place.max() + 1), np.int32)
    lists[first, place] = rows
    return lists[log.history_end(np.arange(len(log)))]


def _lines(
    source: Source, data: Dataset, kinds: Mapping[str, Kind], *, name: str
) -> tuple[LoadedTable, np.ndarray, np.ndarray, np.ndarray]:
    """Return a table of lines with the columns `kinds`, and the user row, item row and time in seconds of each line."""
    columns, problems = data.columns, Problems()
    every: dict[str, Kind] = {columns.user: "id", columns.item: "id", columns.time: "time", **kinds}
    lines = read_table(source, every, problems, columns=columns, name=name)
    _, (users,) = encode_columns("user", [(lines, columns.user)], given=data.users)
    _, (rows,) = encode_columns("item", [(lines, columns.item)], given=data.items)
    problems.expect_none(*SKIPPED)
    return lines, users, rows, lines.array(columns.time) // PER_SECOND[columns.time_unit]
