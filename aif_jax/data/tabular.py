"""One's own Parquet or CSV files as a `Dataset`: say which column is what, and read. Source: ours.

Needs the `data` extra (Apache Arrow). `aif_jax.data.check` lists everything that is wrong with the files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aif_jax.data import content as contents
from aif_jax.data.catalogue import Catalogue
from aif_jax.data.check import relations
from aif_jax.data.columns import Columns
from aif_jax.data.content import Content
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.problems import Problems
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.survey import PathLike, encode, encode_actions, survey, survey_all
from aif_jax.data.tables import blocks

__all__ = ["Columns", "load_vocabularies", "read", "read_log", "save_vocabularies", "vocabularies"]

logger = logging.getLogger(__name__)


def read(
    events: PathLike,
    *,
    items: PathLike,
    users: PathLike | None = None,
    columns: Columns,
    content: Content | None = None,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    unknown: str = "error",
    name: str | None = None,
) -> Dataset:
    """Reads one's own files: events, items and, where there are any, users.

    Files are read three times: for their distinct values, for what is wrong, and for the rows. Nothing is held as a whole but
    the arrays of the data set (20 bytes an event). Events need no order: they are sorted by user and time.

    Args:
      events: a Parquet, CSV or TSV file, or a folder of them: one row for each interaction.
      items: the same: one row for each item of the catalogue.
      users: the same: one row for each user; None where nothing is known of users but their events.
      columns: which column is what.
      content: content embedding from elsewhere: a path to an .npz with `embedding` and item ids, or (ids [n], arrays [n, E]).
      vocabularies: of an earlier reading, see `vocabularies`: rows then mean the same as then, as a trained model needs. A
        value that they lack is an error, or with `unknown="skip"` row 0.
      unknown: "error", or "skip": passes over events whose user or item has no row, and items without one, with a warning.
      name: of the data set; default: the name of the events file.

    Returns:
      The data set; rows follow the ascending ids.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: a file is not there.
      ValueError: the first problems of the files with file, row, column, expected and got; wrong options.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "events.csv").write_text("user,item,time\\nann,7,20\\nann,8,10\\nbob,7,30\\n")
      >>> _ = (folder / "items.csv").write_text("item,category\\n7,tea\\n8,cup\\n")
      >>> data = read(folder / "events.csv", items=folder / "items.csv", columns=Columns())
      >>> data.log.item.tolist(), data.users.raw.tolist()
      ([2, 1, 1], ['ann', 'bob'])
    """
    if unknown not in ("error", "skip"):
        raise ValueError(f"unknown: expected 'error' or 'skip', got {unknown!r}")
    if columns.content is not None and content is not None:
        raise ValueError(f"content: expected Columns.content ({columns.content!r}) or content=, not both")
    known = _known(events, items, users, columns, vocabularies, skip=unknown == "skip")
    item_rows, user_rows = known["item"], known["user"]
    catalogue_ids, item_table, side, embedding = _items(items, columns, known, unknown)
    if content is not None:
        embedding = contents.align(content, item_rows.raw)
    schema = Schema(
        item_attributes=(
            Attribute(name="item", size=max(len(item_rows), 2)),
            Attribute(name="category", size=max(len(known["category"]), 2)),
            *(Attribute(name=name, size=max(len(known[name]), 2)) for name in columns.item_attributes),
            *(Attribute(name=name, size=max(len(known[name]), 2), length=columns.bag_length) for name in columns.item_bags),
        ),
        user_attributes=(
            *((Attribute(name="user", size=max(len(user_rows), 2)),) if columns.user_id else ()),
            *(Attribute(name=name, size=max(len(known[name]), 2)) for name in columns.user_attributes),
        ),
        behaviour_fields=("item", "category", *columns.behaviour_fields),
        actions=_action_count(columns, known),
        user_floats=len(columns.user_floats),
        item_floats=len(columns.item_floats),
        content=0 if embedding is None else embedding.shape[1],
        side=columns.side,
    )
    user_ids, user_floats = _users(users, columns, known)
    return Dataset(
        name=name or Path(events).name.split(".")[0],
        schema=schema,
        log=_log(events, columns, known),
        catalogue=Catalogue.from_items(
            schema, item_rows.raw, ids=catalogue_ids, floats=item_table, content=embedding, side=side
        ),
        user_ids=user_ids,
        user_floats=user_floats,
        users=user_rows,
        items=item_rows,
    )


def read_log(
    events: PathLike, columns: Columns, *, users: Vocabulary | None = None, items: Vocabulary | None = None
) -> EventLog:
    """The events alone, as `EventLog.from_parquet` and `EventLog.from_csv` give them.

    Args:
      events: file or folder.
      columns: which column is what; of items and users only the ids are looked at.
      users, items: ids to rows; None where the column holds rows already. Users must be known; an unknown item is row 0.

    Raises:
      ImportError, FileNotFoundError, ValueError: as `read`.
    """
    problems = Problems()
    found = survey(events, columns.of_events(), problems, columns=columns)
    vocabularies = {} if columns.action is None or columns.actions else {"action": found[columns.action]}
    for name, column, given in (("user", columns.user, users), ("item", columns.item, items)):
        if given is None and column in found and found[column].raw.dtype.kind == "U":
            problems.add("wrong type", events, None, column, f"rows (integers), or a vocabulary: {name}s=", "text")
        vocabularies |= {} if given is None else {name: given}
    problems.expect_none()
    return _log(events, columns, vocabularies, unknown_item=True)


def vocabularies(
    events: PathLike, *, items: PathLike, users: PathLike | None = None, columns: Columns
) -> dict[str, Vocabulary]:
    """The vocabularies that `read` makes: "user", "item", "category", each attribute, "action" where `columns` lists none.

    Keep them with the trained model (`save_vocabularies`), and give them to `read` with tomorrow's files.

    Raises:
      ImportError, FileNotFoundError, ValueError: as `read`.
    """
    return _known(events, items, users, columns, None, skip=False)


def save_vocabularies(path: PathLike, vocabularies: Mapping[str, Vocabulary]) -> None:
    """Writes vocabularies as one JSON file."""
    Path(path).write_text(json.dumps({name: vocabulary.raw.tolist() for name, vocabulary in vocabularies.items()}), "utf-8")


def load_vocabularies(path: PathLike) -> dict[str, Vocabulary]:
    """The vocabularies that `save_vocabularies` wrote."""
    stored = json.loads(Path(path).read_text("utf-8"))
    return {
        name: Vocabulary(np.array(raw, np.int64 if raw and isinstance(raw[0], int) else str)) for name, raw in stored.items()
    }


def _known(
    events: PathLike,
    items: PathLike,
    users: PathLike | None,
    columns: Columns,
    given: Mapping[str, Vocabulary] | None,
    *,
    skip: bool,
) -> dict[str, Vocabulary]:
    """All vocabularies; raises where the files have problems."""
    problems = Problems()
    known = survey_all(events, items, users, columns, given, problems)
    problems.expect_none()
    relations(events, items, users, columns, known, problems, order="none", duplicates=False)
    if skip:
        for kind in ("unknown user", "unknown item", "unknown action", "unknown category"):
            count = problems.totals.get(kind, 0)
            if count:
                logger.warning("%s: %d rows passed over or left unknown: %s", events, count, kind)
            problems.drop(kind)
    problems.expect_none()
    return known


def _action_count(columns: Columns, known: Mapping[str, Vocabulary]) -> int:
    if columns.action is None:
        return 2
    return len(columns.actions) + 1 if columns.actions else max(len(known["action"]), 2)


def _log(events: PathLike, columns: Columns, known: Mapping[str, Vocabulary], *, unknown_item: bool = False) -> EventLog:
    """The events whose user and item are known; `known` without a vocabulary takes the column's values as rows."""
    parts: dict[str, list[np.ndarray]] = {"user": [], "item": [], "action": [], "time": []}
    unknown_users = Problems()
    for block in blocks(events, columns.of_events(), Problems(), reading=columns.reading):
        rows = {
            name: encode(coded, known[name]) if name in known else coded.values[coded.codes]
            for name, coded in (("user", block.columns[columns.user]), ("item", block.columns[columns.item]))
        }
        rows["time"] = block.columns[columns.time]
        rows["action"] = (
            np.ones(len(block.rows), np.int32)
            if columns.action is None
            else encode_actions(block.columns[columns.action], columns, known)
        )
        if unknown_item:
            strangers = rows["user"] <= 0
            unknown_users.add(
                "unknown user", block.file, block.rows[strangers], columns.user, "a user of the vocabulary", "another"
            )
            kept = ~strangers
        else:
            kept = (rows["user"] > 0) & (rows["item"] > 0)
        for name, values in rows.items():
            parts[name].append(values[kept])
    unknown_users.expect_none()
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    return EventLog.from_arrays(**arrays, users=len(known["user"]) if "user" in known else None)


