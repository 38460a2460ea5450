"""The memory behind the snapshots of an index: one table on the device, one id map on the host, shared by all of them.

A changed item gets a *free* row of the table, so an update writes in place and every snapshot stays whole (multi-version
concurrency control). Rows and pages come back when the snapshots that read them are gone.

An update writes into arrays only while no computation is being handed to the device: a reader holds one of `READERS` permits,
and a writer collects all of them, so those that come while it waits do not go before it.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import ArgumentError, expect
from aif_jax.encoding.vocabulary import IdKind
from aif_jax.features import item_specs
from aif_jax.index.ids import FreeList, IdMap, kind_of
from aif_jax.store.codec import STORAGES, Packed, Storage, encode, pack, unpack
from aif_jax.store.trained import Trained
from aif_jax.types import ItemFeatures, ItemRow, Params

BATCH = 1024  # items that the item function takes at a time
READERS = 32  # at the same time: more than threads hand work to a device


class ItemProgram:
    """The item function as the index runs it.

    It is compiled once and always runs on batches of one size, so an updated row equals a rebuilt one bit for bit: products
    over another number of rows may add in another order.
    """

    def __init__(self, trained: Trained, *, storage: Storage = "float32", batch_size: int = BATCH):
        expect(storage in STORAGES, "storage", f"one of {STORAGES}", repr(storage))
        expect(batch_size >= 1, "batch_size", "at least 1", batch_size, error=ArgumentError)
        row = jax.eval_shape(trained.model.item, trained.params, item_specs(trained.config.schema))
        if isinstance(row, ItemRow):  # what answers are ordered by, and shown with
            side, got = sorted(trained.config.schema.side), sorted(row.side)
            expect(got == side, "ItemRow.side", f"the side values {side} of the schema", got)
        self.trained = trained.on_device()
        self.storage: Storage = storage
        self.batch_size = batch_size
        self._compiled = _compiled(trained.model.item, storage)

    def __call__(self, features: ItemFeatures) -> Packed:
        """Return stored rows [batch_size] of at most `batch_size` items; later rows are undefined."""
        return self._compiled(self.trained.params, self._placed(features))

    def parts(self, count: int) -> list[slice]:
        """Return the places of `count` rows in batches of at most `batch_size`."""
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    def packed(self, columns: Any) -> Packed:
        """Return stored rows [batch_size] of the columns of at most `batch_size` rows."""
        return _pack(self._placed(columns))

    def words(self, words: np.ndarray) -> Packed:
        """Return stored rows [batch_size] of the words uint32 of at most `batch_size` rows."""
        return Packed(words=self._placed(words), layout=self.shapes().layout)

    def columns(self) -> Any:
        """Return shapes and dtypes of one batch of rows by column."""
        return jax.eval_shape(unpack, self.shapes())

    def shapes(self) -> Packed:
        """Return shapes and dtypes of one batch of stored rows."""
        specs = item_specs(self.trained.config.schema, lead=(self.batch_size,))
        return jax.eval_shape(self._compiled, self.trained.params, specs)

    def _placed(self, rows: Any) -> Any:
        """Return a batch of at most `batch_size` rows from the host, filled up with zeros, ready for a compiled function."""
        return jax.tree.map(lambda leaf: _pad(np.asarray(leaf), self.batch_size), rows)


class Store:
    """Table, id map and free rows."""

    def __init__(self, program: ItemProgram, *, capacity: int):
        self.program = program
        self.ids = IdMap(0)
        self.kind: IdKind | None = None  # of the raw ids, None for none so far
        self._permits, self._writer = threading.Semaphore(READERS), threading.Lock()
        batch = program.shapes()
        self._table = Packed(words=np.zeros((0, batch.words.shape[1]), np.uint32), layout=batch.layout)
        self.resize(capacity)
        self.rows = FreeList()
        self._retired: deque[tuple[weakref.ref, np.ndarray, np.ndarray]] = deque()
        self.head: Callable[[], Any] = lambda: None  # a weak reference to the latest snapshot

    @property
    def room(self) -> int:
        """Rows that an update may use now; first takes back those that no living snapshot reads."""
        # Snapshots die in any order; what the oldest living one may read stays.
        while self._retired and self._retired[0][0]() is None:
            _, rows, pages = self._retired.popleft()
            self.rows.give_back(rows)
            self.ids.numbers.give_back(pages)
        return len(self.rows.free) + self.capacity - self.rows.fresh

    def fits(self, keys: np.ndarray) -> bool:
        """Return whether a change of these ids finds room in table and id map, which holds ids of their kind."""
        return kind_of(keys) in (None, self.kind) and len(keys) <= min(self.room, self.ids.room)

    @contextmanager
    def reading(self) -> Iterator[Packed]:
        """Lend the arrays until a computation on them is dispatched."""
        with self._permits:
            yield self._table

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep readers and other writers out while the arrays are replaced."""
        with self._writer, ExitStack() as permits:
            for _ in range(READERS):
                permits.enter_context(self._permits)
            yield

    def read(self, rows: np.ndarray) -> Packed:
        """Return stored rows [batch_size] on the device, at most `batch_size` of them."""
        wanted = np.zeros(self.program.batch_size, np.int32)
        wanted[: len(rows)] = rows
        with self.reading() as table:
            return _gather(table, wanted)

    def resize(self, capacity: int) -> None:
        """Make the table longer or shorter while it is filled for the first time, before there is a snapshot."""
        with self._writing():
            self._table = _resized(self._table, capacity=capacity)
        self.capacity = capacity

    def retire(self, snapshot: Any, rows: np.ndarray, pages: np.ndarray) -> None:
        """Take `rows` and `pages` back once `snapshot` and those before it, which alone read them, are gone."""
        self._retired.append((weakref.ref(snapshot), rows, pages))

    def put(self, stored: Packed, rows: np.ndarray) -> None:
        """Write a batch of stored rows, of which the first are items, into free rows [n], in place."""
        expect(rows.max(initial=-1) < self.capacity, "rows", f"below the capacity {self.capacity}", rows.max(initial=-1))
        targets = np.full(self.program.batch_size, self.capacity, np.int32)  # out of range: dropped
        targets[: len(rows)] = rows
        with self._writing():
            self._table = _write(self._table, stored, targets)


@lru_cache(maxsize=16)
def _compiled(item: Callable[..., Any], storage: Storage) -> Any:
    def run(params: Params, features: ItemFeatures) -> Packed:
        return jax.vmap(lambda one: pack(encode(item(params, one), storage)))(features)

    return jax.jit(run)


def _pad(leaf: np.ndarray, size: int) -> np.ndarray:
    short = size - len(leaf)
    return leaf if not short else np.concatenate([leaf, np.zeros((short, *leaf.shape[1:]), leaf.dtype)])


_pack = jax.jit(jax.vmap(pack))


@partial(jax.jit, donate_argnums=0)
def _write(table: Packed, stored: Packed, rows: jax.Array) -> Packed:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), table, stored)


@jax.jit
def _gather(table: Packed, rows: jax.Array) -> Packed:
    return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), table)


@partial(jax.jit, static_argnames="capacity")
def _resized(table: Packed, *, capacity: int) -> Packed:
    return jax.tree.map(lambda leaf: jnp.pad(leaf[:capacity], ((0, max(0, capacity - len(leaf))), (0, 0))), table)
