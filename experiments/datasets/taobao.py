"""Taobao UserBehavior as a `Dataset`.

Data: Alibaba Tianchi, data set 649, under its terms: clicks, carts, favourites and purchases of 25 November to
3 December 2017; CSV without a header: user, item, category, behaviour, Unix seconds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from aif_jax.data import content as contents
from aif_jax.data.catalogue import Catalogue
from aif_jax.data.content import Content
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.text_table import DataError, Kind, number_blocks

BEHAVIOURS = ("pv", "cart", "fav", "buy")  # actions 1 to 4
COLUMNS: dict[str, Kind] = {"user": "id", "item": "id", "category": "id", "behaviour": BEHAVIOURS, "time": "integer"}
WINDOW = (1511539200, 1512316800)  # 25 November 2017, 00:00, to 4 December, 00:00, in Beijing

logger = logging.getLogger(__name__)


def read(
    path: str | os.PathLike,
    *,
    content: Content | None = None,
    between: tuple[int, int] | None = None,
    user_id: bool = False,
) -> Dataset:
    """Reads UserBehavior.csv or any excerpt of it in the same format.

    Items have `item` and `category`; actions are 1 pv (page view), 2 cart, 3 fav, 4 buy. A few items stand under more than one
    category: they get that of their last event, and a warning is logged with their number.

    Args:
      path: the file, or a folder that holds exactly one .csv.
      content: content embedding: a path to an .npz with `embedding` and item ids, or (raw item ids [n], embeddings [n, E]).
      between: keeps only events with between[0] <= time < between[1], such as `WINDOW`, the days that the data set is said to
        cover; the file has a few times far outside.
      user_id: adds the user's own row as a user attribute.

    Returns:
      The data set; rows follow the ascending raw ids.

    Raises:
      DataError: the file is missing or malformed: names file, line, what was expected and what came.
      ValueError: a content embedding that does not fit, or no event in `between`.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "UserBehavior.csv"
      >>> _ = path.write_text("1,50,7,pv,1511544070\\n1,40,7,buy,1511544071\\n")
      >>> read(path).log.action.tolist()
      [1, 4]
    """
    file = _file(Path(path))
    events = _events(file, between)
    users, items, categories = (Vocabulary(np.unique(events[name])) for name in ("user", "item", "category"))
    rows = {name: vocabulary.encode(events[name]) for name, vocabulary in (("user", users), ("item", items))}
    category = categories.encode(events["category"])
    category_of = np.zeros(len(items), np.int32)
    order = np.argsort(events["time"], kind="stable")
    category_of[rows["item"][order]] = category[order]  # the last one stays
    several = np.unique(rows["item"][category_of[rows["item"]] != category])
    if several.size:
        logger.warning("%s: %d of %d items stand under more than one category", file.name, several.size, len(items) - 1)
    embedding = None if content is None else contents.align(content, items.raw)
    schema = Schema(
        item_attributes=(Attribute(name="item", size=len(items)), Attribute(name="category", size=len(categories))),
        user_attributes=(Attribute(name="user", size=len(users)),) if user_id else (),
        actions=len(BEHAVIOURS) + 1,
        content=0 if embedding is None else embedding.shape[1],
    )
    return Dataset(
        name=file.stem,
        schema=schema,
        log=EventLog.from_arrays(
            user=rows["user"], item=rows["item"], action=events["behaviour"] + 1, time=events["time"], users=len(users)
        ),
        catalogue=Catalogue.from_items(schema, items.raw, ids={"category": category_of[1:]}, content=embedding),
        user_ids={"user": np.arange(len(users), dtype=np.int32)} if user_id else {},
        user_floats=np.zeros((len(users), 0), np.float32),
        users=users,
        items=items,
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.csv"))
    if len(files) != 1:
        raise DataError(path, None, "exactly one .csv file", f"{len(files)}: {[file.name for file in files[:8]]}")
    return files[0]


def _events(path: Path, between: tuple[int, int] | None) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for _, block in number_blocks(path, COLUMNS):
        inside = slice(None) if between is None else (block["time"] >= between[0]) & (block["time"] < between[1])
        for name, values in block.items():
            parts[name].append(values[inside])
    events = {name: np.concatenate(values) for name, values in parts.items()}
    if not len(events["time"]):
        raise ValueError(f"{path}: expected events with times in {between}, got none")
    return events
