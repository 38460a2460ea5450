"""Records: one JSON object a line for every run, appended when it is done. A run that has a record is never run again."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.metrics import ByUser


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to `<folder>/<dataset>.jsonl`; safe where several processes do the same."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(rounded(record), separators=(",", ":")) + "\n"
    with open(folder / f"{record['dataset']}.jsonl", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return all records by their `id`, in the order written; the last one of an id counts. ValueError for another line."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: expected a record with an id, got {line[:60]!r}") from error
    return found


def rounded(value: Any, digits: int = 5) -> Any:
    """Return the same with every float cut to five digits after the point: more would be noise."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: rounded(entry, digits) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    return round(value, digits) if isinstance(value, float) else value


def file_of(name: str) -> str:
    """Return the id of a record as a file's name."""
    return name.replace("/", "--").replace(" ", "_").replace("=", "")


def keep(folder: Path, record: dict[str, Any], found: dict[str, ByUser]) -> dict[str, Any]:
    """Add a record with its figures, and write its metrics by user, which must be small, into a file next to it."""
    (folder / "by_user").mkdir(parents=True, exist_ok=True)
    kinds = {"users": np.int32, "values": np.float32, "weights": np.int32}
    arrays = {f"{name}.{part}": getattr(one, part).astype(kind) for name, one in found.items() for part, kind in kinds.items()}
    np.savez_compressed(folder / "by_user" / f"{file_of(record['id'])}.npz", **arrays)  # type: ignore[arg-type]
    record = record | {"figures": {name: one.mean for name, one in found.items()}}
    append(folder, record)
    return record


def by_user(folder: Path, record: dict[str, Any], name: str) -> ByUser:
    """Return a metric of a record by user."""
    with np.load(folder / "by_user" / f"{file_of(record['id'])}.npz") as arrays:
        users, values, weights = (arrays[f"{name}.{part}"] for part in ("users", "values", "weights"))
    return ByUser(users.astype(np.int64), values.astype(np.float64), weights.astype(np.float64))
