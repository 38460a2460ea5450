"""A catalogue as a stream of column batches of one size, whatever it comes as. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from aif_jax.data.catalogue import Catalogue
from aif_jax.data.schema import Schema
from aif_jax.index.arrow import from_arrow, parquet_batches
from aif_jax.index.idmap import raw_ids
from aif_jax.types import ItemFeatures

ItemBatches: TypeAlias = Iterable[tuple[Any, ItemFeatures]]
"""Pairs of raw ids [n] (integers, or strings that `string_ids` turns into integers) and features with a leading axis [n];
n may differ from batch to batch."""


def as_batches(
    catalogue: Any, schema: Schema, *, ids: Any = None, size: int
) -> tuple[Iterator[tuple[np.ndarray, ItemFeatures]], int | None]:
    """What `ItemIndex.build` accepts, as pairs of (ids int64 [n], features) and, where it is known, the number of items.

    Args:
      catalogue: `Catalogue`, `ItemFeatures` with `ids`, an iterable of pairs or of Arrow record batches, or a Parquet path.
      schema: of the features.
      ids: of the items, with `ItemFeatures` alone.
      size: rows to take from a `Catalogue` in one go.

    Raises:
      TypeError: something else.
      ValueError: `ids` missing or superfluous.
    """
    if isinstance(catalogue, ItemFeatures) != (ids is not None):
        raise ValueError("ids: expected together with ItemFeatures, and with nothing else")
    if isinstance(catalogue, ItemFeatures):
        return iter([(raw_ids(ids, "ids"), catalogue)]), len(ids)
    if isinstance(catalogue, Catalogue):
        return _catalogue_batches(catalogue, size), len(catalogue) - 1
    if isinstance(catalogue, str | Path):
        return parquet_batches(catalogue, schema), None
    if not isinstance(catalogue, Iterable):
        raise TypeError(f"catalogue: expected Catalogue, ItemFeatures or pairs (ids, features), got {type(catalogue).__name__}")
    return (_pair(entry, schema) for entry in catalogue), None


def _pair(entry: Any, schema: Schema) -> tuple[np.ndarray, ItemFeatures]:
    if isinstance(entry, tuple):
        return raw_ids(entry[0], "ids"), entry[1]
    return from_arrow(entry, schema)


def rebatch(batches: Iterable[tuple[np.ndarray, ItemFeatures]], size: int) -> Iterator[tuple[np.ndarray, ItemFeatures]]:
    """The same rows in batches of exactly `size`; only the last may be shorter. Holds one batch more than it was given."""
    rest: list[tuple[np.ndarray, ItemFeatures]] = []
    for pair in batches:
        rest.append(pair)
        if sum(len(ids) for ids, _ in rest) < size:
            continue
        whole = _join(rest)
        full = len(whole[0]) // size * size
        for start in range(0, full, size):
            yield _slice(whole, start, start + size)
        rest = [_slice(whole, full, len(whole[0]))] if full < len(whole[0]) else []
    if rest:
        whole = _join(rest)
        if len(whole[0]):
            yield whole


def _join(pairs: list[tuple[np.ndarray, ItemFeatures]]) -> tuple[np.ndarray, ItemFeatures]:
    return pairs[0] if len(pairs) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *pairs)


def _slice(pair: tuple[np.ndarray, ItemFeatures], start: int, stop: int) -> tuple[np.ndarray, ItemFeatures]:
    return jax.tree.map(lambda leaf: leaf[start:stop], pair)


def _catalogue_batches(catalogue: Catalogue, size: int) -> Iterator[tuple[np.ndarray, ItemFeatures]]:
    for start in range(1, len(catalogue), size):
        rows = np.arange(start, min(start + size, len(catalogue)))
        yield raw_ids(catalogue.raw[rows - 1], "Catalogue.raw"), catalogue.features(rows)