def _items(
    items: PathLike, columns: Columns, known: Mapping[str, Vocabulary], unknown: str
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """ids, floats, side and content of the catalogue [N - 1]."""
    count = len(known["item"])
    ids = {name: np.zeros(count, np.int32) for name in ("category", *columns.item_attributes)}
    ids |= {name: np.zeros((count, columns.bag_length), np.int32) for name in columns.item_bags}
    floats = np.zeros((count, len(columns.item_floats)), np.float32)
    side = {name: np.zeros(count, np.float32) for name in columns.side}
    embedding: np.ndarray | None = None
    for block in blocks(items, columns.of_items(), Problems(), reading=columns.reading):
        at = encode(block.columns[columns.item_id], known["item"])
        ids["category"][at] = encode(block.columns[columns.category], known["category"])
        for name in (*columns.item_attributes, *columns.item_bags):
            ids[name][at] = encode(block.columns[name], known[name])
        for i, name in enumerate(columns.item_floats):
            floats[at, i] = block.columns[name]
        for name in columns.side:
            side[name][at] = block.columns[name]
        if columns.content is not None:
            vectors = block.columns[columns.content]
            embedding = np.zeros((count, vectors.shape[1]), np.float32) if embedding is None else embedding
            embedding[at] = vectors
    return (
        {name: table[1:] for name, table in ids.items()},
        floats[1:],
        {name: table[1:] for name, table in side.items()},
        None if embedding is None else embedding[1:],
    )


def _users(
    users: PathLike | None, columns: Columns, known: Mapping[str, Vocabulary]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """ids and floats of the users [U]."""
    count = len(known["user"])
    ids = {name: np.zeros(count, np.int32) for name in columns.user_attributes}
    floats = np.zeros((count, len(columns.user_floats)), np.float32)
    if users is not None:
        for block in blocks(users, columns.of_users(), Problems(), reading=columns.reading):
            at = encode(block.columns[columns.user_key or columns.user], known["user"])
            for name in columns.user_attributes:
                ids[name][at] = encode(block.columns[name], known[name])
            for i, name in enumerate(columns.user_floats):
                floats[at, i] = block.columns[name]
    for table in (*ids.values(), floats):
        table[0] = 0  # where rows that no vocabulary knows were written
    return ({"user": np.arange(count, dtype=np.int32)} if columns.user_id else {}) | ids, floats
