"""Score files: what a model gives the requests, in Parquet; README.md here has their columns. Needs NumPy and pyarrow alone.

A higher score is better, and a user's requests are compared with each other too. Requests are numbered from 0 in the order of
`requests.parquet`. `NAME.json` is optional: `logits` (default false) says that scores are logarithms of a likelihood up to a
constant, so that popularity is added to them and not multiplied; `powers` how much of it, see `judge`; `seed`, `settings` and
others are kept in the record.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.peers.lists import Lists, rows_of

KINDS = ("candidates", "catalogue")
BLOCK = 200  # requests whose whole catalogue is scored at a time
Scorer = Callable[[np.ndarray], np.ndarray]
"""`scorer(requests)`: float32 [b, N], the scores of the catalogue for some requests."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What there is of one model.

    Attributes:
      name: of the model.
      candidates: float32 [R, C] of the candidates, in their order.
      catalogue: float32 [W, N] for each request that ranks the whole catalogue, or None.
      about: what `NAME.json` says, {} without one.
    """

    name: str
    candidates: np.ndarray
    catalogue: np.ndarray | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def logits(self) -> bool:
        """Whether the scores are logarithms of a likelihood up to a constant."""
        return self.about.get("logits", False)


def write(folder: Path, name: str, lists: Lists, scorer: Scorer, about: dict[str, Any] | None = None) -> None:
    """Write both files of a model that scores a whole catalogue."""
    candidates, catalogue = [], []
    for start in range(0, len(lists.user), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(lists.user)))
        every = np.asarray(scorer(places), np.float32)
        candidates.append(np.take_along_axis(every, lists.candidates[places].astype(np.int64), 1))
        catalogue.append(every[lists.whole[places]])
    write_file(folder, name, "catalogue", np.flatnonzero(lists.whole), np.concatenate(catalogue))
    write_candidates(folder, name, np.concatenate(candidates), about)


def write_candidates(folder: Path, name: str, values: np.ndarray, about: dict[str, Any] | None = None) -> None:
    """Write the file of candidates alone, score [R, C] in their order: of a model for which a catalogue is too dear."""
    write_file(folder, name, "candidates", np.arange(len(values)), values)
    if about is not None:
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_file(folder: Path, name: str, kind: str, requests: np.ndarray, values: np.ndarray) -> None:
    """Write a file of scores [n, width] of some requests: complete, or not there under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{kind}.parquet"
    partial = path.with_suffix(".partial")
    table = pa.table({"request": requests.astype(np.int32), "scores": rows_of(np.asarray(values, np.float32))})
    pq.write_table(table, partial, compression="none")
    os.replace(partial, path)


def names(folder: Path) -> list[str]:
    """Return the models that have a score file in a folder, sorted."""
    return sorted(path.name.removesuffix(".candidates.parquet") for path in folder.glob("*.candidates.parquet"))


def read(folder: Path, name: str, lists: Lists) -> Scores:
    """Read the score files of a model.

    Raises:
      FileNotFoundError: there is none of the candidates.
      ValueError: a file that lacks a column, a request or an entry, has one twice, or NaN: names the file.
    """
    candidates, catalogue = (folder / f"{name}.{kind}.parquet" for kind in KINDS)
    if not candidates.exists():
        raise FileNotFoundError(f"{candidates}: expected the scores of {name!r}, got no such file")
    about = folder / f"{name}.json"
    told = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    if not isinstance(told.get("logits", False), bool):
        raise ValueError(f"{about}: expected logits to be true or false, got {told['logits']!r}")
    every = np.arange(len(lists.user))
    found = _read(catalogue, every[lists.whole], len(lists.count), ignored=1) if catalogue.exists() else None
    return Scores(name=name, candidates=_read(candidates, every, lists.candidates.shape[1]), catalogue=found, about=told)


def _read(path: Path, wanted: np.ndarray, width: int, *, ignored: int = 0) -> np.ndarray:
    """Return float32 [len(wanted), width], in the order of `wanted`, of which each request is there once."""
    table = pq.read_table(path)
    if not {"request", "scores"} <= set(table.column_names):
        raise ValueError(f"{path}: expected the columns ['request', 'scores'], got {table.column_names}")
    column = table.column("request")
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{path}: expected integers in column 'request', got {column.type} with {column.null_count} nulls")
    request, scores = column.to_numpy(), table.column("scores").combine_chunks()
    order = np.argsort(request, kind="stable")
    if not np.array_equal(request[order], wanted):
        text = f"each of {len(wanted)} requests once, from {wanted[0]} to {wanted[-1]}"
        got = f"{len(np.unique(request))} requests, of which {np.isin(request, wanted).sum()} are wanted"
        raise ValueError(f"{path}: expected {text}, got {len(request)} rows of {got}")
    lengths = np.unique(scores.value_lengths().to_numpy(zero_copy_only=False))
    if lengths.tolist() != [width]:
        raise ValueError(f"{path}: expected {width} scores a request, got {lengths.tolist()}")
    values = scores.flatten().to_numpy(zero_copy_only=False).reshape(len(wanted), width).astype(np.float32, copy=False)
    wrong = int(np.isnan(values[:, ignored:]).sum())
    if wrong:
        raise ValueError(f"{path}: expected no NaN among the scores, got {wrong}")
    return values if (order == np.arange(len(order))).all() else values[order]
