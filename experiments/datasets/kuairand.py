"""KuaiRand as a `Dataset`.

Data: Gao et al. 2022. KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos. CIKM; under its
terms. Impressions of short videos at Kuaishou with what the user did. CSV with headers, in the versions 1K, 27K and Pure:
log_*.csv, video_features_basic_*.csv, user_features_*.csv.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import Columns, Dataset, Vocabulary
from experiments.datasets.tables import Table, dataset

SIGNALS = ("is_click", "long_view", "is_like", "is_hate", "is_rand")
"""What an impression's action is made of: 1 + is_click + 2 long_view + 4 is_like + 8 is_hate + 16 is_rand; 0 is unknown."""

VIDEO = ("video_type", "upload_type", "music_type")
USER = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author")
OPTIONAL_USER = (
    "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)  # fmt: skip
MAX_TAGS = 4


def read(path: str | os.PathLike) -> Dataset:
    """Read the files of one version of KuaiRand, or excerpts of them.

    What is an event: every impression of the logs; its action holds all of `SIGNALS`, so that the history tells shown from
    clicked from liked. A sample's history is all of the user's strictly earlier impressions (in whole seconds), whatever came
    of them. Impressions with `is_rand` were drawn at random instead of by the recommender.

    | feature | values |
    |---|---|
    | item `item`, `category` (its first tag), `author`, `tags` (bag of up to 4) | videos of the log alone |
    | item `video_type`, `upload_type`, `music_type` | as they are written |
    | item float | log(1 + seconds), 0 where the duration is missing |
    | user `user_active_degree`, `is_lowactive_period`, ... | every known categorical column that the file has |

    `path` is `data/` of the archive.
    """
    folder = Path(path)
    ids = ("user_id", "video_id", "time_ms")
    kinds: dict[str, str] = dict.fromkeys(ids, "integer") | dict.fromkeys(SIGNALS, "text")
    logs = [Table(file, kinds) for file in _files(folder, "log_*.csv")]
    events = {name: np.concatenate([log[name] for log in logs]) for name in ids}
    bits = np.concatenate([[log.words(name, ("0", "1")) for name in SIGNALS] for log in logs], axis=1)
    events["signals"] = 1 + (1 << np.arange(len(SIGNALS))) @ bits
    videos = _records(_files(folder, "video_features_basic_*.csv"), "video_id", events["video_id"], logs, (
        "author_id", "video_duration", "tag", *VIDEO,
    ))  # fmt: skip
    tags = [[int(tag) for tag in text.split(",") if tag] for text in videos["tag"]]
    items = {name: videos[name] for name in ("video_id", *VIDEO)} | {
        "author": [int(author) for author in videos["author_id"]],
        "category": [bag[0] if bag else 0 for bag in tags],
        "tags": tags,
        "log_seconds": np.log1p(np.array([float(text or 0) / 1000 for text in videos["video_duration"]], np.float32)),
    }
    people = _files(folder, "user_features_*.csv")
    with open(people[0], encoding="utf-8-sig") as file:
        header = [name.strip() for name in file.readline().split(",")]
    attributes = (*USER, *(name for name in OPTIONAL_USER if name in header))
    columns = Columns(
        user="user_id", item="video_id", time="time_ms", time_unit="ms", action="signals",
        actions=tuple(range(1, 2 ** len(SIGNALS) + 1)), item_attributes=("author", *VIDEO), item_bags=("tags",),
        bag_length=MAX_TAGS, item_floats=("log_seconds",), behaviour_fields=("author",), user_attributes=attributes,
        scale=False,
    )  # fmt: skip
    users = _records(people, "user_id", events["user_id"], logs, attributes)
    known = dict.fromkeys(("category", "tags"), Vocabulary([tag for bag in tags for tag in bag]))
    return dataset(folder.name, events=events, items=items, users=users, columns=columns, vocabularies=known)


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        here = sorted(file.name for file in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: expected files {pattern}, got {here}")
    return found


def _records(paths: list[Path], key: str, wanted: np.ndarray, logs: list[Table], columns: tuple[str, ...]) -> dict[str, Any]:
    """Return columns of text of the users or videos of the log; every one of them must be there once."""
    parts: dict[str, list[str]] = {name: [] for name in columns}
    ids: list[int] = []
    for path in paths:
        table = Table(path, {key: "integer"} | dict.fromkeys(columns, "text"))
        table.expect(~np.isin(table[key], ids), key, "every id once")
        table.expect_once(key)
        kept = np.flatnonzero(np.isin(table[key], wanted))
        ids += table[key][kept].tolist()
        for name, (pattern, expected) in NUMBERS.items():
            if name in columns:
                table.expect(np.array([bool(re.fullmatch(pattern, text)) for text in table[name]]), name, expected)
        for name in columns:
            parts[name] += table[name][kept].tolist()
    for log in logs:
        log.expect(np.isin(log[key], ids), key, f"one that {paths[0].name} has")
    return {key: np.array(ids, np.int64)} | parts


NUMBERS = {
    "author_id": (r"\d+", "a whole number"),
    "tag": (r"(\d+(,\d+)*)?", "whole numbers, or nothing"),
    "video_duration": (r"(\d+(\.\d*)?)?", "a number of 0 or more, or nothing"),
}
