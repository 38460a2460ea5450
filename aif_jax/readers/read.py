"""Your own files as a `Dataset`: say which column is what, and read. Every file is read once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import expect
from aif_jax.data.cascade import LOGGED, from_columns
from aif_jax.data.dataset import Dataset, item_statistics
from aif_jax.data.events import EventLog
from aif_jax.encoding.columns import CODED, Columns, File, Kind
from aif_jax.encoding.encoder import Encoder, schema_of, under
from aif_jax.encoding.raw import scale_of, stacked
from aif_jax.encoding.times import PER_SECOND
from aif_jax.output import hidden
from aif_jax.readers.check import FILES, suspicions_of
from aif_jax.readers.sources import SKIPPED, Problems, Source
from aif_jax.readers.tables import Scan, Tables, blocks, events_of, read_tables, scan, validate
from aif_jax.store.trained import Trained
from aif_jax.trees import take
from aif_jax.types import ItemFeatures

logger = logging.getLogger(__name__)


def read(
    events: Source,
    *,
    items: Source,
    users: Source | None = None,
    columns: Columns | None = None,
    encoder: Encoder | None = None,
    earlier: Trained | None = None,
    unknown: Literal["error", "skip"] = "error",
    name: str | None = None,
    repeats: bool | None = None,
    progress: bool = True,
) -> Dataset:
    """Reads events, items and, where there are any, users.

    Held in memory are 20 bytes an event, and as much again while reading. Events need no order: they are sorted by user and
    time, those of one moment by item and action. What is suspicious (`check` has the list), such as a file that is there twice,
    is logged as a warning, one line each.

    Args:
      events: a Parquet, CSV or TSV file, or a folder of them, or a table in memory: one row for each interaction.
      items: the same: one row for each item of the catalogue.
      users: the same: one row for each user; None where nothing is known of users but their events.
      columns: which column is what; left out with `encoder` and `earlier`.
      encoder: encoder of a trained model: rows and scales then mean the same as in its training. A value that its vocabularies
        lack is an error, or with `unknown="skip"` row 0.
      earlier: a trained model to go on with, see `refreshing.warm_start`: its encoder with the new ids. Items that left the
        items file keep the features that the model knew (`Trained.items`), with the item statistics of today.
      unknown: "error", or "skip": leaves out events of unknown users and rows of unknown items. Events with an unknown item
        stay in histories as row 0, as in serving. A warning says how many there are.
      name: name of the data set; default: the name of the events file.
      repeats: whether users come back to items; None estimates it from the events, see `Dataset`. A line of the log says it.

    Returns:
      The data set with its encoder; rows follow the ascending ids.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: a file is not there.
      ValueError: the first problems of the files with file, row, column, expected and got; wrong options.

    Example:
      >>> events = {"user": ["ann", "ann", "bob"], "item": [7, 8, 7], "time": [20, 10, 30]}
      >>> data = read(events, items={"item": [7, 8], "category": ["tea", "cup"]}, columns=Columns())
      >>> data.log.item.tolist(), data.users.raw.tolist()
      ([2, 1, 1], ['ann', 'bob'])
    """
    if earlier is not None:
        expect(encoder is None, "encoder", "none with earlier=, whose encoder it is", encoder)
        encoder = earlier.need_encoder("read earlier")
    columns = _options(columns, users, encoder, unknown)
    problems = Problems()
    sources: dict[File, Source | None] = {"events": events, "items": items, "users": users}
    with hidden(not progress):
        tables = read_tables(sources, columns, problems, encoder=encoder, grow=earlier is not None)
    for kind in SKIPPED if unknown == "skip" else ():
        if count := problems.totals.get(kind, 0):
            logger.warning("%s: %d rows left out or left unknown: %s", tables.scans["events"].label, count, kind)
        problems.drop(kind)
    problems.expect_none()
    embedding = None
    if columns.content is not None:  # float32 [N, E] by row of the item vocabulary, zeros for the unknown item
        vectors = tables.scans["items"].floats(columns.content)
        embedding = _by_row(tables.rows["items"]["item"], vectors, len(tables.vocabularies["item"]))
    if encoder is None:
        width = 0 if embedding is None else embedding.shape[1]
        encoder = Encoder(
            schema=schema_of(columns, tables.vocabularies, content=width),
            columns=columns,
            vocabularies=tables.vocabularies,
            scales=_scales(tables, columns),
        )
    if earlier is not None:
        encoder = encoder.with_vocabularies(tables.vocabularies)
    user_ids, user_floats = _users(tables, encoder)
    found = events_of(tables, columns)
    moments = found.time // PER_SECOND[columns.time_unit]
    log = EventLog.from_arrays(found.user, found.item, found.action, moments, users=len(tables.vocabularies["user"]))
    catalogue = _catalogue(tables, encoder, embedding, earlier)
    if statistics := item_statistics(encoder.schema, log):
        catalogue = catalogue.with_statistics(statistics.at(np.arange(len(catalogue)), log.time.max(initial=0) + 1))
    for suspicion in suspicions_of(tables, columns, found):
        logger.warning("%s", suspicion)
    made = Dataset(
        name=name or Path(tables.scans["events"].label.name).name.split(".")[0],
        schema=encoder.schema,
        log=log,
        catalogue=catalogue,
        user_ids=user_ids,
        user_floats=user_floats,
        users=tables.vocabularies["user"],
        items=tables.vocabularies["item"],
        encoder=encoder,
        repeats=repeats,
    )
    comes, how = "come" if made.repeats else "do not come", "estimated" if repeats is None else "as given"
    logger.info(
        "%s: users %s back to items (repeats=%s, %s): %.1f %% of the events repeat an item of their user",
        made.name, comes, made.repeats, how, 100 * made.repeated,
    )  # fmt: skip
    return made


def read_items(
    items: Source, encoder: Encoder, *, statistics: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None
) -> Iterator[tuple[np.ndarray, ItemFeatures]]:
    """Reads items as features, block by block in bounded memory: for an index of the whole catalogue.

    Errors as `read`; nothing is checked across blocks, such as ids that repeat.

    Args:
      items: file, folder or table in memory, with the columns that training read.
      statistics: item statistics of raw ids [n] by column, such as `Dataset.statistic_columns` of a moment; None where they are
        columns of the items.

    Yields:
      Raw ids [n], int64 or strings, and ItemFeatures [n]; items that the encoder does not know have row 0.

    Example:
      >>> table = {"item": [7, 8], "category": ["tea", "cup"]}
      >>> data = read({"user": [1], "item": [7], "time": [20]}, items=table, columns=Columns())
      >>> [ids.tolist() for ids, _ in read_items(table, data.encoder)]
      [[7, 8]]
    """
    columns, problems = encoder.columns, Problems()
    kinds = columns.of("items", computed=statistics is None)
    for block in blocks(items, kinds, problems, columns=columns, name="items"):
        table = Scan(block.file, kinds, columns)
        table.add(block, problems)
        ids, rows = table.codes[columns.item_id].values(encoder.vocabularies["item"].kind), {}
        for column, name in columns.vocabularies("items").items():
            known = encoder.vocabularies[name]
            _, (rows[name],) = validate(name, [(table, column)], columns, problems, given=known)
        for kind in SKIPPED:
            problems.drop(kind)
        problems.expect_none()
        computed = {} if statistics is None else statistics(ids)
        named = [name for name in (*columns.item_floats, *columns.statistics, *columns.side) if name not in computed]
        floats = {**{name: table.floats(name) for name in named}, **computed}
        embedding = None if columns.content is None else table.floats(columns.content)
        yield ids, encoder.item_features(rows, floats, embedding)
    problems.expect_none()


def load_columns(source: Source, kinds: Mapping[str, Kind], *, columns: Columns | None = None) -> dict[str, np.ndarray]:
    """Reads some columns into memory, for data that needs work before it is what `read` takes; errors as `read`.

    Args:
      kinds: column name to what it holds: "id", "category", "float", "number", "vector" or "time".
      columns: for units; `Columns.text` names columns that stay text. Default: times in seconds.

    Returns:
      Name to int64 [n] or StringDType [n]; float32 [n] or [n, E]; int64 [n] seconds.

    Example:
      >>> load_columns({"movie": ["9", "7"], "rating": [4.5, 3.0]}, {"movie": "id", "rating": "float"})["rating"].tolist()
      [4.5, 3.0]
    """
    complete = not {"bag", "value"} & set(kinds.values())
    expect(complete, "load_columns", "kinds of columns without missing values", dict(kinds))
    return scan_columns(source, kinds, columns=columns or Columns(), name="table")[1]


def scan_columns(
    source: Source, kinds: Mapping[str, Kind], *, columns: Columns, name: str
) -> tuple[Scan, dict[str, np.ndarray]]:
    """The table, which knows the place of each row, and `load_columns` of its columns whose values may not be missing."""
    problems = Problems()
    table = scan(source, kinds, problems, columns=columns, name=name)
    arrays: dict[str, np.ndarray] = {}
    for column, kind in kinds.items():
        if kind in ("bag", "value"):
            continue
        if kind in CODED:
            vocabulary, (rows,) = validate(column, [(table, column)], columns, problems)
            arrays[column] = vocabulary.raw[rows - 1] if len(vocabulary.raw) else vocabulary.raw
        else:
            arrays[column] = table.seconds(column) if kind == "time" else table.floats(column)
    problems.expect_none()
    return table, arrays


def _options(columns: Columns | None, users: Source | None, encoder: Encoder | None, unknown: str) -> Columns:
    """Checks the options of `read`; returns the columns."""
    expect(unknown in ("error", "skip"), "unknown", "'error' or 'skip'", repr(unknown))
    if columns is None:
        if encoder is None:
            raise ValueError("columns: expected Columns, or an encoder that has them, got neither; give columns=")
        columns = encoder.columns
    if encoder is not None:
        same = encoder.columns == columns
        expect(same, "columns", f"those of the encoder, {encoder.columns}, or none", columns)
    named = (*columns.user_attributes, *columns.user_floats)
    given = users is not None or not named
    expect(given, "users", f"a file, because Columns names user columns {named}", None)
    return columns


def _by_row(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Values [n, ...] of the table's rows, put where their vocabulary says, [count, ...]; zeros in row 0."""
    table = np.zeros((count, *values.shape[1:]), values.dtype)
    table[rows] = values
    table[0] = 0
    return table


