"""Yambda (Yandex Music, 2025, Apache-2.0, arXiv 2505.22238) as a `Dataset`: listens with the benchmark's split by time.

Files, Parquet, as published: `flat/50m/listens.parquet` (and 500m, 5b) with uid, item_id, timestamp (seconds from an unknown
origin, in steps of 5), is_organic, played_ratio_pct; `artist_item_mapping.parquet` with artist_id, item_id.

Tested on small files made to this layout (`write`), not on the full data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import Columns, Dataset
from aif_jax.readers.tables import pyarrow

PLAYED = 50  # per cent of a track: from here on it is a listen that counts, "Listen+"
DAY, GAP = 86_400, 1_800  # seconds
TEST = 26_000_000 - DAY
"""The moment when the test day begins; what is within GAP before it is in neither part."""
ACTIONS = ("recommended", "organic")
COLUMNS = Columns(user="uid", item="item_id", time="timestamp", action="action", actions=ACTIONS, category="artist_id")
LISTENS = {"uid": "int64", "item_id": "int64", "timestamp": "int64", "is_organic": "int64", "played_ratio_pct": "double"}


class Listens(NamedTuple):
    """What the benchmark trains and judges on."""

    dataset: Dataset  # listens that count, without those in the gap, of users with a listen before it
    test: int  # the moment when the test slice begins


def read(folder: str | Path, *, size: str = "50m", test: int = TEST) -> Listens:
    """Read listens of at least half a track. An item without an artist has the artist -1; of several the lowest counts.

    Args:
      folder: with `flat/` and `artist_item_mapping.parquet`.
      size: "50m", "500m" or "5b", the folder in `flat/`. 50m takes about 4 GB of memory.
      test: the moment when the test day begins.
    """
    folder, arrow = Path(folder), pyarrow()
    table = _table(folder / "flat" / size / "listens.parquet", LISTENS)
    user, item, time = (table[name].to_numpy() for name in ("uid", "item_id", "timestamp"))
    counted = table["played_ratio_pct"].to_numpy() >= PLAYED
    before = counted & (time < test - GAP)
    kept = before | (counted & (time >= test) & np.isin(user, np.unique(user[before])))
    if not before.any() or not (kept & ~before).any():
        wanted = f"listens of at least {PLAYED} % before {test - GAP} and of the same users from {test} on"
        raise ValueError(f"{folder}: expected {wanted}, got {before.sum()} and {(kept & ~before).sum()}")
    codes = (table["is_organic"].to_numpy()[kept] > 0).astype(np.int32)
    events = {"uid": user[kept], "item_id": item[kept], "timestamp": time[kept],
              "action": arrow.DictionaryArray.from_arrays(arrow.array(codes), arrow.array(ACTIONS))}  # fmt: skip
    items = np.unique(events["item_id"])
    artists = _artists(folder / "artist_item_mapping.parquet", items)
    known = {"item_id": items, "artist_id": artists}
    made = aif.read(arrow.table(events), items=known, columns=COLUMNS, name=f"yambda-{size}", repeats=True)
    return Listens(made, test)


def _table(path: Path, columns: dict[str, str]) -> Any:
    """Return columns of a Parquet file, each of the type that is asked for and none missing a value."""
    arrow, parquet, compute = pyarrow(), pyarrow("pyarrow.parquet"), pyarrow("pyarrow.compute")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of Yambda, got none. It is published as the data set yandex/yambda")
    found = parquet.read_schema(path).names
    lacking = [name for name in columns if name not in found]
    if lacking:
        raise ValueError(f"{path}: expected columns {lacking}, got {found}")
    table = parquet.read_table(path, columns=list(columns))
    for place, (name, kind) in enumerate(columns.items()):
        try:
            column = compute.cast(table[name], getattr(arrow, {"double": "float64"}.get(kind, kind))())
        except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
            raise ValueError(f"{path}, column {name!r}: expected {kind}, got {table[name].type}: {error}") from error
        if column.null_count:
            raise ValueError(f"{path}, column {name!r}: expected no missing value, got {column.null_count}")
        table = table.set_column(place, name, column)
    return table


def _artists(path: Path, items: np.ndarray) -> np.ndarray:
    """Return the lowest artist of each item int64 [N] (ascending), -1 for none."""
    table = _table(path, {"item_id": "int64", "artist_id": "int64"})
    item, artist = table["item_id"].to_numpy(), table["artist_id"].to_numpy()
    known = np.isin(item, items)
    places, made = np.searchsorted(items, item[known]), np.full(len(items), np.iinfo(np.int64).max)
    np.minimum.at(made, places, artist[known])
    return np.where(made == np.iinfo(np.int64).max, -1, made)


def write(folder: str | Path, listens: dict[str, np.ndarray], artists: dict[str, np.ndarray], *, size: str = "50m") -> None:
    """Write arrays [n] by column of `listens.parquet`, and `item_id` and `artist_id` [m]: for tests and the smoke form."""
    arrow, parquet, folder = pyarrow(), pyarrow("pyarrow.parquet"), Path(folder)
    (folder / "flat" / size).mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(listens), folder / "flat" / size / "listens.parquet")
    parquet.write_table(arrow.table(artists), folder / "artist_item_mapping.parquet")
