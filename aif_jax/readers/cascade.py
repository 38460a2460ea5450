"""Logged requests as a `Cascade`: one line for each candidate, with how far it came, labels, and the ranker's score."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aif_jax.checks import check_encoding, expect
from aif_jax.data.cascade import LOGGED, Cascade, ServedFeatures, features_from, from_columns, open_samples
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS as OF_LOG
from aif_jax.data.events import EventLog
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.readers.read import scan_columns
from aif_jax.readers.sources import Source

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
    """Reads the log of a cascade, and gives the data with it. Users, items and times are those of the events.

    A request is all lines of one user and time. Its history is what the event log has of the user strictly earlier, so requests
    at whose time the log has no event of the user (nothing was shown) are left out; the logger "aif_jax.readers.cascade" counts
    them, and lines of unknown items.

    Args:
      source: Parquet, CSV or TSV, a folder of them, or columns in memory: one line for each candidate.
      data: what `read` gave.
      stage: column of how far each candidate came, by name: "exposed", "ranked", "pre_ranked" or "retrieved".
      labels: columns of numbers: the objectives' labels, the ranker's score; or their new names by column. NaN, or an empty
        value in CSV, where the log does not know.
      candidates: M, of a request at most; the furthest stages are kept.
      columns: for the unit of times; None takes those of the data's encoder.

    Raises:
      ImportError, FileNotFoundError, ValueError: as `read`; a stage of another name, a candidate that comes twice in a request.

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
    known = data.encoder.columns if data.encoder is not None else Columns()
    text = tuple(name for name in (known.text if columns is None else columns.text) if name in (user, item))
    reading = Columns(time_unit=(columns or known).time_unit, text=(*text, stage))
    kinds = {user: "id", item: "id", time: "time", stage: "category"} | dict.fromkeys(named, "number")
    lines, table = scan_columns(source, kinds, columns=reading, name="cascade")  # type: ignore[arg-type]
    codes = {name: code for code, name in enumerate(LOGGED)}
    stages, which = np.unique(table[stage], return_inverse=True)
    strange = [str(name) for name in stages if str(name) not in codes]
    if strange:
        first = int(np.argmax(np.isin(which, [place for place, name in enumerate(stages) if str(name) in strange])))
        where = f"{lines.label}, {lines.place(first)}, column {stage!r}"
        expect(False, f"cascade {stage}", f"stages among {LOGGED}", f"{strange[:8]}, the first in {where}")
    rows = data.items.encode(table[item])
    users = data.users.encode(table[user])

    def names(one: int, other: int) -> tuple[str, str, str]:
        who, what = (table[name][one : one + 1].tolist()[0] for name in (user, item))
        places = f"{lines.place(one)} and {lines.place(other)} of {lines.label}"
        return f"item {what!r}", f"user {who!r} at {lines.time(time, one)}", places

    made, without = from_columns(
        data.log,
        user=users,
        time=table[time],
        rows=rows,
        stage=np.array([codes[str(name)] for name in stages], np.int64)[which],
        labels={new: table[name] for name, new in named.items()},
        candidates=candidates,
        names=names,
    )
    lost = int(np.count_nonzero((rows == 0) | (users == 0)))
    if without or lost:
        logger.warning(
            "cascade: %d requests without an event in the log and %d lines of unknown ids are left out", without, lost
        )
    return dataclasses.replace(data, cascade=made)


def read_samples(folder: str | Path, data: Dataset) -> Dataset:
    """The samples that `jobs.outcomes.join_outcomes` wrote, for `fit` with the task `Impressions` or `Cascaded`.

    A user's features are those that were served; an item's come from the catalogue of `data`. Arrays stay on disk.

    `Impressions(candidates=C, threshold=2)` trains the first outcome: action 1 is an item that was shown, 2 one with the first
    outcome, 3 with the second; threshold={"click": 2, "conversion": 3} is for a later outcome that only follows the earlier.
    `Cascaded` has a label of each outcome, unknown where nothing was shown, and the logit that was served as "served".

    Args:
      data: read with the encoder of the samples, such as `read(events, items=items, encoder=encoder, unknown="skip")`.

    Returns:
      Data with the samples in place of events and users. Users are numbered by a hash of their id, to group them.

    Raises:
      FileNotFoundError, ValueError: no folder of samples, or a damaged one.
      EncodingMismatch: data of another encoder than the samples'.
    """
    record, arrays = open_samples(folder)
    check_encoding(str(folder), expected=data.encoding, got=record["encoding"])
    users, schema = Vocabulary(arrays["users"]), data.schema
    parts = {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith("features.")}
    labels = {name.partition(".")[2]: arrays[name] for name in arrays if name.startswith("labels.")}
    features = features_from(parts, schema, encoding=record["encoding"], name=str(folder))
    lengths = {a.name: () if a.length == 1 else (a.length,) for a in schema.user_attributes}
    return dataclasses.replace(
        data,
        name=f"{data.name}, served",
        log=EventLog(**{name: arrays[name] for name in (*OF_LOG, "offsets")}),
        users=users,
        user_ids={name: np.broadcast_to(np.int32(0), (len(users), *rest)) for name, rest in lengths.items()},
        user_floats=np.broadcast_to(np.float32(0), (len(users), schema.user_floats)),
        cascade=Cascade(positions=arrays["positions"], rows=arrays["rows"], stage=arrays["stage"], labels=labels),
        served=ServedFeatures(
            positions=arrays["positions"],
            features=features,
            outcomes=tuple(record["outcomes"]),
            statistics=data.statistics,
        ),
        repeats=True,
    )
