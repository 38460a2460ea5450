"""Readers of requests with all their candidates: a cascade's log with stages and ranker scores, or retrieved items alone."""

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from aif_jax.checks import expect
from aif_jax.data.cascade import LOGGED, from_columns
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.columns import Columns
from aif_jax.readers.read import table_and_columns
from aif_jax.readers.tables import Source

logger = logging.getLogger(__name__)

CANDIDATES = 1024


def read_cascade(
    source: Source,
    data: Dataset,
    *,
    user: str = "user",
    item: str = "item",
    time: str = "time",
    stage: str = "stage",
    labels: Mapping[str, str] | tuple[str, ...] = (),
    candidates: int = CANDIDATES,
    columns: Columns | None = None,
) -> Dataset:
    """Read a cascade's log and return the data with it; users, items and times are named as in the events; errors as `read`.

    A request is all lines of one user and time. Its history is what the event log has of the user strictly earlier, so requests
    at whose time the log has no event of the user (nothing was shown) are left out; the logger "aif_jax.readers.cascade" counts
    them, lines of unknown items, and candidates beyond M.

    Args:
      source: Parquet, CSV or TSV, a folder of them, or columns in memory: one line for each candidate.
      data: what `read` gave.
      stage: column of how far each candidate came, by name: "exposed", "ranked", "pre_ranked" or "retrieved". A candidate comes
        once in a request.
      labels: columns of numbers: the objectives' labels, the ranker's score; or their new names by column. NaN, or an empty
        value in CSV, where the log does not know.
      candidates: M, of a request at most; the furthest stages are kept, then the order of the lines.
      columns: for the unit of times; None takes those of the data's encoder.

    Example:
      >>> import aif_jax as aif
      >>> events = {"user": ["ann", "ann"], "item": [7, 8], "time": [10, 20]}
      >>> data = aif.read(events, items={"item": [7, 8, 9], "category": ["tea", "cup", "tea"]}, columns=Columns())
      >>> lines = {"user": ["ann"] * 3, "item": [8, 9, 7], "time": [20] * 3, "stage": ["exposed", "ranked", "retrieved"]}
      >>> data = read_cascade(lines | {"score": [2.5, 1.5, float("nan")]}, data, labels={"score": "ranker"})
      >>> data.cascade
      Cascade(1 requests of up to 1,024 candidates: 1 exposed, 1 ranked, 0 pre_ranked, 1 retrieved; labels ['ranker'])
    """
    named = dict(labels) if isinstance(labels, Mapping) else {name: name for name in labels}
    columns = columns or data.columns
    text = tuple(name for name in columns.text if name in (user, item))
    reading = Columns(time_unit=columns.time_unit, text=(*text, stage))
    kinds = {user: "id", item: "id", time: "time", stage: "category"} | dict.fromkeys(named, "number")
    lines, table = table_and_columns(source, kinds, columns=reading, name="cascade")  # type: ignore[arg-type]
    stages, which = np.unique(table[stage], return_inverse=True)
    codes = np.array([LOGGED.index(name) if name in LOGGED else -1 for name in stages.tolist()], np.int64)
    if (codes < 0).any():
        where = f"{lines.label}, {lines.locate(int(np.argmax(codes[which] < 0)))}, column {stage!r}"
        unknown = stages[codes < 0].tolist()[:8]
        expect(False, f"cascade {stage}", f"stages among {LOGGED}", f"{unknown}, the first in {where}")
    rows = data.items.encode(table[item])
    users = data.users.encode(table[user])

    def names(one: int, other: int) -> tuple[str, str, str]:
        who, what = (table[name][one : one + 1].tolist()[0] for name in (user, item))
        where = f"{lines.locate(one)} and {lines.locate(other)} of {lines.label}"
        return f"item {what!r}", f"user {who!r} at {int(lines.times(time)[one])}", where

    cascade, without, cut = from_columns(
        data.log,
        user=users,
        time=table[time],
        rows=rows,
        stage=codes[which],
        labels={new: table[name] for name, new in named.items()},
        candidates=candidates,
        names=names,
    )
    lost = int(np.count_nonzero((rows == 0) | (users == 0)))
    if without or lost:
        logger.warning(
            "cascade: %d requests without an event in the log and %d lines of unknown ids are left out", without, lost
        )
    if cut:
        logger.warning("cascade: %d candidates of requests with more than candidates=%d are left out", cut, candidates)
    return dataclasses.replace(data, cascade=cascade)


def read_candidates(source: Source, data: Dataset) -> np.ndarray:
    """Read what retrieval found for requests: int32 [n, N] catalogue rows for each event of the log, for `train.Teacher`.

    A request is all lines of one user and time; its events are those of the log of that user and time. Lines of requests that
    the log does not have are left out, and so are unknown items, which the logger "aif_jax.readers.cascade" counts.

    Args:
      source: Parquet, CSV or TSV, a folder of them, or columns in memory: one line for each candidate, in the order of
        retrieval, with the columns of user, item and time that the events have.
      data: what `read` gave.

    Raises:
      ValueError: no line of a known item for a request of the log; and as `read`.

    Example:
      >>> import aif_jax as aif
      >>> events = {"user": ["ann", "ann"], "item": [7, 8], "time": [10, 20]}
      >>> data = aif.read(events, items={"item": [7, 8, 9], "category": ["tea", "cup", "tea"]}, columns=Columns())
      >>> read_candidates({"user": ["ann"] * 2, "item": [9, 7], "time": [20] * 2}, data).tolist()
      [[0, 0], [3, 1]]
    """
    columns, log = data.columns, data.log
    user, item, time = columns.user, columns.item, columns.time
    reading = Columns(time_unit=columns.time_unit, text=tuple(name for name in columns.text if name in (user, item)))
    lines, table = table_and_columns(source, {user: "id", item: "id", time: "time"}, columns=reading, name="candidates")
    users, rows, times = data.users.encode(table[user]), data.items.encode(table[item]), table[time]
    first = log.request_start(users, times)
    there = (rows > 0) & (users > 0) & (first >= 0)
    expect(there.any(), str(lines.label), "a known item, at the user and time of an event", f"none in {len(there):,} lines")
    if lost := int(np.count_nonzero(~there)):
        logger.warning("candidates: %d of %d lines are of no event in the log, or of unknown items", lost, len(there))
    first, rows = first[there], rows[there]
    order = np.argsort(first, kind="stable")
    first, rows = first[order], rows[order]
    place = np.arange(len(first)) - np.searchsorted(first, first)
    lists = np.zeros((len(log), place.max() + 1), np.int32)
    lists[first, place] = rows
    return lists[log.history_end(np.arange(len(log)))]
