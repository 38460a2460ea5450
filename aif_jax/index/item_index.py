"""`ItemIndex`: an immutable snapshot of every item's row, the paper's N2O (nearline-to-online) table (arXiv 2511.12934).

Snapshots of one index share their memory, see `store.py`.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import VersionMismatch, expect, expect_array, expect_integer, expect_names
from aif_jax.encoding.vocabulary import IdKind
from aif_jax.export.consume.ids import first_of, hashed
from aif_jax.index.build import capacity_for, checked, fill, item_batches, rebatch
from aif_jax.index.ids import View, kind_of, last_of, raw_keys
from aif_jax.index.parts import RowVersion, opened, rows
from aif_jax.index.store import BATCH, ItemProgram, Store
from aif_jax.output import hidden
from aif_jax.store import sealed
from aif_jax.store.codec import Packed, Storage, decode, unpack
from aif_jax.store.folders import CheckpointError
from aif_jax.store.trained import Trained
from aif_jax.trees import leaves_by_path, take
from aif_jax.types import ItemFeatures

FORMAT = "aif_jax.index/4"
REBUILD = "build the index again: ItemIndex.build, run.index or aif-jax index build"
LAST, LAST_PARTITION = 2**63 - 1, 2**31 - 1  # what int64 positions and int32 partitions hold, as Kafka's do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an index on disk, without its arrays.

    Attributes:
      items: rows.
      ids: kind of the raw ids; None for an index that never had any.
      version: version of the params, config and encoder that made the rows.
      storage: how vectors are stored: "float32", "bfloat16" or "int8".
      batch_size: rows in one run of the function that made them.
      positions: positions in the update stream, by partition: every update up to there is in, none after it.
    """

    items: int
    ids: IdKind | None
    version: str
    storage: Storage
    batch_size: int
    positions: dict[int, int]


