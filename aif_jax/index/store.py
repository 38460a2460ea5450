"""The memory behind the snapshots of an index: one table on the device, one id map on the host, shared by all of them.

A changed item gets a *free* row of the table, so an update writes in place and every snapshot stays whole (multi-version
concurrency control). Rows and pages come back when the snapshots that read them are gone.
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
from aif_jax.index.idmap import IdMap, View
from aif_jax.index.ids import Keys
from aif_jax.index.lock import ReadWriteLock
from aif_jax.index.program import ItemProgram
from aif_jax.index.storage import Packed, pack
from aif_jax.types import ItemFeatures
from aif_jax.vocabulary import Kind


class Store:
    """Table, id map and free rows."""

    def __init__(self, program: ItemProgram, *, version: str, capacity: int):
        self.program = program
        self.version = version
        self.capacity = capacity
        self.ids = IdMap(0, None)
        self._lock = ReadWriteLock()
        self._table = _zeros(program.shapes(), capacity, program.mesh)
        self._free = np.zeros(0, np.int32)
        self._fresh = 0  # rows from here on were never used
        self._retired: deque[tuple[weakref.ref, np.ndarray, np.ndarray]] = deque()
        self._head: weakref.ref | None = None

    @property
    def room(self) -> int:
        """Rows that an update may use now."""
        self._collect()
        return len(self._free) + self.capacity - self._fresh

    def fits(self, keys: Keys) -> bool:
        """Whether a change of these ids finds room in table and id map, which holds ids of their kind."""
        count = len(keys.key)
        return keys.kind == self.ids.kind and count <= self.room and self.ids.has_room(count)

    def is_head(self, snapshot: Any) -> bool:
        """Whether a snapshot is the latest of this store."""
        return self._head is not None and self._head() is snapshot

    def shapes(self) -> Packed:
        """Shapes and dtypes of the table, without a look at its contents."""
        with self.reading() as table:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), table)

    @contextmanager
    def reading(self) -> Iterator[Packed]:
        """The arrays, lent until a computation on them is dispatched."""
        with self._lock.reading():
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
        for start in self._batches(len(rows)):
            part = slice(start, start + self.program.batch_size)
            self.put(self.program(jax.tree.map(lambda leaf, part=part: leaf[part], features)), rows[part])

    def put(self, stored: Packed, rows: np.ndarray) -> None:
        """Writes a batch of stored rows in place."""
        targets = np.full(self.program.batch_size, self.capacity, np.int32)  # out of range: dropped
        targets[: len(rows)] = rows
        with self._lock.writing():
            self._table = _write(self._table, stored, self._replicated(targets))

    def fill(self, columns: Any, count: int) -> None:
        """Puts the columns of rows [count] from the host into rows 0..count-1 of a new store."""
        for start in self._batches(count):
            part = slice(start, min(start + self.program.batch_size, count))
            batch = self.program.place(jax.tree.map(lambda leaf, part=part: leaf[part], columns))
            self.put(_pack(batch), self.take_rows(part.stop - start))

    def resize(self, capacity: int) -> None:
        """Makes the table longer or shorter while it is filled for the first time, before there is a snapshot."""
        placed = None if self.program.mesh is None else sharding.rows(self.program.mesh)
        with self._lock.writing():
            self._table = _resized(capacity, placed)(self._table)
        self.capacity = capacity

    def assign(self, keys: Keys, kind: Kind | None) -> View:
        """The first version of the id map, once the table is filled: distinct keys [n], which have rows 0 to n - 1."""
        self.ids = IdMap(self.capacity, kind)
        return self.ids.fill(keys)

    def commit(self, old: Any, new: Any, *, rows: np.ndarray, pages: np.ndarray) -> None:
        """Makes `new` the latest snapshot; `rows` and `pages` are what only `old` and those before it still read."""
        if old is not None:
            self._retired.append((weakref.ref(old), rows, pages))
        self._head = weakref.ref(new)

    def copy(self, view: View, *, capacity: int, kind: Kind | None) -> tuple[Store, View]:
        """The rows of one snapshot in a new store, by ascending key, with an id map for ids of that kind."""
        keys, rows = view.items()
        new = Store(self.program, version=self.version, capacity=capacity)
        for start in self._batches(len(rows)):
            part = rows[start : start + self.program.batch_size]
            new.put(self.read(part), new.take_rows(len(part)))
        return new, new.assign(keys, kind)

    def read(self, rows: np.ndarray) -> Packed:
        """Stored rows [batch_size] on the device, at most `batch_size` of them."""
        wanted = np.zeros(self.program.batch_size, np.int32)
        wanted[: len(rows)] = rows
        with self.reading() as table:
            return _gather(table, self._replicated(wanted))

    def copy_table(self) -> Packed:
        """The arrays, copied."""
        with self.reading() as table:
            return _copy(table)

    def _batches(self, count: int) -> range:
        return range(0, count, self.program.batch_size)

    def _replicated(self, rows: np.ndarray) -> Any:
        return rows if self.program.mesh is None else jax.device_put(rows, sharding.replicated(self.program.mesh))

    def _collect(self) -> None:
        """Frees what no living snapshot reads; they die in any order, what the oldest living one may read stays."""
        while self._retired and self._retired[0][0]() is None:
            _, rows, pages = self._retired.popleft()
            self.give_back(rows)
            self.ids.release(pages)


@partial(jax.jit, donate_argnums=0)
def _write(table: Packed, stored: Packed, rows: jax.Array) -> Packed:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), table, stored)


@jax.jit
def _pack(columns: Any) -> Packed:
    return jax.vmap(pack)(columns)


@jax.jit
def _gather(table: Packed, rows: jax.Array) -> Packed:
    return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), table)


@jax.jit
def _copy(table: Packed) -> Packed:
    return jax.tree.map(jnp.copy, table)


def _zeros(batch: Packed, capacity: int, mesh: Any) -> Packed:
    leaves, tree = jax.tree.flatten(batch)
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
