"""`ItemIndex`: an immutable snapshot of every item's row, the paper's N2O (nearline-to-online) table.

The nearline job runs the item function over the catalogue when the model changes and over one item when that item changes; the
request only looks rows up. Snapshots of one index share their memory, see `store.py`. Source: AIF (arXiv 2511.12934); the
design of the table is ours.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aif_jax.config import Config
from aif_jax.data.catalogue import Catalogue
from aif_jax.data.validate import check_item_features
from aif_jax.index.batches import ItemBatches, as_batches, rebatch
from aif_jax.index.encoder import Encoder
from aif_jax.index.idmap import View, raw_ids
from aif_jax.index.storage import Packed, Storage, decode, expect_storage, unpack
from aif_jax.index.store import Store
from aif_jax.model import PreRanker
from aif_jax.types import ItemFeatures, Params
from aif_jax.version import fingerprint

BATCH = 1024
IN_FLIGHT = 2  # batches computed or waiting while the next one is prepared: bounds memory, keeps the device busy
GROUP = 8  # batches written in one call


class ItemIndex:
    """A snapshot: which items there are, and their rows. Made by `ItemIndex.build`, never changed.

    `upsert` and `delete` return a new snapshot and leave this one as it is; they cost as much as the change, not as the
    catalogue. Snapshots may be read from any thread; one thread at a time makes new ones, from the latest. (From an older one
    it works too, with a copy of the whole table.) Old rows are kept as long as a snapshot that reads them lives.

    Example:
      >>> import jax, numpy as np, aif_jax as aif
      >>> from aif_jax.data.schema import Attribute, Schema
      >>> from aif_jax.index import ItemIndex
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
      >>> config = aif.Config(schema=schema, memory=(), simtier="off", width=8)
      >>> model = aif.build(config)
      >>> def features(*items):
      ...     rows, none = np.asarray(items, np.int32), np.zeros((len(items), 0), np.float32)
      ...     return aif.types.ItemFeatures(ids={"item": rows, "category": rows % 3}, floats=none)
      >>> index = ItemIndex.build(model, model.init(jax.random.key(0)), features(1, 2, 3), ids=[10, 20, 30], progress=False)
      >>> index.lookup([20, 99])[1].tolist()
      [True, False]
      >>> newer = index.upsert([99], features(4)).delete([10])
      >>> newer.ids.tolist(), index.ids.tolist()
      ([20, 30, 99], [10, 20, 30])
    """

    decode = staticmethod(decode)
    """`decode(table, rows)`: rows int32 [C] of a table as the interaction takes them, for use inside jit."""

    def __init__(self, store: Store, view: View, count: int):
        """Not for callers: see `build`."""
        self._store = store
        self._view = view
        self._count = count

    @classmethod
    def build(
        cls,
        model: PreRanker,
        params: Params,
        catalogue: Catalogue | ItemFeatures | ItemBatches | str | Path,
        *,
        ids: Any = None,
        version: str | None = None,
        storage: Storage = "float32",
        batch_size: int = BATCH,
        capacity: int | None = None,
        mesh: Any = None,
        progress: bool = True,
    ) -> ItemIndex:
        """Runs the item function over a catalogue.

        The host prepares and sends a batch while the device computes those before it; beside the table and 20 bytes an item
        for ids, memory is bounded by a few batches.

        Args:
          model: whose item function runs.
          params: of the model. Held by reference, for updates.
          catalogue: a `Catalogue`; an iterable of (ids [n], ItemFeatures with leading axis [n]) or of Arrow record batches, of
            any size; the path of a Parquet file or directory, see `arrow.py`; or one `ItemFeatures` with `ids`. Ids are int64
            of the caller's choice except -2^63; strings become ids by `string_ids`.
          ids: of the items of one `ItemFeatures`.
          version: of model, params, config and schema; None computes `aif_jax.version.fingerprint`.
          storage: of vectors: "float32" (exact), "bfloat16" or "int8" with a scale for each row.
          batch_size: items in one run of the item function. Rows may differ in the last bit between two batch sizes.
          capacity: rows of the table; None leaves an eighth free. With a stream, whose length is not known, a capacity saves
            copies of the table while it grows.
          mesh: splits batches and table over its devices, see `aif_jax.sharding.row_mesh`.
          progress: a progress bar on stderr.

        Raises:
          TypeError, ValueError: features that do not fit the schema, an id that comes twice, a catalogue larger than
            `capacity`.
        """
        expect_storage(storage)
        encoder = Encoder(model, params, storage=storage, batch_size=batch_size, mesh=mesh)
        version = fingerprint(params, model.config) if version is None else version
        batches, known = as_batches(catalogue, model.config.schema, ids=ids, size=max(batch_size, 1 << 14))
        wanted = capacity if capacity is not None else capacity_for(known or 0, mesh)
        store, all_ids, in_flight = None, [np.zeros(0, np.int64)], deque()
        group: list[Any] = []  # computed and not yet written
        bar = tqdm(total=known, unit="item", unit_scale=True, desc="item index", disable=not progress)
        valid = (checked(model.config, pair) for pair in batches)
        for some_ids, features in rebatch(valid, batch_size):
            if store is None:
                store = Store(encoder, version=version, capacity=wanted, shapes=encoder.shapes(features))
            waiting = len(group) * batch_size
            if waiting + len(some_ids) > store.room:
                if capacity is not None:
                    raise ValueError(f"capacity: the catalogue has more items than {capacity}")
                store.append(group, waiting)
                store.resize(2 * store.capacity)
                group, waiting = [], 0
            group.append(encoder(features))
            in_flight.append(group[-1])
            all_ids.append(some_ids)
            if len(group) == GROUP or len(some_ids) < batch_size:  # only the last batch is short
                store.append(group, waiting + len(some_ids))
                group = []
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            bar.update(len(some_ids))
        if store is not None:
            store.append(group, len(group) * batch_size)
        bar.close()
        if store is None:
            empty = empty_features(model.config)
            store = Store(encoder, version=version, capacity=wanted, shapes=encoder.shapes(empty))
        ids = np.concatenate(all_ids)
        if capacity is None and known is None and store.capacity > (least := capacity_for(len(ids), mesh)):
            store.resize(least)
        return cls.first(store, ids)

    @classmethod
    def first(cls, store: Store, ids: np.ndarray) -> ItemIndex:
        """Not for callers: the first snapshot of a store whose rows 0..n-1 belong to these ids."""
        ordered = np.sort(ids)
        if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
            raise ValueError(f"ids: expected distinct ids, but {twice[0]} comes twice ({len(twice)} repeated in all)")
        view = store.ids.fill(ids)
        index = cls(store, view, len(ids))
        store.commit(None, index, rows=np.zeros(0, np.int32), pages=np.zeros(0, np.int32))
        return index

    def __len__(self) -> int:
        """Items in this snapshot."""
        return self._count

    def __repr__(self) -> str:
        size = f"{self.bytes_per_row:.0f} bytes a row"
        held = f"{self._count:,} items, capacity={self.capacity:,}, storage={self.storage!r}, {size}"
        return f"ItemIndex({held}, version={self.version[:12]}...)"

    @property
    def version(self) -> str:
        """Fingerprint of params, config and schema that made the rows."""
        return self._store.version

    @property
    def model(self) -> PreRanker:
        """The model whose item function makes the rows."""
        return self._store.encoder.model

    @property
    def params(self) -> Params:
        """Parameters that make the rows."""
        return self._store.encoder.params

    @property
    def config(self) -> Config:
        """Config of the model, with its schema."""
        return self.model.config

    @property
    def storage(self) -> Storage:
        """How vectors are stored."""
        return self._store.encoder.storage

    @property
    def batch_size(self) -> int:
        """Items in one run of the item function."""
        return self._store.encoder.batch_size

    @property
    def mesh(self) -> Any:
        """The mesh that the table lies on, or None."""
        return self._store.encoder.mesh

    @property
    def capacity(self) -> int:
        """Rows of the table. Snapshots of one capacity and storage have arrays of the same shapes."""
        return self._store.capacity

    @property
    def ids(self) -> np.ndarray:
        """int64 [len(self)] ids, ascending. Costs a pass over the id map."""
        return self._view.items()[0]

    @property
    def shapes(self) -> Any:
        """Shapes and dtypes of the table, for ahead-of-time compilation."""
        return self._store.shapes()

    @property
    def bytes_per_row(self) -> float:
        """Device bytes of one row of the table."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes)) / self.capacity

    @property
    def host_bytes(self) -> int:
        """Host bytes of the id map, shared by all snapshots."""
        return self._store.ids.nbytes + self._view.directory.nbytes

    @property
    def table(self) -> Any:
        """The stored rows as `Packed` words [capacity, ...], which `decode` reads; see `storage.py`. Yours to keep.

        Because you may keep it, the next update copies the whole table instead of writing in place. Where updates and requests
        run beside each other, use `reading`.
        """
        return self._store.keep()

    def reading(self) -> AbstractContextManager[Any]:
        """`with index.reading() as table:` lends the stored rows while a computation on them is dispatched.

        Leave the block as soon as the compiled function has returned (its result need not be there yet): updates wait for that.
        Do not use the arrays afterwards, and do not enter it twice in one thread.
        """
        return self._store.reading()

    def lookup(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows of items.

        Args:
          ids: integers [C].

        Returns:
          rows int32 [C], -1 where this snapshot does not have the id, and mask bool [C], true where it has.

        Raises:
          TypeError: ids that are not integers.
        """
        rows = self._view.lookup(_plain_ids(ids))
        return rows, rows >= 0

    def take(self, ids: Any) -> tuple[Any, np.ndarray]:
        """The decoded rows of some items on the host, in the model's row type [C], and the mask [C] of those that are there.

        For inspection and tests; serving gathers on the device.
        """
        rows, mask = self.lookup(ids)
        size = self.batch_size
        parts = [_decode_stored(self._store.read(rows[i : i + size].clip(0))) for i in range(0, max(len(rows), 1), size)]
        whole = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves])[: len(rows)], *parts)
        return whole, mask

    def stored(self) -> tuple[np.ndarray, Any]:
        """ids int64 [n], ascending, and the columns of their rows [n] on the host, as compact as the table has them."""
        ids, rows = self._view.items()
        shapes = jax.eval_shape(unpack, self.shapes)
        host = jax.tree.map(lambda leaf: np.empty((len(ids), *leaf.shape[1:]), leaf.dtype), shapes)
        for start in range(0, len(ids), self.batch_size):
            block = _columns(self._store.read(rows[start : start + self.batch_size]))
            for leaf, got in zip(jax.tree.leaves(host), jax.tree.leaves(block), strict=True):
                leaf[start : start + self.batch_size] = np.asarray(got)[: len(leaf) - start]
        return ids, host

    def upsert(self, ids: Any, features: ItemFeatures) -> ItemIndex:
        """A snapshot with some items new or changed.

        Args:
          ids: integers [n], or strings. Of an id that comes twice the last one counts.
          features: of the items, leading axis [n].

        Raises:
          TypeError, ValueError: features that do not fit the schema; nothing has changed then.
        """
        changed = raw_ids(ids, "ids")
        changed, features = checked(self.config, (changed, features))
        last = len(changed) - 1 - np.unique(changed[::-1], return_index=True)[1]
        if len(last) < len(changed):
            last = np.sort(last)
            changed, features = changed[last], jax.tree.map(lambda leaf: np.asarray(leaf)[last], features)
        if not len(changed):
            return self
        base = self._with_room(changed)
        old = base._view.lookup(changed)
        rows = base._store.take_rows(len(changed))
        try:
            base._store.encode(features, rows)
        except BaseException:
            base._store.give_back(rows)
            raise
        return base._next(changed, rows, old)

    def delete(self, ids: Any) -> ItemIndex:
        """A snapshot without some items. Ids that are not there are left out silently, so that a replay does no harm."""
        changed = np.unique(raw_ids(ids, "ids"))
        old = self._view.lookup(changed)
        changed, old = changed[old >= 0], old[old >= 0]
        if not len(changed):
            return self
        base = self if self._store.is_head(self) else self._fork(self.capacity)
        return base._next(changed, np.full(len(changed), -1, np.int32), base._view.lookup(changed))

    def save(self, path: str | Path, *, position: int = 0) -> None:
        """Writes this snapshot into a new folder, see `aif_jax.index.files.save`."""
        from aif_jax.index import files

        files.save(self, path, position=position)

    @staticmethod
    def load(path: str | Path, model: PreRanker, params: Params, **options: Any) -> ItemIndex:
        """Reads what `save` wrote, see `aif_jax.index.files.load`."""
        from aif_jax.index import files

        return files.load(path, model, params, **options)

    def compact(self, *, capacity: int | None = None) -> ItemIndex:
        """A copy with memory of its own, rows by ascending id from row 0 on.

        What it holds depends on the items alone, not on the history of updates: it equals the compact copy of a rebuild bit
        for bit. Costs a pass over the table. Use it to give memory back after many deletions.

        Args:
          capacity: rows of the new table; None takes the least that `build` would.
        """
        wanted = capacity_for(len(self), self.mesh) if capacity is None else capacity
        if wanted < len(self):
            raise ValueError(f"capacity: expected at least {len(self)}, got {wanted}")
        return self._fork(wanted)

    def _next(self, ids: np.ndarray, rows: np.ndarray, old: np.ndarray) -> ItemIndex:
        view, pages = self._store.ids.assign(self._view, ids, rows)
        count = self._count + int((rows >= 0).sum()) - int((old >= 0).sum())
        new = ItemIndex(self._store, view, count)
        self._store.commit(self, new, rows=old[old >= 0], pages=pages)
        return new

    def _with_room(self, ids: np.ndarray) -> ItemIndex:
        """This snapshot, or a copy of it that has free rows for these ids."""
        if self._store.is_head(self) and self._store.fits(len(ids)):
            return self
        least = len(self) + len(ids)
        return self._fork(max(self.capacity, capacity_for(least, self.mesh)))

    def _fork(self, capacity: int) -> ItemIndex:
        store, view = self._store.fork(self._view, capacity=capacity)
        new = ItemIndex(store, view, self._count)
        store.commit(None, new, rows=np.zeros(0, np.int32), pages=np.zeros(0, np.int32))
        return new


def capacity_for(items: int, mesh: Any = None) -> int:
    """Rows for so many items: an eighth more and 512, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two.

    Few capacities mean few shapes to compile for.
    """
    wanted = max(items * 9 // 8 + 512, 1024)
    quarter = max(1, 1 << (wanted.bit_length() - 3))
    rounded = -(-wanted // quarter) * quarter
    devices = 1 if mesh is None else mesh.size
    return -(-rounded // devices) * devices


def checked(config: Config, pair: tuple[np.ndarray, ItemFeatures]) -> tuple[np.ndarray, ItemFeatures]:
    """The pair with features in NumPy, or an error that says what does not fit."""
    ids, features = pair
    check_item_features(config.schema, features, batched=True)
    if len(features.floats) != len(ids):
        raise ValueError(f"features: expected {len(ids)} items like ids, got {len(features.floats)}")
    return ids, jax.tree.map(np.asarray, features)


def empty_features(config: Config) -> ItemFeatures:
    """Features of no items."""
    schema = config.schema
    return ItemFeatures(
        ids={a.name: np.zeros((0, a.length) if a.length > 1 else 0, np.int32) for a in schema.item_attributes},
        floats=np.zeros((0, schema.item_floats), np.float32),
        content=np.zeros((0, schema.content), np.float32) if schema.content else None,
        side={name: np.zeros(0, np.float32) for name in schema.side},
    )


def _plain_ids(ids: Any) -> np.ndarray:
    if isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.ndim == 1 and ids.flags.c_contiguous:
        return ids  # the reserved id is never found, so a request need not be searched for it
    return raw_ids(ids, "ids")


_columns = jax.jit(unpack)


@jax.jit
def _decode_stored(stored: Packed) -> Any:
    return decode(stored, jnp.arange(len(stored.words)))
