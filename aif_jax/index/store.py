"""The memory behind the snapshots of an index: one table on the device, one id map on the host, shared by all of them.

A changed item gets a *free* row of the table; the row that older snapshots read is never written while one of them lives. So an
update writes into the table in place, at a cost that does not depend on its size, and every snapshot stays whole. Rows and
pages come back when the snapshots that read them are gone. Source: multi-version concurrency control, as databases do it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import sharding
from aif_jax.index.encoder import Encoder
from aif_jax.index.gate import Gate
from aif_jax.index.idmap import IdMap, View
from aif_jax.index.storage import pack
from aif_jax.types import ItemFeatures


class Store:
    """Table, id map and free rows.

    Args:
      encoder: makes the rows.
      version: of its parameters.
      capacity: rows of the table.
      shapes: of a batch of stored rows.
    """

    def __init__(self, encoder: Encoder, *, version: str, capacity: int, shapes: Any):
        self.encoder = encoder
        self.version = version
        self.capacity = capacity
        self.ids = IdMap(capacity)
        self._gate = Gate()
        self._table = _zeros(shapes, capacity, encoder.mesh)
        self._kept = False  # someone holds the arrays themselves
        self._free = np.zeros(0, np.int32)
        self._fresh = 0  # rows from here on were never used
        self._retired: deque[tuple[weakref.ref, np.ndarray, np.ndarray]] = deque()
        self._head: weakref.ref | None = None

    @property
    def room(self) -> int:
        """Rows that an update may use now."""
        self._collect()
        return len(self._free) + self.capacity - self._fresh

    def fits(self, changed: int) -> bool:
        """Whether a change of so many ids finds room in table and id map."""
        return changed <= self.room and self.ids.has_room(changed)

    def is_head(self, snapshot: Any) -> bool:
        """Whether a snapshot is the latest of this store."""
        return self._head is not None and self._head() is snapshot

    def shapes(self) -> Any:
        """Shapes and dtypes of the table, without touching it."""
        with self._gate.reading():
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self._table)

    def keep(self) -> Any:
        """The arrays, to be kept: the next update copies them."""
        with self._gate.reading():
            self._kept = True
            return self._table

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """The arrays, lent until a computation on them is dispatched."""
        with self._gate.reading():
            yield self._table

    def take_rows(self, count: int) -> np.ndarray:
        """Free rows int32 [count], no longer free."""
        reused = min(count, len(self._free))
        self._free, taken = self._free[: len(self._free) - reused], self._free[len(self._free) - reused :]
        start, self._fresh = self._fresh, self._fresh + count - reused
        return np.concatenate([taken, np.arange(start, self._fresh, dtype=np.int32)])

    def give_back(self, rows: np.ndarray) -> None:
        """Makes rows free that no snapshot reads."""
        self._free = np.concatenate([self._free, rows])

    def encode(self, features: ItemFeatures, rows: np.ndarray) -> None:
        """Computes items and puts them into free rows."""
        for part, encoded in self.encoder.batches(features, len(rows)):
            self.put(encoded, rows[part])

    def put(self, encoded: Any, rows: np.ndarray) -> None:
        """Writes a batch of stored rows in place."""
        at = np.full(self.encoder.batch_size, self.capacity, np.int32)  # out of range: dropped
        at[: len(rows)] = rows
        if self.encoder.mesh is not None:
            at = jax.device_put(at, sharding.replicated(self.encoder.mesh))
        with self._gate.writing():
            write = _write_copy if self._kept else _write
            self._table, self._kept = write(self._table, encoded, at), False

    def append(self, batches: list[Any], count: int) -> None:
        """Writes whole batches of stored rows, in which the first `count` rows count, behind the rows used last.

        For filling a table for the first time. Several batches in one call, in one run of rows: half the time of as many `put`.
        """
        if not batches:
            return
        size, start = self.encoder.batch_size, self._fresh
        if start + len(batches) * size > self.capacity or len(self._free):  # a run would not fit: it would be moved
            for number, stored in enumerate(batches):
                self.put(stored, self.take_rows(min(size, count - number * size)))
            return
        self.take_rows(count)
        with self._gate.writing():
            self._table = _append(self._table, batches, np.int32(start))

    def resize(self, capacity: int) -> None:
        """Makes the table longer or shorter while it is filled for the first time, before there is a snapshot."""
        placed = None if self.encoder.mesh is None else sharding.rows(self.encoder.mesh)
        with self._gate.writing():
            self._table = _resized(capacity, placed)(self._table)
        self.capacity, self.ids = capacity, IdMap(capacity)

    def fill(self, columns: Any, count: int) -> None:
        """Puts the columns of rows [count] from the host into rows 0..count-1 of a new store."""
        size = self.encoder.batch_size
        for start in range(0, count, size):
            rows = self.take_rows(min(size, count - start))
            part = jax.tree.map(lambda leaf, start=start: leaf[start : start + size], columns)
            self.put(_pack(self.encoder.place(part)), rows)

    def commit(self, old: Any, new: Any, *, rows: np.ndarray, pages: np.ndarray) -> None:
        """Makes `new` the latest snapshot; `rows` and `pages` are what only `old` and those before it still read."""
        if old is not None:
            self._retired.append((weakref.ref(old), rows, pages))
        self._head = weakref.ref(new)

    def fork(self, view: View, *, capacity: int) -> tuple[Store, View]:
        """A copy of one snapshot with a table and an id map of its own, by ascending id."""
        ids, rows = view.items()
        new = Store(self.encoder, version=self.version, capacity=capacity, shapes=self.shapes())
        size = self.encoder.batch_size
        for start in range(0, len(ids), size):
            new.put(self.read(rows[start : start + size]), new.take_rows(len(rows[start : start + size])))
        return new, new.ids.fill(ids)

    def read(self, rows: np.ndarray) -> Any:
        """Stored rows [batch_size] on the device, at most `batch_size` of them."""
        at = np.zeros(self.encoder.batch_size, np.int32)
        at[: len(rows)] = rows
        if self.encoder.mesh is not None:
            at = jax.device_put(at, sharding.replicated(self.encoder.mesh))
        with self.reading() as table:
            return _gather(table, at)

    def _collect(self) -> None:
        """Frees what no living snapshot reads; they die in any order, what the oldest living one may read stays."""
        while self._retired and self._retired[0][0]() is None:
            _, rows, pages = self._retired.popleft()
            self.give_back(rows)
            self.ids.release(pages)


def _put_rows(table: Any, encoded: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda leaf, new: leaf.at[at].set(new, mode="drop"), table, encoded)


_write = jax.jit(_put_rows, donate_argnums=0)
_write_copy = jax.jit(_put_rows)


@partial(jax.jit, donate_argnums=0)
def _append(table: Any, batches: list[Any], start: jax.Array) -> Any:
    def write(leaf: jax.Array, *parts: jax.Array) -> jax.Array:
        for number, part in enumerate(parts):
            leaf = jax.lax.dynamic_update_slice_in_dim(leaf, part, start + number * part.shape[0], 0)
        return leaf

    return jax.tree.map(write, table, *batches)


@jax.jit
def _pack(columns: Any) -> Any:
    return jax.vmap(pack)(columns)


@jax.jit
def _gather(table: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf.at[at].get(mode="clip"), table)


def _zeros(shapes: Any, capacity: int, mesh: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    rows = tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)
    return tree.unflatten(_zeros_compiled(rows, capacity, None if mesh is None else sharding.rows(mesh))())


@lru_cache(maxsize=32)
def _zeros_compiled(rows: tuple[Any, ...], capacity: int, placed: Any) -> Any:
    """Compiled, so that the arrays own their memory and can be written in place."""
    return jax.jit(lambda: [jnp.zeros((capacity, *shape), dtype) for shape, dtype in rows], out_shardings=placed)


@lru_cache(maxsize=32)
def _resized(capacity: int, placed: Any) -> Any:
    def fit(leaf: jax.Array) -> jax.Array:
        more = max(0, capacity - leaf.shape[0])
        return jnp.pad(leaf[:capacity], [(0, more)] + [(0, 0)] * (leaf.ndim - 1))

    return jax.jit(partial(jax.tree.map, fit), out_shardings=placed)
