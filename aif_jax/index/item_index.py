"""`ItemIndex`: an immutable snapshot of every item's row, the paper's N2O (nearline-to-online) table (arXiv 2511.12934).

Snapshots of one index share their memory, see `store.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.encoder import Encoder
from aif_jax.index import files
from aif_jax.index.batches import ItemBatches, Reader, part
from aif_jax.index.build import BATCH, build_store, capacity_for
from aif_jax.index.idmap import View
from aif_jax.index.ids import Keys, raw_keys
from aif_jax.index.program import ItemProgram
from aif_jax.index.storage import Packed, Storage, decode, unpack
from aif_jax.index.store import Store
from aif_jax.model import PreRanker
from aif_jax.types import ItemFeatures, Params
from aif_jax.version import fingerprint
from aif_jax.vocabulary import Kind

NONE = np.zeros(0, np.int32)


class ItemIndex:
    """A snapshot: which items there are, and their rows. Made by `ItemIndex.build`, never changed.

    `upsert` and `delete` return a new snapshot and leave this one as it is; they cost as much as the change, not as the
    catalogue. Snapshots may be read from any thread; one thread at a time makes new ones, from the latest. (An older
    one works too, at the cost of a copy of the whole table.) Raw ids are integers or strings; strings are stored as hashes.

    Example:
      >>> import jax, numpy as np, aif_jax as aif
      >>> from aif_jax.index import ItemIndex
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema))
      >>> def features(*items):
      ...     rows, none = np.asarray(items, np.int32), np.zeros((len(items), 0), np.float32)
      ...     return aif.ItemFeatures(ids={"item": rows, "category": rows % 3}, floats=none)
      >>> params = model.init(jax.random.key(0), features(*range(9)))
      >>> index = ItemIndex.build(model, params, features(1, 2, 3), ids=[10, 20, 30], progress=False)
      >>> index.lookup([20, 99])[1].tolist()
      [True, False]
      >>> newer = index.upsert([99], features(4)).delete([10])
      >>> newer.ids.tolist(), index.ids.tolist()
      ([20, 30, 99], [10, 20, 30])
    """

    decode = staticmethod(decode)
    """`decode(table, rows)`: rows int32 [C] of a table as the interaction takes them, for use inside jit."""

    def __init__(self, store: Store, view: View, count: int, reader: Reader):
        """Not for callers: see `build`."""
        self._store = store
        self._view = view
        self._count = count
        self._reader = reader

    @classmethod
    def build(
        cls,
        model: PreRanker,
        params: Params,
        catalogue: Catalogue | ItemFeatures | ItemBatches | str | Path,
        *,
        encoder: Encoder | None = None,
        ids: Any = None,
        version: str | None = None,
        storage: Storage = "float32",
        batch_size: int = BATCH,
        capacity: int | None = None,
        mesh: Any = None,
        progress: bool = True,
    ) -> ItemIndex:
        """Runs the item function over a catalogue; host memory is bounded by a few batches and some 20 bytes an item for ids.

        Args:
          model: whose item function runs.
          params: of the model. Held by reference, for updates.
          catalogue: a `Catalogue`; the path of an items file (Parquet or CSV); an iterable of (raw ids [n], ItemFeatures [n])
            or of raw columns [n], such as Arrow record batches; or one `ItemFeatures` with `ids`. Files and raw columns need
            the `encoder`.
          encoder: of the model's checkpoint. Features that another encoder made are refused.
          ids: raw ids of the items of one `ItemFeatures`.
          version: of params, config and encoder; None computes `aif_jax.version.fingerprint`.
          storage: of vectors: "float32" (exact), "bfloat16" or "int8" with a scale for each row.
          batch_size: items in one run of the item function. Rows may differ in the last bit between two batch sizes.
          capacity: rows of the table; None leaves an eighth free. For a stream of unknown length it saves copies of the table.
          mesh: splits batches and table over its devices, see `aif_jax.sharding.row_mesh`.
          progress: a progress bar on stderr.

        Raises:
          TypeError, ValueError: ids that are neither integers nor strings or of both kinds, an id that comes twice, features
            that do not fit the schema, a catalogue larger than `capacity`.
          EncodingMismatch: features that another encoder made.
        """
        program = ItemProgram(model, params, storage=storage, batch_size=batch_size, mesh=mesh)
        version = fingerprint(params, model.config, encoder) if version is None else version
        reader = Reader(model.config, encoder)
        batches, known = reader.batches(catalogue, ids=ids, size=max(batch_size, 1 << 14))
        store, keys = build_store(program, batches, known, version=version, capacity=capacity, progress=progress)
        return cls._first(store, store.assign(keys, keys.kind), len(keys.key), reader)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreRanker,
        params: Params,
        *,
        encoder: Encoder | None = None,
        version: str | None = None,
        capacity: int | None = None,
        mesh: Any = None,
    ) -> ItemIndex:
        """Reads a snapshot and checks that it belongs to a model.

        Args:
          path: what `save` wrote.
          model, params, encoder, version: as in `build`; must be those that made the rows.
          capacity: rows of the table; None leaves an eighth free.
          mesh: to spread the table over.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError: torn or altered, not an index, or written by a newer version.
          ValueError: another config or schema; names the fields.
          EncodingMismatch, VersionMismatch: another encoder, other parameters; names both versions.
        """
        manifest = files.inspect(path)
        encoding = "" if encoder is None else encoder.version
        version = fingerprint(params, model.config, encoder) if version is None else version
        files.check_model(path, manifest, model.config, encoding=encoding, version=version)
        program = ItemProgram(model, params, storage=manifest.storage, batch_size=manifest.batch_size, mesh=mesh)
        keys, columns = files.read(path, manifest, jax.eval_shape(unpack, program.shapes()))
        store = Store(program, version=version, capacity=capacity_for(manifest.items, mesh, capacity))
        store.fill(columns, manifest.items)
        return cls._first(store, store.assign(keys, manifest.ids), manifest.items, Reader(model.config, encoder))

    def save(self, path: str | Path, *, positions: Mapping[int, int] | None = None) -> None:
        """Writes this snapshot into a new folder, which appears complete or not at all. Updates may continue.

        Args:
          path: a local folder that does not exist yet.
          positions: how far in the update stream the snapshot is, by partition.

        Raises:
          FileExistsError: something is there already; nothing is ever overwritten.
          ValueError: a URL: save to a local path, and copy the folder.
        """
        keys, columns = self._host_rows()
        files.write(
            path,
            keys,
            columns,
            files.Manifest(
                items=len(self),
                version=self.version,
                config=self.model.config,
                encoding=self.encoding,
                ids=self._store.ids.kind,
                storage=self.storage,
                batch_size=self._store.program.batch_size,
                positions=dict(positions or {}),
            ),
        )

    def __len__(self) -> int:
        """Items in this snapshot."""
        return self._count

    def __repr__(self) -> str:
        size = f"{self.bytes_per_row:.0f} bytes a row"
        table = f"{self._count:,} items, capacity={self.capacity:,}, storage={self.storage!r}, {size}"
        return f"ItemIndex({table}, version={self.version[:12]}...)"

    @property
    def version(self) -> str:
        """Fingerprint of params, config and encoder that made the rows."""
        return self._store.version

    @property
    def model(self) -> PreRanker:
        """The model whose item function makes the rows."""
        return self._store.program.model

    @property
    def params(self) -> Params:
        """Parameters that make the rows."""
        return self._store.program.params

    @property
    def encoder(self) -> Encoder | None:
        """What turns raw items into features; None where the index takes features alone."""
        return self._reader.encoder

    @property
    def encoding(self) -> str:
        """Version of the encoder, "" without one."""
        return "" if self.encoder is None else self.encoder.version

    @property
    def storage(self) -> Storage:
        """How vectors are stored."""
        return self._store.program.storage

    @property
    def capacity(self) -> int:
        """Rows of the table. Snapshots of one capacity and storage have arrays of the same shapes."""
        return self._store.capacity

    @property
    def kind(self) -> Kind | None:
        """What the raw ids are, "integers" or "strings"; None for an index that never had any."""
        return self._store.ids.kind

    @property
    def ids(self) -> np.ndarray:
        """int64 [len(self)] ids, ascending; of strings their hashes, as `string_ids`. Costs a pass over the id map."""
        return self._view.items()[0].key

    @property
    def shapes(self) -> Packed:
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

    def reading(self) -> AbstractContextManager[Packed]:
        """`with index.reading() as table:` lends the stored rows, for `decode`, while a computation on them is dispatched.

        Leave the block once the compiled function has returned, also before its result is ready: updates wait for the block.
        Do not use the arrays afterwards, and do not enter it twice in one thread.
        """
        return self._store.reading()

    def copy_table(self) -> Packed:
        """A copy of the stored rows [capacity, ...] on the device, yours to keep."""
        return self._store.copy_table()

    def lookup(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows int32 [C] of raw ids [C], -1 where this snapshot lacks the id, and mask bool [C], true where it has it.

        An int64 array of ids takes the least time.

        Raises:
          TypeError: ids of another kind than the index has, or of mixed kinds; None; integers beyond int64.
        """
        kind = self._store.ids.kind
        if kind == "integers" and isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.ndim == 1:
            keys = Keys(ids)  # the reserved id is never found, so a request need not be searched for it
        else:
            keys = raw_keys(ids, "ids", like=kind)
        rows = self._view.lookup(keys)
        return rows, rows >= 0

    def take(self, ids: Any) -> tuple[Any, np.ndarray]:
        """The decoded rows of some items on the host [C], and the mask [C] of those that are there: to inspect an index."""
        rows, mask = self.lookup(ids)
        size = self._store.program.batch_size
        parts = [_decode_stored(self._store.read(rows[i : i + size].clip(0))) for i in range(0, max(len(rows), 1), size)]
        whole = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves])[: len(rows)], *parts)
        return whole, mask

    def stored(self) -> tuple[np.ndarray, Any]:
        """ids int64 [n], ascending, and the columns of their rows [n] on the host, as compact as the table has them."""
        keys, columns = self._host_rows()
        return keys.key, columns

    def upsert(self, ids: Any, features: ItemFeatures | None = None) -> ItemIndex:
        """A snapshot with some items new or changed.

        Args:
          ids: raw ids [n]; of a repeated id the last entry counts. Without `features`: raw columns [n] as the items file
            has them: a mapping, an Arrow batch or table, or a list of records.
          features: of the items, leading axis [n].

        Raises:
          TypeError, ValueError: ids of another kind than the index has, features that do not fit the schema, raw columns
            without an encoder; nothing has changed then.
          EncodingMismatch: features that another encoder made.
        """
        keys, features = self._reader.pair(ids, features, kind=self._store.ids.kind)
        last = keys.last("ids")
        if len(last) < len(keys.key):
            keys, features = part(keys, features, last)
        if not len(last):
            return self
        base = self if self._store.is_head(self) and self._store.fits(keys) else self._copy(least=len(last), kind=keys.kind)
        old = base._view.lookup(keys)
        rows = base._store.take_rows(len(last))
        try:
            base._store.encode(features, rows)
            return base._next(keys, rows, old)
        except BaseException:
            base._store.give_back(rows)
            raise

    def delete(self, ids: Any) -> ItemIndex:
        """A snapshot without some items. Unknown ids are ignored, so a replay does no harm.

        Raises:
          TypeError: ids of another kind than the index has.
        """
        keys = raw_keys(ids, "ids", like=self._store.ids.kind)
        keys = keys.take(keys.last("ids"))
        keys = keys.take(self._view.lookup(keys) >= 0)
        if not len(keys.key):
            return self
        base = self if self._store.is_head(self) else self._copy()
        return base._next(keys, np.full(len(keys.key), -1, np.int32), base._view.lookup(keys))

    def compact(self, *, capacity: int | None = None) -> ItemIndex:
        """A copy in new memory, rows by ascending id from row 0 on.

        What it holds depends on the items alone, not on the history of updates: it equals the compact copy of a rebuild bit
        for bit. Costs a pass over the table. Use it to give memory back after many deletions.

        Args:
          capacity: rows of the new table; None takes the least that `build` would.
        """
        return self._copy(capacity=capacity_for(len(self), self._store.program.mesh, capacity))

    @classmethod
    def _first(cls, store: Store, view: View, count: int, reader: Reader) -> ItemIndex:
        """The first snapshot of a store."""
        index = cls(store, view, count, reader)
        store.commit(None, index, rows=NONE, pages=NONE)
        return index

    def _next(self, keys: Keys, rows: np.ndarray, old: np.ndarray) -> ItemIndex:
        view, pages = self._store.ids.assign(self._view, keys, rows)
        count = self._count + int((rows >= 0).sum()) - int((old >= 0).sum())
        index = ItemIndex(self._store, view, count, self._reader)
        self._store.commit(self, index, rows=old[old >= 0], pages=pages)
        return index

    def _copy(self, *, least: int = 0, capacity: int | None = None, kind: Any = None) -> ItemIndex:
        """A copy in new memory with room for at least so many more items."""
        if capacity is None:
            capacity = max(self.capacity, capacity_for(len(self) + least, self._store.program.mesh) if least else 0)
        store, view = self._store.copy(self._view, capacity=capacity, kind=self._store.ids.kind or kind)
        return ItemIndex._first(store, view, self._count, self._reader)

    def _host_rows(self) -> tuple[Keys, Any]:
        keys, rows = self._view.items()
        shapes = jax.eval_shape(unpack, self.shapes)
        columns = jax.tree.map(lambda leaf: np.empty((len(rows), *leaf.shape[1:]), leaf.dtype), shapes)
        size = self._store.program.batch_size
        for start in range(0, len(rows), size):
            block = _columns(self._store.read(rows[start : start + size]))
            for leaf, read in zip(jax.tree.leaves(columns), jax.tree.leaves(block), strict=True):
                leaf[start : start + size] = np.asarray(read)[: len(leaf) - start]
        return keys, columns


_columns = jax.jit(unpack)


@jax.jit
def _decode_stored(stored: Packed) -> Any:
    return decode(stored, jnp.arange(len(stored.words)))
