"""Fills the table of a new index from a stream of batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from aif_jax.checks import expect
from aif_jax.index.batches import Batch, rebatch
from aif_jax.index.ids import Keys
from aif_jax.index.program import ItemProgram
from aif_jax.index.store import Store

BATCH = 1024
IN_FLIGHT = 2  # batches computed or waiting while the next one is prepared: bounds memory, keeps the device busy


def build_store(
    program: ItemProgram, batches: Iterator[Batch], known: int | None, *, version: str, capacity: int | None, progress: bool
) -> tuple[Store, Keys]:
    """Runs the item function over batches of any size (`known` items in all, or None); item n of the stream has row n."""
    wanted = capacity_for(known or 0, program.mesh) if capacity is None else capacity
    store = Store(program, version=version, capacity=wanted)
    seen, computed = [], deque()
    with tqdm(total=known, unit="item", unit_scale=True, desc="item index", disable=not progress) as bar:
        for keys, features in rebatch(batches, program.batch_size):
            count = len(keys.key)
            if count > store.room:
                if capacity is not None:
                    raise ValueError(f"capacity: the catalogue has more items than {capacity}")
                store.resize(2 * store.capacity)
            stored = program(features)
            store.put(stored, store.take_rows(count))
            computed.append(stored)
            seen.append(keys)
            if len(computed) > IN_FLIGHT:
                jax.block_until_ready(computed.popleft())
            bar.update(count)
    keys = jax.tree.map(lambda *parts: np.concatenate(parts), *seen) if seen else Keys(np.zeros(0, np.int64))
    _expect_distinct(keys)
    if capacity is None and known is None and store.capacity > (least := capacity_for(len(keys.key), program.mesh)):
        store.resize(least)
    return store, keys


def capacity_for(items: int, mesh: object = None, capacity: int | None = None) -> int:
    """Rows for so many items: an eighth more and 512, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two.

    Args:
      items: how many there are.
      mesh: the rows are a multiple of its devices.
      capacity: rows that the caller wants instead.

    Raises:
      ValueError: a capacity below the number of items.
    """
    if capacity is not None:
        expect(capacity >= items, "capacity", f"at least {items}", capacity)
        return capacity
    wanted = max(items * 9 // 8 + 512, 1024)
    quarter = max(1, 1 << (wanted.bit_length() - 3))
    rounded = -(-wanted // quarter) * quarter
    devices = getattr(mesh, "size", 1)
    return -(-rounded // devices) * devices


def _expect_distinct(keys: Keys) -> None:
    order = np.argsort(keys.key, kind="stable")
    repeated = np.flatnonzero(keys.key[order][1:] == keys.key[order][:-1])
    if len(repeated):
        first, second = order[repeated[0]], order[repeated[0] + 1]
        name = f"{keys.key[first]} comes twice" if keys.mark is None else "one comes twice"
        where = f"at positions {first} and {second} ({len(repeated)} repeated in all)"
        raise ValueError(f"ids: expected distinct ids, but {name}, {where}")
