"""Taobao UserBehavior as a `Dataset`.

Data: Alibaba Tianchi, data set 649, under its terms: clicks, carts, favourites and purchases of 25 November to
3 December 2017; CSV without a header: user, item, category, behaviour, Unix seconds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from aif_jax import Columns, Dataset
from experiments.datasets.tables import Table, coded, dataset, one_file

BEHAVIOURS = ("pv", "cart", "fav", "buy")  # actions 1 to 4
COLUMNS = dict.fromkeys(("user", "item", "category"), "integer") | {"behaviour": "text", "time": "integer"}
WINDOW = (1511539200, 1512316800)  # 25 November 2017, 00:00, to 4 December, 00:00, in Beijing

logger = logging.getLogger(__name__)


def read(path: str | os.PathLike, *, between: tuple[int, int] | None = None) -> Dataset:
    """Read UserBehavior.csv or any excerpt of it in the same format.

    Items have `item` and `category`; actions are 1 pv (page view), 2 cart, 3 fav, 4 buy. A few items have more than one
    category: they get that of their last event, and a warning is logged with their number.

    `path` may also be a folder that holds exactly one .csv. `between` keeps only events with between[0] <= time < between[1],
    such as `WINDOW`, the days that the data set is said to cover; the file has a few times far outside.
    """
    folder = Path(path)
    file = one_file(folder, "*.csv") if folder.is_dir() else folder
    table = Table(file, COLUMNS, names=tuple(COLUMNS))
    behaviour = table.words("behaviour", BEHAVIOURS)
    kept = np.ones(len(behaviour), bool) if between is None else (table["time"] >= between[0]) & (table["time"] < between[1])
    if not kept.any():
        raise ValueError(f"{file}: expected events with times in {between}, got none")
    events = {name: table[name][kept] for name in COLUMNS if name != "behaviour"}
    items, categories = _last_category(events, file)
    return dataset(
        file.stem,
        events=events | {"behaviour": coded(behaviour[kept], BEHAVIOURS)},
        items={"item": items, "category": categories},
        columns=Columns(action="behaviour", actions=BEHAVIOURS),
        vocabularies={},
    )


def _last_category(events: dict[str, np.ndarray], file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the items, and the category of each one's last event."""
    items, row = np.unique(events["item"], return_inverse=True)
    category = np.zeros(len(items), np.int64)
    order = np.argsort(events["time"], kind="stable")
    category[row[order]] = events["category"][order]  # the last one stays
    several = np.unique(row[category[row] != events["category"]])
    if several.size:
        logger.warning("%s: %d of %d items have more than one category", file.name, several.size, len(items))
    return items, category