def _scales(tables: Tables, columns: Columns) -> dict[str, tuple[float, ...]]:
    if not columns.scale:
        return {}
    present = [(which, tables.scans[file]) for which, file in FILES.items() if file in tables.scans]
    return {f"{which}/{name}": scale_of(table.floats(name)) for which, table in present for name in columns.floats[which]}


def _catalogue(tables: Tables, encoder: Encoder, embedding: np.ndarray | None, earlier: Trained | None) -> Catalogue:
    """The features of all items: those of the file, of others what the model of `earlier` data knew."""
    columns, table, vocabulary = encoder.columns, tables.scans["items"], tables.vocabularies["item"]
    rows, count = dict(tables.rows["items"]), len(vocabulary)
    at = rows["item"]
    floats = {name: _by_row(at, table.floats(name), count) for name in (*columns.item_floats, *columns.side)}
    floats |= dict.fromkeys(columns.statistics, np.zeros(count, np.float32))  # from the events, when they are there
    ids = {name: _by_row(at, values, count) for name, values in rows.items()}
    features: Any = encoder.item_features(ids | {"item": np.arange(count, dtype=np.int32)}, floats, embedding)
    known = _by_row(at, np.ones(len(at), bool), count)
    features = dataclasses.replace(features, floats=features.floats * known[:, None])
    if earlier is not None:
        features = _with_departed(features, np.flatnonzero(~known)[1:], earlier, encoder)
    return Catalogue(
        schema=encoder.schema,
        raw=vocabulary.raw,
        ids=features.ids,
        floats=features.floats,
        content=features.content,
        side=features.side,
    )


