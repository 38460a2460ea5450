"""The files of one slice: what a peer trains on, the requests, and the answers. Needs NumPy and pyarrow alone.

| file | a row is | columns |
|---|---|---|
| `items.parquet` | a catalogue row; row 0 is no item | `count` (training events), one column for each field, `content` |
| `events.parquet` | a training event, sorted by user and time | `user`, `item`, `action`, `time` |
| `requests.parquet` | a request | `user`, `time`, `position`; `items`, `actions`, `times` of all strictly earlier events |
| `candidates.parquet` | a request | `items`: the different items whose scores GAUC needs, ascending |
| `answers.parquet` | a request | `target`, `negatives`, `mixed_negatives`: for the evaluator, not for a peer |
| `about.json` | | what the slice is |

Items and users are rows of the data set's vocabularies. `position` is the request's event in the log of the data set. Histories
are oldest first.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """One slice: R requests over a catalogue of N rows, row 0 included.

    Attributes:
      about: `format`, `dataset`, `slice`, `repeats` (whether users come back to items), `power` (negatives are drawn by
        count ** power), `untrained_share` (of the targets, and of the mixed negatives), `seed`.
      count: int64 [N] training events.
      fields: name to int32 [N], or [N, n] for several values.
      content: float32 [N, E], or None.
      events: `user`, `item`, `action` int32 [n] and `time` int64 [n], sorted by user and time.
      user: int32 [R].
      time: int64 [R].
      position: int64 [R].
      offsets: int64 [R + 1]; request r has the events `offsets[r]:offsets[r + 1]` of `history`.
      history: `item`, `action` int32 [h] and `time` int64 [h].
      target: int32 [R].
      negatives: int32 [R, n], drawn by count ** power, with repeats.
      mixed_negatives: int32 [R, n], the same with `untrained_share` of them replaced by items without a training event.
    """

    about: dict[str, Any]
    count: np.ndarray
    fields: dict[str, np.ndarray]
    content: np.ndarray | None
    events: dict[str, np.ndarray]
    user: np.ndarray
    time: np.ndarray
    position: np.ndarray
    offsets: np.ndarray
    history: dict[str, np.ndarray]
    target: np.ndarray
    negatives: np.ndarray
    mixed_negatives: np.ndarray

    @property
    def candidates(self) -> list[np.ndarray]:
        """The different items of both lists of each request, ascending."""
        together = np.concatenate([self.target[:, None], self.negatives, self.mixed_negatives], axis=1)
        return [np.unique(row) for row in together]

    def recent(self, length: int) -> np.ndarray:
        """The last items of each request, int32 [R, length], the most recent first, 0 where there is none."""
        return _windows(self.history["item"], self.offsets[:-1], self.offsets[1:], length)

    def samples(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Training events with an earlier event of their user: items int32 [n], and what came before int32 [n, length].

        As `recent`: strictly earlier events only, because any order among ties would let a model look at the answer.
        """
        user, time, item = (self.events[name] for name in ("user", "time", "item"))
        new_user = np.append(True, user[1:] != user[:-1])
        new = new_user | np.append(True, time[1:] != time[:-1])
        places = np.arange(len(user))
        start, end = (np.maximum.accumulate(np.where(first, places, 0)) for first in (new_user, new))
        kept = end > start
        return item[kept], _windows(item, start[kept], end[kept], length)


def write(folder: Path, lists: Lists) -> None:
    """Writes the files into a folder; `about.json` comes last, so that a folder with it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {} if lists.content is None else {"content": lists.content}
    _write(folder / "items.parquet", {"count": lists.count, **lists.fields, **content})
    _write(folder / "events.parquet", lists.events)
    flat = {f"{name}s": _ragged(values, lists.offsets) for name, values in lists.history.items()}
    _write(folder / "requests.parquet", {"user": lists.user, "time": lists.time, **flat, "position": lists.position})
    found = lists.candidates
    offsets = np.cumsum([0, *map(len, found)])
    _write(folder / "candidates.parquet", {"items": _ragged(np.concatenate(found), offsets)})
    answers = {"target": lists.target, "negatives": lists.negatives, "mixed_negatives": lists.mixed_negatives}
    _write(folder / "answers.parquet", answers)
    (folder / "about.json").write_text(json.dumps(lists.about, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Lists:
    """Reads what `write` wrote.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: files of another format.
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder / 'about.json'}: expected format {FORMAT}, got {about.get('format')!r}")
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("items", "events", "requests", "answers")}
    items = {name: _array(tables["items"].column(name)) for name in tables["items"].column_names}
    requests = tables["requests"]
    history = {name: _flat(requests.column(f"{name}s")) for name in ("item", "action", "time")}
    return Lists(
        about=about,
        count=items.pop("count"),
        content=items.pop("content", None),
        fields=items,
        events={name: _array(tables["events"].column(name)) for name in tables["events"].column_names},
        user=_array(requests.column("user")),
        time=_array(requests.column("time")),
        position=_array(requests.column("position")),
        offsets=requests.column("items").combine_chunks().offsets.to_numpy().astype(np.int64),
        history=history,
        **{name: _array(tables["answers"].column(name)) for name in ("target", "negatives", "mixed_negatives")},
    )


def _windows(items: np.ndarray, start: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """The last `length` items of each range, the last one first, 0 where the range is shorter."""
    at = end[:, None] - 1 - np.arange(length)
    return np.where(at >= start[:, None], items[np.maximum(at, 0)], 0).astype(np.int32)


def _write(path: Path, columns: dict[str, Any]) -> None:
    made = {name: _column(values) if isinstance(values, np.ndarray) else values for name, values in columns.items()}
    pq.write_table(pa.table(made), path)


def _column(values: np.ndarray) -> pa.Array:
    """A column of numbers, or of lists of one length for [n, width]."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _ragged(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """A column of lists; 32-bit offsets, as every reader of Parquet knows them."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy()


def _array(column: pa.ChunkedArray) -> np.ndarray:
    whole = column.combine_chunks()
    if pa.types.is_fixed_size_list(whole.type):
        return whole.flatten().to_numpy().reshape(len(whole), whole.type.list_size)
    return whole.to_numpy()
