"""KuaiRand as a `Dataset`.

Data: Gao et al. 2022. KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos. CIKM; under its
terms. Impressions of short videos at Kuaishou with what the user did. CSV with headers, in the versions 1K, 27K and Pure:
log_*.csv, video_features_basic_*.csv, user_features_*.csv.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from aif_jax.data.catalogue import Catalogue
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.text_table import DataError, Kind, number_blocks, text_rows, whole_number

SIGNALS = ("is_click", "long_view", "is_like", "is_hate", "is_rand")
"""What an impression's action is made of: 1 + is_click + 2 long_view + 4 is_like + 8 is_hate + 16 is_rand; 0 is unknown."""

VIDEO = ("video_id", "author_id", "video_type", "upload_type", "video_duration", "music_type", "tag")
USER = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author")
OPTIONAL_USER = (
    "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)  # fmt: skip
MAX_TAGS = 4


def read(path: str | os.PathLike, *, exposure: Literal["all", "standard", "random"] = "all", user_id: bool = False) -> Dataset:
    """Reads the files of one version of KuaiRand, or excerpts of them.

    What is an event: every impression of the logs; its action holds all of `SIGNALS`, so that the history tells shown from
    clicked from liked. The label of a sample is one of the signals: `labels(dataset, positions, "is_click")`. A sample's
    history is all of the user's strictly earlier impressions (in whole seconds), whatever came of them.

    Impressions with `is_rand` were drawn at random instead of by the recommender: they make an unbiased test set, the
    positions where `labels(dataset, positions, "is_rand")` is 1. `exposure` leaves out the ones or the others, from the
    histories too.

    | feature | values |
    |---|---|
    | item `item`, `category` (its first tag), `author`, `tags` (bag of up to 4) | videos of the log alone |
    | item `video_type`, `upload_type`, `music_type` | as they are written |
    | item float | log(1 + seconds), 0 where the duration is missing |
    | user `user_active_degree`, `is_lowactive_period`, ... | every known categorical column that the file has |
    | user `user` | the user's row, with `user_id` |

    The video features of 27K are 32 million lines of text, which are held in memory while they are read.

    Args:
      path: the folder with the files; `data/` of the archive.
      exposure: which impressions.
      user_id: adds the user's own row as a user attribute.

    Returns:
      The data set; rows follow the ascending raw ids.

    Raises:
      DataError: a file is missing or malformed: names file, line, what was expected and what came.
      ValueError: wrong option.
    """
    if exposure not in ("all", "standard", "random"):
        raise ValueError(f"exposure: expected 'all', 'standard' or 'random', got {exposure!r}")
    folder = Path(path)
    events, origin = _logs(folder, exposure)
    users, items = Vocabulary(events["user"]), Vocabulary(events["item"])
    videos = _videos(_files(folder, "video_features_basic_*.csv"), items)
    _expect_known(events["item"], items, videos["seen"], origin, "video_id", "video_features_basic")
    profile, profile_seen = _profile(_files(folder, "user_features_*.csv"), users)
    _expect_known(events["user"], users, profile_seen, origin, "user_id", "user_features")
    tags = Vocabulary([tag for bag in videos["tags"] for tag in bag])
    bags = np.zeros((len(items) - 1, MAX_TAGS), np.int32)
    for row, bag in enumerate(videos["tags"]):
        bags[row, : len(bag[:MAX_TAGS])] = tags.encode(np.array(bag[:MAX_TAGS], np.int64))
    texts = {name: Vocabulary(np.array(videos[name], str)) for name in ("video_type", "upload_type", "music_type")}
    authors = Vocabulary(videos["author"])
    people = {name: Vocabulary(np.array([value for value in values if value], str)) for name, values in profile.items()}
    schema = Schema(
        item_attributes=(
            Attribute(name="item", size=len(items)),
            Attribute(name="category", size=max(len(tags), 2)),
            Attribute(name="author", size=len(authors)),
            Attribute(name="tags", size=max(len(tags), 2), length=MAX_TAGS),
            *(Attribute(name=name, size=len(vocabulary)) for name, vocabulary in texts.items()),
        ),
        user_attributes=(
            *((Attribute(name="user", size=len(users)),) if user_id else ()),
            *(Attribute(name=name, size=max(len(vocabulary), 2)) for name, vocabulary in people.items()),
        ),
        behaviour_fields=("item", "category", "author"),
        actions=2 ** len(SIGNALS) + 1,
        item_floats=1,
    )
    ids = {"category": bags[:, 0], "tags": bags, "author": authors.encode(videos["author"])}
    ids |= {name: vocabulary.encode(np.array(videos[name], str)) for name, vocabulary in texts.items()}
    user_ids = {"user": np.arange(len(users), dtype=np.int32)} if user_id else {}
    user_ids |= {name: np.append(0, v.encode(np.array(profile[name], str))).astype(np.int32) for name, v in people.items()}
    return Dataset(
        name=folder.name,
        schema=schema,
        log=EventLog.from_arrays(
            user=users.encode(events["user"]),
            item=items.encode(events["item"]),
            action=events["action"],
            time=events["time"],
            users=len(users),
        ),
        catalogue=Catalogue.from_items(schema, items.raw, ids=ids, floats=np.log1p(videos["seconds"])[:, None]),
        user_ids=user_ids,
        user_floats=np.zeros((len(users), 0), np.float32),
        users=users,
        items=items,
    )


def labels(dataset: Dataset, positions: np.ndarray, signal: str = "is_click") -> np.ndarray:
    """Whether the impressions at some positions of the log had a signal.

    Args:
      dataset: that `read` gave.
      positions: int [n].
      signal: one of `SIGNALS`.

    Returns:
      float32 [n].

    Example:
      >>> log = EventLog.from_arrays(user=[1, 1], item=[1, 1], action=[1, 6], time=[1, 2])
      >>> labels(type("D", (), {"log": log}), np.array([0, 1]), "is_like").tolist()
      [0.0, 1.0]
    """
    if signal not in SIGNALS:
        raise ValueError(f"signal: expected one of {', '.join(SIGNALS)}, got {signal!r}")
    return ((dataset.log.action[positions] - 1) >> SIGNALS.index(signal) & 1).astype(np.float32)


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        here = sorted(file.name for file in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise DataError(folder, None, f"files {pattern}", f"{here}")
    return found


def _logs(folder: Path, exposure: str) -> tuple[dict[str, np.ndarray], list[tuple[Path, int, np.ndarray]]]:
    """The events in the order of the files; and for each block its file, its first line, and which of its rows were kept."""
    flag = ("0", "1")
    columns: dict[str, Kind] = {"user_id": "id", "video_id": "id", "time_ms": "id"}
    columns |= dict.fromkeys(SIGNALS, flag)
    parts: dict[str, list[np.ndarray]] = {"user": [], "item": [], "action": [], "time": []}
    origin = []
    for path in _files(folder, "log_*.csv"):
        for first, block in number_blocks(path, columns, header=True):
            kept = np.flatnonzero((exposure == "all") | (block["is_rand"] == (exposure == "random")))
            action = 1 + np.sum([block[name] << bit for bit, name in enumerate(SIGNALS)], axis=0)
            for name, values in zip(
                parts, (block["user_id"], block["video_id"], action, block["time_ms"] // 1000), strict=True
            ):
                parts[name].append(values[kept])
            origin.append((path, first, kept))
    events = {name: np.concatenate(values) for name, values in parts.items()}
    if not len(events["time"]):
        raise DataError(folder, None, f"impressions with exposure={exposure!r}", "none")
    return events, origin


def _videos(paths: list[Path], items: Vocabulary) -> dict:
    """Features of the videos of the log, [N - 1] each, and which were there."""
    count = len(items) - 1
    table = {
        "seen": np.zeros(count, bool),
        "author": np.zeros(count, np.int64),
        "seconds": np.zeros(count),
        "tags": [()] * count,
        "video_type": [""] * count,
        "upload_type": [""] * count,
        "music_type": [""] * count,
    }
    for path, line, (video, author, kind, upload, duration, music, tag) in _rows(paths, VIDEO):
        raw = whole_number(path, line, "video_id", video)
        row = int(items.encode([raw])[0]) - 1
        if row < 0:
            continue
        if table["seen"][row]:
            raise DataError(path, line, "each video_id once", f"{raw} again")
        table["seen"][row] = True
        table["author"][row] = whole_number(path, line, "author_id", author)
        table["seconds"][row] = _seconds(path, line, duration)
        table["tags"][row] = tuple(whole_number(path, line, "tag", one) for one in tag.split(",") if tag)
        table["video_type"][row], table["upload_type"][row], table["music_type"][row] = kind, upload, music
    return table


def _profile(paths: list[Path], users: Vocabulary) -> tuple[dict[str, list[str]], np.ndarray]:
    """The categorical columns of the users of the log, [U - 1] each, and which users were there."""
    with open(paths[0], encoding="utf-8-sig") as file:
        header = [name.strip() for name in file.readline().split(",")]
    columns = (*USER, *(name for name in OPTIONAL_USER if name in header))
    values = {name: [""] * (len(users) - 1) for name in columns}
    seen = np.zeros(len(users) - 1, bool)
    for path, line, (user, *row) in _rows(paths, ("user_id", *columns)):
        at = int(users.encode([whole_number(path, line, "user_id", user)])[0]) - 1
        if at < 0:
            continue
        if seen[at]:
            raise DataError(path, line, "each user_id once", f"{user} again")
        seen[at] = True
        for name, value in zip(columns, row, strict=True):
            values[name][at] = value
    return values, seen


def _rows(paths: list[Path], columns: tuple[str, ...]) -> Iterator[tuple[Path, int, list[str]]]:
    for path in paths:
        for line, row in text_rows(path, columns, header=True, quoted=True):
            yield path, line, row


def _seconds(path: Path, line: int, text: str) -> float:
    if not text:
        return 0.0
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = -1.0
    if not 0 <= milliseconds < np.inf:
        raise DataError(path, line, "video_duration to be a number of 0 or more, or nothing", repr(text))
    return milliseconds / 1000


def _expect_known(
    raw: np.ndarray, vocabulary: Vocabulary, seen: np.ndarray, origin: list[tuple[Path, int, np.ndarray]], name: str, file: str
) -> None:
    """Raises DataError with the line of the first event whose user or video has no features."""
    if seen.all():
        return
    first_event = int(np.flatnonzero(~seen[vocabulary.encode(raw) - 1])[0])
    start = 0
    for path, first_line, kept in origin:
        if first_event < start + len(kept):
            line = first_line + int(kept[first_event - start])
            raise DataError(path, line, f"a {name} that {file}_*.csv has", str(raw[first_event]))
        start += len(kept)