def inspect(path: str | Path) -> Manifest:
    """Read the manifest of a snapshot.

    Raises FileNotFoundError: nothing there; CheckpointError: torn, altered, no index, or written by another version.
    """
    record = sealed.inspect(path, format=FORMAT, rebuild=REBUILD)
    try:
        return Manifest(
            **{name: record[name] for name in ("items", "ids", "version", "storage", "batch_size")},
            positions=positions_by_partition({int(name): at for name, at in record["positions"].items()}),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: the record cannot be read: {error!r}; {REBUILD}") from error


def verify(path: str | Path) -> Manifest:
    """Read every array of a snapshot and compare it with its checksum; raises as `inspect`, also for altered arrays."""
    manifest = inspect(path)
    sealed.read(path, format=FORMAT, rebuild=REBUILD)
    return manifest


class ItemIndex:
    """A snapshot: which items there are, and their rows. Made by `ItemIndex.build`, never changed.

    `upsert` and `delete` return a new snapshot and leave this one as it is; they cost as much as the change, not as the
    catalogue. Snapshots may be read from any thread; one thread at a time makes new ones, from the latest. (An older one works
    too, at the cost of a copy of the whole table.) Raw ids are integers or strings; strings are stored as two hashes, 96 bits.

    Attributes:
      trained: model whose item function makes the rows, with its parameters on the device.
      version: version of that model.
      storage: how vectors are stored.
      capacity: rows of the table. Snapshots of one capacity and storage have arrays of the same shapes.
      kind: kind of the raw ids, "integers" or "strings"; None for an index that never had any.

    Example:
      >>> import jax, numpy as np, aif_jax as aif
      >>> from aif_jax.index import ItemIndex
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema))
      >>> def features(*items):
      ...     rows, none = np.asarray(items, np.int32), np.zeros((len(items), 0), np.float32)
      ...     return aif.ItemFeatures(ids={"item": rows, "category": rows % 3}, floats=none)
      >>> params = model.init(jax.random.key(0), aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4}))
      >>> index = ItemIndex.build(aif.Trained(model, params), [([10, 20, 30], features(1, 2, 3))], progress=False)
      >>> index.lookup([20, 99])[1].tolist()
      [True, False]
      >>> newer = index.upsert([99], features(4)).delete([10])
      >>> newer.ids.tolist(), index.ids.tolist()
      ([20, 30, 99], [10, 20, 30])
    """

    decode = staticmethod(decode)
    """`decode(table, rows)`: rows int32 [C] of a table as the interaction takes them, for use inside jit."""

    def __init__(self, store: Store, view: View):
        """Wrap the latest snapshot of a store. Not for callers: see `build`."""
        store.head = weakref.ref(self)
        self._store, self._view, self.trained = store, view, store.program.trained
        self.version, self.capacity = self.trained.version, store.capacity
        self.kind: IdKind | None = store.kind
        self.storage: Storage = store.program.storage

    @classmethod
    def build(
        cls,
        trained: Trained,
        catalogue: Catalogue | Iterable[Any] | str | Path,
        *,
        storage: Storage = "float32",
        batch_size: int = BATCH,
        capacity: int | None = None,
        progress: bool = True,
    ) -> Self:
        """Run the item function over a catalogue; host memory is bounded by a few batches and 20 to 30 bytes an item for ids.

        Args:
          trained: model whose item function runs. Features and catalogues that another encoder made are refused. Its parameters
            are held by reference, for updates.
          catalogue: a `Catalogue`; raw items as `aif.read` takes them; (raw ids [n], ItemFeatures [n]); or an iterable of raw
            items or such pairs. Raw items need the encoder.
          storage: storage of vectors: "float32" (exact), "bfloat16" or "int8" with a scale for each row.
          batch_size: items in one run of the item function. Rows may differ in the last bit between two batch sizes.
          capacity: rows of the table; None leaves an eighth free. For a stream of unknown length it saves copies of the table.

        Raises:
          TypeError, ValueError: ids that are neither integers nor strings or of both kinds, an id that comes twice, features
            that do not fit the schema, a catalogue larger than `capacity`.
          EncodingMismatch: features or a catalogue that another encoder made.
        """
        program = ItemProgram(trained, storage=storage, batch_size=batch_size)
        batches, known = item_batches(program, catalogue)
        computed = ((keys, program(features)) for keys, features in rebatch(batches, batch_size))
        with hidden(not progress):
            return cls(*fill(program, computed, capacity=capacity, known=known))

    @classmethod
    def load(cls, path: str | Path, trained: Trained) -> Self:
        """Read a snapshot, into the least table that `build` would make, and check that it belongs to a model.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError: torn or altered, not an index, or written by a newer version.
          VersionMismatch: other parameters, another config or encoder; names both versions.
        """
        manifest = inspect(path)
        if manifest.version != trained.version:
            raise VersionMismatch(f"index in {path}", expected=trained.version, got=manifest.version)
        trees = sealed.read(path, format=FORMAT, rebuild=REBUILD)
        ids = trees.get("ids", {})
        keys = ids.get("ids", np.zeros(0, np.int64))
        if manifest.ids == "strings" and len(keys):
            with sealed.as_checkpoint_error(path, REBUILD):
                keys = hashed(keys, ids.get("marks", keys), "ids")
        expect(len(keys) == manifest.items, f"{path}", f"{manifest.items} items", len(keys), error=CheckpointError)
        rows = leaves_by_path(trees.get("rows", {}), separator=".")
        sizes: dict[str, Any] = {"storage": manifest.storage, "batch_size": manifest.batch_size}
        return cls.of_rows(trained, keys, rows, kind=manifest.ids, **sizes)

    @classmethod
    def from_parts(cls, trained: Trained, parts: Iterable[Any], *, items: int | None = None, progress: bool = True) -> Self:
        """Merge rows that `engines.ItemJob` encoded, wherever it ran, in bounded memory; equals `build` bit for bit.

        Args:
          parts: Arrow record batches or tables, of any size, such as `pyarrow.dataset.dataset(folder).to_batches()`.
          items: how many there must be, so that a lost part is noticed; None takes what is there.

        Raises:
          ImportError: pyarrow is missing.
          VersionMismatch: rows of another version, storage or batch size, with batch and row.
          ValueError, TypeError: missing columns, rows of another width, an id that comes twice, with both positions among all
            rows, another number of items.
        """
        made_by, tables = opened(parts, RowVersion(trained.version, "float32", BATCH))
        program = ItemProgram(trained, storage=made_by.storage, batch_size=made_by.batch_size)
        encoded = rows(tables, made_by, width=program.shapes().words.shape[1])
        stored = ((keys, program.words(words)) for keys, words in rebatch(encoded, program.batch_size))
        with hidden(not progress):
            made = cls(*fill(program, stored, known=items))
        expect(items in (None, len(made)), "parts", f"{items} items", len(made))
        return made

    @classmethod
    def of_rows(
        cls, trained: Trained, keys: np.ndarray, rows: Any, *, kind: IdKind | None = None, **options: Any
    ) -> Self:  # fmt: skip
        """Return the index of distinct keys [n] and their rows, arrays [n] by dotted name: columns as the table has them.

        `kind` is that of the ids of an index without items, `options` are arguments of `ItemProgram`. Raises ValueError for
        columns other than those of the model's rows.
        """
        program = ItemProgram(trained, **options)
        wanted = leaves_by_path(program.columns(), separator=".")
        expect_names(rows, "rows", wanted)
        leaves = []
        for name, leaf in wanted.items():
            exported = (rows[name].dtype, leaf.dtype) == (np.float32, jnp.bfloat16)  # a block's, see `exported_item`
            values = rows[name].astype(leaf.dtype) if exported else rows[name]
            leaves.append(expect_array(values, name, dtype=leaf.dtype, shape=(len(keys), *leaf.shape[1:])))
        columns = jax.tree.unflatten(jax.tree.structure(program.columns()), leaves)
        batches = ((keys[part], program.packed(take(columns, part))) for part in program.parts(len(keys)))
        return cls(*fill(program, batches, known=len(keys), kind=kind))

    def save(self, path: str | Path, *, positions: Mapping[int, int] | None = None) -> None:
        """Write this snapshot into a new folder, which appears complete or not at all. Updates may continue.

        Args:
          path: a local folder that does not exist yet.
          positions: how far in the update stream the snapshot is, by partition.

        Raises:
          FileExistsError: something is there already; nothing is ever overwritten.
          ValueError: a URL; save to a local path, and `connectors.SnapshotStore` publishes the folder.
        """
        record = {"items": len(self), "version": self.version, "ids": self.kind, "storage": self.storage}
        record["batch_size"] = self._store.program.batch_size
        record["positions"] = {str(partition): at for partition, at in sorted(positions_by_partition(positions).items())}
        keys, rows = self._view.items()
        ids = {"ids": first_of(keys)} | ({"marks": keys["marks"]} if kind_of(keys) == "strings" else {})
        sealed.write(path, {"ids": ids, "rows": self._on_host(_columns, rows)}, record, format=FORMAT)

    def __len__(self) -> int:
        """Return items in this snapshot."""
        return self._view.length

    def __repr__(self) -> str:
        table = f"{len(self):,} items, capacity={self.capacity:,}, storage={self.storage!r}"
        return f"ItemIndex({table}, {self.bytes_per_row:.0f} bytes a row, version={self.version[:12]}...)"

    @property
    def ids(self) -> np.ndarray:
        """int64 [len(self)] ids, ascending; of strings their two hashes. Costs a pass over the id map."""
        return self._view.items()[0]

    @property
    def shapes(self) -> Packed:
        """Shapes and dtypes of the table, for ahead-of-time compilation."""
        with self.reading() as table:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), table)

    @property
    def bytes_per_row(self) -> float:
        """Device bytes of one row of the table."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes)) / max(self.capacity, 1)

    def reading(self) -> AbstractContextManager[Packed]:
        """Lock the stored rows for reading: `with index.reading() as table:` while a program that decodes them is dispatched.

        Leave the block once the compiled function has returned, also before its result is ready: updates wait for the block.
        Do not use the arrays afterwards, and do not enter it twice in one thread.
        """
        return self._store.reading()

    def lookup(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return rows int32 [C] of raw ids [C], -1 where this snapshot lacks the id, and mask bool [C], true where it has it.

        An int64 array of ids takes the least time.

        Raises:
          TypeError, ValueError: ids of another kind than the index has, or of mixed kinds; None; integers beyond int64.
        """
        plain = self.kind == "integers" and isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.ndim == 1
        # The reserved id is never found, so plain integers are looked up without a check for it.
        rows = self._view.lookup(ids if plain else raw_keys(ids, "ids", like=self.kind))
        return rows, rows >= 0

    def take(self, ids: Any) -> tuple[Any, np.ndarray]:
        """Return decoded rows of some items on the host [C], and the mask [C] of those that are there: to inspect an index."""
        rows, mask = self.lookup(ids)
        return self._on_host(_decode_stored, rows.clip(0)), mask

    def stored(self, *, decoded: bool = False) -> tuple[np.ndarray, Any]:
        """Return ids [n], see `ids`, and their rows [n] on the host: columns as the table has them, or decoded."""
        keys, rows = self._view.items()
        return keys, self._on_host(_decode_stored if decoded else _columns, rows)

    def upsert(self, ids: Any, features: ItemFeatures | None = None) -> "ItemIndex":
        """Return a snapshot with some items new or changed.

        Args:
          ids: raw ids [n]; of a repeated id the last entry counts. Without `features`: raw items as `aif.read` takes them.
          features: features of the items, leading axis [n].

        Raises:
          TypeError, ValueError: ids of another kind than the index has, features that do not fit the schema, raw items
            without an encoder; nothing has changed then.
          EncodingMismatch: features that another encoder made.
        """
        program = self._store.program
        keys, features = checked(program, ids, features, kind=self.kind)
        last = last_of(keys)
        if len(last) < len(keys):
            keys, features = take((keys, features), last)
        if not len(last):
            return self
        latest = self._store.head() is self and self._store.fits(keys)
        base = self if latest else self._copy(least=len(last), kind=kind_of(keys))
        rows = base._store.rows.take(len(last))
        try:
            for part in program.parts(len(last)):  # computed before it is put: a reader must not wait for it
                base._store.put(jax.block_until_ready(program(take(features, part))), rows[part])
            return base._next(keys, rows)
        except BaseException:
            base._store.rows.give_back(rows)
            raise

    def delete(self, ids: Any) -> "ItemIndex":
        """Return a snapshot without some items; unknown ids are ignored. TypeError for ids of another kind than the index's."""
        keys = raw_keys(ids, "ids", like=self.kind)
        keys = keys[last_of(keys)]
        keys = keys[self._view.lookup(keys) >= 0]
        if not len(keys):
            return self
        return (self if self._store.head() is self else self._copy())._next(keys, np.full(len(keys), -1, np.int32))

    def _next(self, keys: np.ndarray, rows: np.ndarray) -> "ItemIndex":
        view, *unread = self._store.ids.assign(self._view, keys, rows)
        self._store.retire(self, *unread)
        return ItemIndex(self._store, view)

    def _copy(self, *, least: int = 0, kind: IdKind | None = None) -> "ItemIndex":
        """Return a copy in new memory, rows by ascending key, with room for at least so many more items."""
        program, (keys, rows) = self._store.program, self._view.items()
        capacity = max(self.capacity, capacity_for(len(self) + least) if least else 0)
        batches = ((keys[part], self._store.read(rows[part])) for part in program.parts(len(rows)))
        return ItemIndex(*fill(program, batches, capacity=capacity, kind=self.kind or kind))

    def _on_host(self, run: Callable[[Packed], Any], rows: np.ndarray) -> Any:
        """Return what a compiled function makes of stored rows [n], on the host: a batch on the device at a time."""
        program = self._store.program
        shapes = jax.eval_shape(run, program.shapes())
        whole = jax.tree.map(lambda leaf: np.empty((len(rows), *leaf.shape[1:]), leaf.dtype), shapes)
        for part in program.parts(len(rows)):
            batch = run(self._store.read(rows[part]))
            for leaf, read in zip(jax.tree.leaves(whole), jax.tree.leaves(batch), strict=True):
                leaf[part] = np.asarray(read)[: len(leaf) - part.start]
        return whole


_columns = jax.jit(unpack)


@jax.jit
def _decode_stored(stored: Packed) -> Any:
    return decode(stored, jnp.arange(len(stored.words)))


def positions_by_partition(positions: Mapping[Any, Any] | None) -> dict[int, int]:
    """Return positions in a stream by partition, checked; {} of None. Raises TypeError, ValueError."""
    return {
        expect_integer(partition, "partition", least=0, most=LAST_PARTITION): expect_integer(at, "position", least=0, most=LAST)
        for partition, at in (positions or {}).items()
    }
