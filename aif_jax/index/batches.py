"""A catalogue, whatever it comes as, as a stream of checked batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.config import Config
from aif_jax.encoder import Encoder
from aif_jax.features import check_item_features
from aif_jax.index.ids import Keys, raw_keys
from aif_jax.readers import read_items
from aif_jax.types import ItemFeatures
from aif_jax.version import check_encoding
from aif_jax.vocabulary import Kind

ItemBatches: TypeAlias = Iterable[Any]
"""Pairs of raw ids [n] and `ItemFeatures` with a leading axis [n], or with an encoder raw columns [n], such as Arrow record
batches; n may differ from batch to batch."""
Batch: TypeAlias = tuple[Keys, ItemFeatures]


class Reader:
    """Turns what callers give into keys and checked features; without an encoder all features come encoded."""

    def __init__(self, config: Config, encoder: Encoder | None):
        self.config = config
        self.encoder = encoder

    def pair(self, ids: Any, features: Any, *, kind: Kind | None = None) -> Batch:
        """Keys and features [n] of raw ids and features, or of raw columns where `features` is None; see `ItemIndex.upsert`."""
        if features is None:
            if self.encoder is None:
                raise TypeError(f"items: expected ids and ItemFeatures, or an index with an encoder, got {type(ids).__name__}")
            ids, features = self.encoder.items(_columns(ids))
        keys = raw_keys(ids, "ids", like=kind)
        check_item_features(self.config.schema, features, batched=True)
        check_encoding("ItemFeatures", expected="" if self.encoder is None else self.encoder.version, got=features.encoding)
        if len(features.floats) != len(keys.key):
            raise ValueError(f"features: expected {len(keys.key)} items like ids, got {len(features.floats)}")
        plain = ItemFeatures(ids=features.ids, floats=features.floats, content=features.content, side=features.side)
        return keys, jax.tree.map(np.asarray, plain)

    def batches(self, catalogue: Any, *, ids: Any, size: int) -> tuple[Iterator[Batch], int | None]:
        """What `ItemIndex.build` takes as batches, `size` rows of a `Catalogue` at a time, and how many items where known."""
        if isinstance(catalogue, ItemFeatures) != (ids is not None):
            raise ValueError("ids: expected together with ItemFeatures, and with nothing else")
        if isinstance(catalogue, ItemFeatures):
            return iter([self.pair(ids, catalogue)]), len(ids)
        if isinstance(catalogue, Catalogue):
            return self._checked(_rows(catalogue, size)), len(catalogue) - 1
        if isinstance(catalogue, str | Path):
            if self.encoder is None:
                raise ValueError(f"encoder: expected the encoder of the model's checkpoint, to read {catalogue}, got None")
            return self._checked(read_items(catalogue, self.encoder)), None
        if not isinstance(catalogue, Iterable):
            raise TypeError(
                f"catalogue: expected Catalogue, path, ItemFeatures or pairs (ids, features), got {type(catalogue).__name__}"
            )
        return self._checked(catalogue), None

    def _checked(self, entries: ItemBatches) -> Iterator[Batch]:
        kind = None
        for entry in entries:
            keys, features = self.pair(*(entry if isinstance(entry, tuple) else (entry, None)), kind=kind)
            kind = kind or keys.kind
            yield keys, features


def rebatch(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same rows in batches of exactly `size`; only the last may be shorter."""
    rest: list[Batch] = []
    for batch in batches:
        if not len(batch[0].key):
            continue
        rest.append(batch)
        if sum(len(keys.key) for keys, _ in rest) < size:
            continue
        keys, features = join(rest)
        full = len(keys.key) // size * size
        for start in range(0, full, size):
            yield part(keys, features, slice(start, start + size))
        rest = [part(keys, features, slice(full, None))] if full < len(keys.key) else []
    if rest:
        yield join(rest)


def part(keys: Keys, features: ItemFeatures, at: Any) -> Batch:
    """Some items of a batch."""
    return keys.take(at), jax.tree.map(lambda leaf: leaf[at], features)


def join(batches: list[Batch]) -> Batch:
    """Batches as one."""
    return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def _columns(table: Any) -> Any:
    """Raw columns; of a list of records, one for each name, None where a record lacks it."""
    if not isinstance(table, list):
        return table
    return {name: [record.get(name) for record in table] for name in dict.fromkeys(name for record in table for name in record)}


def _rows(catalogue: Catalogue, size: int) -> Iterator[tuple[np.ndarray, ItemFeatures]]:
    for start in range(1, len(catalogue), size):
        rows = np.arange(start, min(start + size, len(catalogue)))
        yield catalogue.raw[rows - 1], catalogue.features(rows)
