"""RecFlow (Kuaishou, ICLR 2025, CC BY-SA 4.0): the public data set with every stage of a cascade.

Files, Arrow in Feather format, one for each day: `realshow/DAY.feather` has the exposures, `all_stage/DAY.feather` what every
stage saw. The event log is made of the exposures, with whether the view was effective as the action; histories are what is
strictly earlier. The sequences that come as pickles are not read: nothing here unpickles anything.

A line of `all_stage` is "exposed" where `realshow` is 1, "ranked" where a flag of ranking or re-ranking is, "pre_ranked" with
`coarse_neg`, "retrieved" with `prerank_neg`. The ranker's score is minus `rank_index`, where the line was ranked: the order is
what counts. Labels are known where shown.

Tested on small files made to this layout, not on the full data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import Columns, Dataset
from aif_jax.data.cascade import STAGES, from_columns
from aif_jax.readers.tables import pyarrow
from experiments.datasets.tables import dataset

RANKED = ("rerank_pos", "rerank_neg", "rank_pos", "rank_neg")
FEEDBACK = ("effective_view", "long_view", "like", "follow", "forward", "comment")
ITEM = ("author_id", "category_level_one", "category_level_two", "upload_type", "duration")
USER = ("age", "gender", "province")
KEY = ("user_id", "video_id", "request_timestamp")
SEEN, EFFECTIVE = "seen", "effective"
SHOWN = (*KEY, *ITEM, *USER, "effective_view")
STAGED = (*KEY, *ITEM, "realshow", *RANKED, "coarse_neg", "prerank_neg", "rank_index", *FEEDBACK)
"""Columns that are read of `realshow` and of `all_stage`."""
COLUMNS = Columns(
    user="user_id", item="video_id", time="time", action="action", actions=(SEEN, EFFECTIVE), category="category_level_one",
    item_attributes=("author_id", "category_level_two", "upload_type"), item_floats=("duration",),
    user_attributes=USER,
)  # fmt: skip


def recflow(folder: str | Path, *, candidates: int = 1024) -> Dataset:
    """Read exposures as events, and the cascade of requests of so many candidates, with FEEDBACK and `ranker` as labels."""
    folder = Path(folder)
    names = sorted(file.stem for file in (folder / "realshow").glob("*.feather"))
    if not names:
        raise FileNotFoundError(f"{folder}: expected files realshow/DAY.feather, got none")
    shown, stages = _day(folder, "realshow", names, SHOWN), _day(folder, "all_stage", names, STAGED)
    events = {
        "user_id": shown["user_id"],
        "video_id": shown["video_id"],
        "time": shown["request_timestamp"] // 1000,
        "action": np.where(shown["effective_view"] > 0, EFFECTIVE, SEEN),
    }
    both = {name: np.concatenate([stages[name], shown[name]]) for name in ("video_id", *ITEM)}
    items, users = _last(both, "video_id"), _last({name: shown[name] for name in ("user_id", *USER)}, "user_id")
    items["duration"] = items["duration"].astype(np.float64)
    data = dataset("recflow", events=events, items=items, users=users, columns=COLUMNS, vocabularies={})
    return dataclasses.replace(data, cascade=_cascade(stages, data, candidates))


def _cascade(table: Mapping[str, np.ndarray], data: Dataset, candidates: int) -> Any:
    flags = [table["realshow"] > 0, np.any([table[name] > 0 for name in RANKED], axis=0)]
    flags += [table["coarse_neg"] > 0, table["prerank_neg"] > 0]
    none = ~np.any(flags, axis=0)
    if none.any():
        raise ValueError(f"all_stage: expected a stage in every line, got none in line {int(np.argmax(none))} of those read")
    stage = np.argmax(flags, axis=0)
    seconds = table["request_timestamp"] // 1000
    # Two requests of a second are one: of an item that comes twice the line of the furthest stage counts.
    key = np.stack([table["user_id"], seconds, table["video_id"]])
    order = np.lexsort((stage, *key[::-1]))
    order = order[np.append(True, (np.diff(key[:, order]) != 0).any(0))[: len(order)]]
    shown, ranked = stage == STAGES.index("exposed"), flags[1]
    labels = {name: np.where(shown, table[name] > 0, np.nan) for name in FEEDBACK}
    labels["ranker"] = np.where(ranked, -table["rank_index"].astype(np.float64), np.nan)
    made, *_ = from_columns(
        data.log,
        user=data.users.encode(table["user_id"])[order],
        time=seconds[order],
        rows=data.items.encode(table["video_id"])[order],
        stage=stage[order],
        labels={name: values[order] for name, values in labels.items()},
        candidates=candidates,
    )
    return made


def _day(folder: Path, kind: str, names: Sequence[str], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Return columns int64 [n] of some days."""
    arrow, feather = pyarrow(), pyarrow("pyarrow.feather")
    parts: list[Any] = []
    for name in names:
        path = folder / kind / f"{name}.feather"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a file of RecFlow, got none")
        table = feather.read_table(path, columns=None, memory_map=True)
        lacking = [column for column in columns if column not in table.column_names]
        if lacking:
            raise ValueError(f"{path}: expected columns {lacking}, got {table.column_names}")
        parts.append(table.select(list(columns)))
    whole = arrow.concat_tables(parts)
    for column in columns:
        kept = whole.column(column)
        good = (arrow.types.is_integer(kept.type) or arrow.types.is_floating(kept.type)) and not kept.null_count
        if not good:
            raise ValueError(f"{folder / kind}: expected numbers in {column!r}, none missing, got {kept.type}")
    return {column: whole.column(column).to_numpy().astype(np.int64) for column in columns}


def _last(table: Mapping[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    """Return one line for each id: the last one."""
    backwards = table[key][::-1]
    ids, first = np.unique(backwards, return_index=True)
    return {name: values[::-1][first] for name, values in table.items()} | {key: ids}
