"""The files of one slice: what a peer trains on, and the requests that it scores; README.md here has their columns.

Needs NumPy and pyarrow alone. Items and users are rows of the data set's vocabularies. Histories are oldest first. `candidates`
are a request's sampled items in ascending order, the event's own among them; `whole` tells the requests that rank the whole
catalogue.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """One slice: R requests over a catalogue of N rows, row 0 included.

    Attributes:
      about: `format`, `dataset`, `slice`, `repeats` (whether users come back to items), `power` (candidates are drawn by
        count ** power).
      count: int64 [N] training events.
      fields: name to int32 [N], or [N, n] for several values.
      content: float32 [N, E], or None.
      events: `user`, `item`, `action` int32 [n] and `time` int64 [n], sorted by user and time.
      user: int32 [R].
      time: int64 [R].
      offsets: int64 [R + 1]; request r has the events `offsets[r]:offsets[r + 1]` of `history`.
      history: `item`, `action` int32 [h] and `time` int64 [h].
      candidates: int32 [R, C], ascending in each row.
      whole: bool [R], requests that rank the whole catalogue.
    """

    about: dict[str, Any]
    count: np.ndarray
    fields: dict[str, np.ndarray]
    content: np.ndarray | None
    events: dict[str, np.ndarray]
    user: np.ndarray
    time: np.ndarray
    offsets: np.ndarray
    history: dict[str, np.ndarray]
    candidates: np.ndarray
    whole: np.ndarray

    def recent(self, length: int) -> np.ndarray:
        """Return the last items of each request, int32 [R, length], the most recent first, 0 where there is none."""
        return _windows(self.history["item"], self.offsets[:-1], self.offsets[1:], length)


def write(folder: Path, lists: Lists) -> None:
    """Write the files into a folder; `about.json` comes last, so that a folder with it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {} if lists.content is None else {"content": lists.content}
    _write(folder / "items.parquet", {"count": lists.count, **lists.fields, **content})
    _write(folder / "events.parquet", lists.events)
    offsets = pa.array(lists.offsets.astype(np.int32))  # 32 bits, as every reader of Parquet knows them
    flat = {f"{name}s": pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.history.items()}
    rest = {"candidates": lists.candidates, "whole": lists.whole}
    _write(folder / "requests.parquet", {"user": lists.user, "time": lists.time, **flat, **rest})
    (folder / "about.json").write_text(json.dumps(lists.about, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Lists:
    """Read what `write` wrote.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: files of another format.
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        wanted = f"expected format {FORMAT}, got {about.get('format')!r}; remove the folder, and the command writes it"
        raise ValueError(f"{folder / 'about.json'}: {wanted}")
    items, events, requests = (pq.read_table(folder / f"{name}.parquet") for name in ("items", "events", "requests"))
    columns = {name: _array(items.column(name)) for name in items.column_names}
    history = {name: requests.column(f"{name}s").combine_chunks().flatten().to_numpy() for name in ("item", "action", "time")}
    return Lists(
        about=about,
        count=columns.pop("count"),
        content=columns.pop("content", None),
        fields=columns,
        events={name: _array(events.column(name)) for name in events.column_names},
        offsets=requests.column("items").combine_chunks().offsets.to_numpy().astype(np.int64),
        history=history,
        **{name: _array(requests.column(name)) for name in ("user", "time", "candidates", "whole")},
    )


def _windows(items: np.ndarray, start: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """Return the last `length` items of each range, the last one first, 0 where the range is shorter."""
    at = end[:, None] - 1 - np.arange(length)
    return np.where(at >= start[:, None], items[np.maximum(at, 0)], 0).astype(np.int32)


def _write(path: Path, columns: dict[str, Any]) -> None:
    made = {name: rows_of(values) if isinstance(values, np.ndarray) else values for name, values in columns.items()}
    pq.write_table(pa.table(made), path)


def rows_of(values: np.ndarray) -> pa.Array:
    """Return a column of numbers, or of lists of one length for [n, width]."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _array(column: pa.ChunkedArray) -> np.ndarray:
    whole = column.combine_chunks()
    if pa.types.is_fixed_size_list(whole.type):
        return whole.flatten().to_numpy().reshape(len(whole), whole.type.list_size)
    return whole.to_numpy(zero_copy_only=False)
