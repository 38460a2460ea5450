"""Score files: what a model says of the requests, in Parquet. Needs NumPy and pyarrow alone.

| file | columns | what it answers |
|---|---|---|
| `NAME.catalogue.parquet` | `request`, `scores`: a list of one number for each catalogue row, the first ignored | everything |
| `NAME.candidates.parquet` | `request`, `item`, `score` of every item of `candidates.parquet` | GAUC |
| `NAME.top.parquet` | `request`, `item`, `score` of the best items of each request, in any order | HR@k as asked |
| `NAME.json` | optional: `sampler_power`, and what else is to be told, such as `settings`, `seed`, `versions` | |

A higher score is better, and a user's requests are compared with each other too. Requests are numbered from 0 in the order of
`requests.parquet`; every request is there. `sampler_power` p says that scores are logarithms of a likelihood over count ** p:
0.75 for training against negatives like those of the lists, 1 for negatives from the batch, 0 for a softmax over the whole
catalogue, uniform negatives, or a corrected loss. What an item's popularity must be counted with then follows from the
question, see `outcomes`. Without it scores are taken as they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KINDS = ("catalogue", "candidates", "top")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Scores of (request, item) pairs, sorted by request and item."""

    request: np.ndarray  # int64 [n]
    item: np.ndarray  # int64 [n]
    score: np.ndarray  # float64 [n]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What there is of one model.

    Attributes:
      name: of the model.
      catalogue: float32 [R, N], or None.
      candidates, top: pairs, or None.
      about: what `NAME.json` says, {} without one.
    """

    name: str
    catalogue: np.ndarray | None = None
    candidates: Pairs | None = None
    top: Pairs | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sampler_power(self) -> float | None:
        """The exponent p of count in the likelihood that the scores are logarithms of; None where they are no logarithms."""
        return self.about.get("sampler_power")


def write_catalogue(folder: Path, name: str, scores: np.ndarray, about: dict[str, Any] | None = None) -> Path:
    """Writes the scores [R, N] of every catalogue row as float32 and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(scores, np.float32).reshape(-1)), scores.shape[1])
    path = folder / f"{name}.catalogue.parquet"
    _write(path, pa.table({"request": np.arange(len(scores), dtype=np.int32), "scores": lists}))
    return _with_about(path, name, about)


def write_pairs(
    folder: Path, name: str, kind: str, request: Any, item: Any, score: Any, about: dict[str, Any] | None = None
) -> Path:
    """Writes scores of pairs, all [n]; `kind` is "candidates" or "top"."""
    if kind not in KINDS[1:]:
        raise ValueError(f"kind: expected one of {KINDS[1:]}, got {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"request": np.asarray(request, np.int32), "item": np.asarray(item, np.int32), "score": np.asarray(score)}
    path = folder / f"{name}.{kind}.parquet"
    _write(path, pa.table(columns))
    return _with_about(path, name, about)


def names(folder: Path) -> list[str]:
    """The models that have a score file in a folder, sorted."""
    found = {path.name.removesuffix(f".{kind}.parquet") for kind in KINDS for path in folder.glob(f"*.{kind}.parquet")}
    return sorted(found)


def read(folder: Path, name: str, *, requests: int, items: int) -> Scores:
    """Reads every score file of a model.

    Args:
      folder: where they are.
      name: of the model.
      requests: R.
      items: N, catalogue rows, row 0 included.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file that lacks a column, a request or an entry, has one twice, or NaN: names the file.
    """
    files = {kind: folder / f"{name}.{kind}.parquet" for kind in KINDS}
    there = {kind: path for kind, path in files.items() if path.exists()}
    if not there:
        raise FileNotFoundError(f"{folder}: expected a score file of {name!r}, such as {files['catalogue'].name}; got none")
    parts: dict[str, Any] = {}
    for kind, path in there.items():
        parts[kind] = _catalogue(path, requests, items) if kind == "catalogue" else _pairs(path, requests, items)
    about = folder / f"{name}.json"
    if about.exists():
        parts["about"] = told = json.loads(about.read_text(encoding="utf-8"))
        power = told.get("sampler_power")
        if power is not None and (isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power <= 1):
            raise ValueError(f"{about}: expected sampler_power in [0, 1] or none, got {power!r}")
    return Scores(name=name, **parts)


def _write(path: Path, table: pa.Table) -> None:
    """Complete, or not there under its name."""
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def _with_about(path: Path, name: str, about: dict[str, Any] | None) -> Path:
    if about is not None:
        (path.parent / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return path


def _catalogue(path: Path, requests: int, items: int) -> np.ndarray:
    table = _table(path, ("request", "scores"))
    scores = table.column("scores").combine_chunks()
    lengths = np.unique(scores.value_lengths().to_numpy(zero_copy_only=False))
    if lengths.tolist() != [items]:
        raise ValueError(f"{path}: expected {items} scores a request, one for each catalogue row, got {lengths.tolist()}")
    request = _integers(path, table, "request", requests)
    if len(request) != requests or len(np.unique(request)) != requests:
        raise ValueError(f"{path}: expected each of {requests} requests once, got {len(request)} rows")
    values = scores.flatten().to_numpy(zero_copy_only=False).reshape(requests, items).astype(np.float32, copy=False)
    _refuse_nan(path, values[:, 1:])
    return values if (request == np.arange(requests)).all() else values[np.argsort(request)]


def _pairs(path: Path, requests: int, items: int) -> Pairs:
    table = _table(path, ("request", "item", "score"))
    request, item = _integers(path, table, "request", requests), _integers(path, table, "item", items)
    score = table.column("score").to_numpy().astype(np.float64)
    _refuse_nan(path, score)
    missing = requests - len(np.unique(request))
    if missing:
        raise ValueError(f"{path}: expected scores of each of {requests} requests, got none of {missing}")
    key = request * items + item
    order = np.argsort(key, kind="stable")
    twice = np.flatnonzero(np.diff(key[order]) == 0)
    if len(twice):
        at = order[twice[0]]
        raise ValueError(f"{path}: expected each pair once, got request {request[at]} and item {item[at]} twice")
    return Pairs(request=request[order], item=item[order], score=score[order])


def _table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    table = pq.read_table(path)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected the columns {list(columns)}, got {table.column_names}")
    return table


def _integers(path: Path, table: pa.Table, name: str, size: int) -> np.ndarray:
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{path}: expected integers in column {name!r}, got {column.type} with {column.null_count} nulls")
    values = column.to_numpy().astype(np.int64)
    if len(values) and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"{path}: expected {name} in [0, {size}), got {values.min()} to {values.max()}")
    return values


def _refuse_nan(path: Path, values: np.ndarray) -> None:
    wrong = int(np.isnan(values).sum())
    if wrong:
        raise ValueError(f"{path}: expected no NaN among the scores, got {wrong}")