def _with_departed(features: ItemFeatures, gone: np.ndarray, earlier: Trained, encoder: Encoder) -> ItemFeatures:
    """The features [N], with those that the model knew in the rows of items that the file lacks."""
    own = earlier.need_encoder("read earlier")
    if not len(gone):
        return features
    if earlier.items is None:
        text = "which an older version saved, does not hold their features; keep them in the file once more"
        logger.warning("%d items left the items file, and the model, %s", len(gone), text)
        return features
    before = own.vocabularies["item"].encode(encoder.vocabularies["item"].ids_of(gone))
    known = under(take(earlier.items, before), own, encoder)
    known = dataclasses.replace(known, encoding=features.encoding)

    def filled(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        values[gone] = others
        return values

    return jax.tree.map(filled, features, known)


def _users(tables: Tables, encoder: Encoder) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """ids and floats of the users [U]."""
    columns, count = encoder.columns, len(tables.vocabularies["user"])
    ids = {"user": np.arange(count, dtype=np.int32)} if columns.user_id else {}
    if "users" not in tables.scans:
        return ids, np.zeros((count, 0), np.float32)
    table, rows = tables.scans["users"], tables.rows["users"]
    ids |= {name: _by_row(rows["user"], rows[name], count) for name in columns.user_attributes}
    floats = stacked([table.floats(name) for name in columns.user_floats], table.count)
    return ids, _by_row(rows["user"], encoder.scaled("user", floats), count)


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
    """Reads the log of a cascade, and gives the data with it. Users, items and times are those of the events; errors as `read`.

    A request is all lines of one user and time. Its history is what the event log has of the user strictly earlier, so requests
    at whose time the log has no event of the user (nothing was shown) are left out; the logger "aif_jax.readers.read" counts
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

    made, without, cut = from_columns(
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
    if cut:
        logger.warning("cascade: %d candidates of requests with more than candidates=%d are left out", cut, candidates)
    return dataclasses.replace(data, cascade=made)
