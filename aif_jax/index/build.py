"""Builds an index from a catalogue: checked batches of one size, computed into a new table."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import check_encoding, expect
from aif_jax.encoding.vocabulary import IdKind
from aif_jax.features import check_item_features
from aif_jax.index.ids import IdMap, View, ascending, kind_of, raw_keys
from aif_jax.index.store import ItemProgram, Store
from aif_jax.output import hidden, track
from aif_jax.readers import encode_items, read_items
from aif_jax.store.codec import Packed
from aif_jax.trees import take
from aif_jax.types import ItemFeatures

PIECE = 1 << 14  # items that are read from a catalogue at a time
IN_FLIGHT = 2  # batches computed or waiting while the next one is prepared: bounds memory, keeps the device busy
Batch: TypeAlias = tuple[np.ndarray, ItemFeatures]


def fill(
    program: ItemProgram, batches: Iterable[tuple[np.ndarray, Packed]],
    *, capacity: int | None = None, known: int | None = None, kind: IdKind | None = None,
) -> tuple[Store, View]:  # fmt: skip
    """Return a new table of stored rows [batch_size], of which the first are those of keys [n]; item n of all has row n.

    `known`: how many items there are, where that is known; `kind`: of the ids of an index without items.
    """
    store, seen = Store(program, capacity=capacity_for(known or 0) if capacity is None else capacity), []
    with track(total=known, label="item index", unit="items") as bar, hidden():  # of the files that are read
        for keys, stored in ahead(batches):
            jax.block_until_ready(stored)
            count = len(keys)
            if count > store.room:
                got = f"{capacity}; leave it None, or pass more"
                expect(capacity is None, "capacity", "at least the catalogue's items", got)
                store.resize(max(2 * store.capacity, capacity_for(store.rows.fresh + count)))
            store.put(stored, store.rows.take(count))
            seen.append(keys)
            bar.update(count)
    keys = np.concatenate(seen) if seen else np.zeros(0, np.int64)
    _expect_distinct(keys)
    if capacity is None and known is None and store.capacity != (least := capacity_for(len(keys))):
        store.resize(least)
    store.kind = kind_of(keys) or kind
    store.ids = IdMap(store.capacity, store.kind)
    return store, store.ids.fill(keys)


def ahead(results: Iterable[Any]) -> Iterator[Any]:
    """Yield the same results of dispatched programs, each when IN_FLIGHT later ones are dispatched too."""
    running = deque()
    for result in results:
        running.append(result)
        if len(running) > IN_FLIGHT:
            yield running.popleft()
    yield from running


def checked(program: ItemProgram, ids: Any, features: Any, *, kind: IdKind | None) -> Batch:
    """Return keys and features [n] of raw ids and features, or of raw items if `features` is None; see `ItemIndex.upsert`."""
    if features is None:
        ids, features = encode_items(ids, program.trained.need_encoder("raw items"))
    keys = raw_keys(ids, "ids", like=kind)
    check_item_features(program.trained.config.schema, features, batched=True)
    check_encoding("ItemFeatures", expected=program.trained.encoding, got=features.encoding)
    expect(len(features.floats) == len(keys), "features", f"{len(keys)} items like ids", len(features.floats))
    return keys, jax.tree.map(np.asarray, dataclasses.replace(features, encoding=""))


def capacity_for(items: int) -> int:
    """Return rows for so many items: an eighth more and 512, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two."""
    wanted = max(items * 9 // 8 + 512, 1024)
    quarter = max(1, 1 << (wanted.bit_length() - 3))
    return -(-wanted // quarter) * quarter


def rebatch(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Yield same rows in batches of exactly `size`; only the last may be shorter. A batch is a tuple of keys and trees [n]."""
    waiting, count = [], 0
    for batch in batches:
        waiting += [batch] if len(batch[0]) else []
        count += len(batch[0])
        if count < size:
            continue
        whole, full = _join(*waiting), count // size * size
        yield from (take(whole, slice(start, start + size)) for start in range(0, full, size))
        waiting, count = [take(whole, slice(full, None))] if full < count else [], count - full
    if count:
        yield _join(*waiting)


def _join(*batches: Any) -> Any:
    return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def item_batches(program: ItemProgram, catalogue: Any) -> tuple[Iterator[Batch], int | None]:
    """Return checked batches, of any size, of what `ItemIndex.build` takes, and how many items there are, if known."""
    known = None
    if isinstance(catalogue, Catalogue):
        check_encoding("Catalogue", expected=program.trained.encoding, got=catalogue.schema.encoding)
        whole, known = catalogue, len(catalogue) - 1
        places = (slice(start, min(start + PIECE, known)) for start in range(0, known, PIECE))
        catalogue = ((whole.raw[at], whole.features(np.arange(at.start + 1, at.stop + 1))) for at in places)
    elif isinstance(catalogue, tuple) and len(catalogue) == 2 and isinstance(catalogue[1], ItemFeatures):
        catalogue = [catalogue]
    elif isinstance(catalogue, str | Path | Mapping) or hasattr(catalogue, "__arrow_c_stream__"):
        catalogue = read_items(catalogue, program.trained.need_encoder("raw items"))
    elif not isinstance(catalogue, Iterable):
        expected = "a Catalogue, raw items as `aif.read` takes them, or batches of such or of pairs (ids, ItemFeatures)"
        raise TypeError(f"catalogue: expected {expected}, got {type(catalogue).__name__}")
    if isinstance(catalogue, list) and all(isinstance(batch, tuple) and np.ndim(batch[0]) for batch in catalogue):
        known = sum(len(batch[0]) for batch in catalogue)  # so that the table need not grow
    return _stream(program, catalogue), known


def _stream(program: ItemProgram, entries: Iterable[Any]) -> Iterator[Batch]:
    kind = None
    for entry in entries:
        keys, features = checked(program, *(entry if isinstance(entry, tuple) else (entry, None)), kind=kind)
        kind = kind or kind_of(keys)
        yield keys, features


def _expect_distinct(keys: np.ndarray) -> None:
    order = ascending(keys)
    repeated = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(repeated):
        first, second = order[repeated[0]], order[repeated[0] + 1]
        got = f"{keys[first] if kind_of(keys) == 'integers' else 'one'} comes twice, at positions {first} and {second}"
        raise ValueError(f"ids: expected distinct ids, got repeated ones: {got} ({len(repeated)} repeated in all)")
