"""Snapshots of an index on disk: complete or not there, checked by checksums, the same bytes for the same items.

Rows are ordered by id, without free rows, so a file does not depend on the history of updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.config import Config
from aif_jax.encoding.vocabulary import Kind
from aif_jax.index.ids import Keys
from aif_jax.store import snapshots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(snapshots.Manifest):
    """The manifest of an index on disk, without its arrays.

    Attributes:
      items: rows.
      ids: kind of the raw ids; None for an index that never had any.
    """

    NOUN = "index"
    FORMAT = "aif_jax.index/3"
    REBUILD = "build the index again: ItemIndex.build, run.index or aif-jax index build"

    items: int
    ids: Kind | None

    def fits(self, arrays: Mapping[str, Any]) -> bool:
        """As `snapshots.Manifest.fits`: every array has a row for each item."""
        good = self.ids in (None, "integers", "strings") and type(self.items) is int
        good = good and {name.partition("/")[0] for name in arrays} == {"ids", "rows"}
        return good and all(leaf["shape"][:1] == [self.items] for leaf in arrays.values()) and self.fits_memory(self.items)


inspect = Manifest.inspect


def write(
    path: str | Path, keys: Keys, columns: Any, plain: dict[str, Any], config: Config, positions: Mapping[int, int] | None
) -> None:
    """Writes keys [n], the columns of their rows [n] and the record into a new folder, see `ItemIndex.save`."""
    Manifest.write(path, {"ids": _id_arrays(keys), "rows": columns}, plain, config, positions)


def verify(path: str | Path) -> Manifest:
    """Reads every array of a snapshot and compares it with its checksum.

    Raises:
      FileNotFoundError, CheckpointError: as `inspect`, or arrays that are torn or altered.
    """
    manifest = inspect(path)
    Manifest.read(path)
    return manifest


def read(path: str | Path, manifest: Manifest, shapes: Any) -> tuple[Keys, Any]:
    """Keys [n] and the columns of their rows [n] as NumPy arrays; `shapes` are those of the columns [any, ...]."""
    count = manifest.items
    columns = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), shapes)
    mark = np.broadcast_to(np.uint32(0), count) if manifest.ids == "strings" else None
    trees = Manifest.read(path, {"ids": _id_arrays(Keys(np.broadcast_to(np.int64(0), count), mark)), "rows": columns})
    return Keys(trees["ids"]["ids"], trees["ids"].get("marks")), trees["rows"]


def _id_arrays(keys: Keys) -> dict[str, np.ndarray]:
    return {"ids": keys.key} | ({} if keys.mark is None else {"marks": keys.mark})
