"""`Delta`: what a short training moved, published in place of a whole export.

    export --delta 1--> version --delta 2--> version          towers and head stay; rows of embedding tables move

A delta names the version that it builds on, and holds the embedding rows that moved and what follows from them: the index rows
of the items that read one of those, and the rows of users whose history does. Applied to that version it gives the model, the
index and the user table that a full rebuild gives, bit for bit, and they change together or not at all.

It may also admit items into free rows of a vocabulary of fixed size. Then the version behind it has another encoder, which
travels in the model: features of a request are encoded by the encoder of the version that answers it. No shape changes.

Its cost is that of what moved: making it runs the item function over the items that moved, applying it writes their rows next
to the old ones. In addition each application copies the tables that moved once, in the memory of the device, because requests
under way read the old ones; and models whose user state streams search the log for the users of these items.

The version behind a delta is a digest of the version before it and of the rows: a chain, as commits are. A full export of the
same parameters has the fingerprint of its contents, which is another string.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import VersionMismatch, check_encoding, expect, expect_array, expect_finite
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS, EventLog
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.export.functions import named
from aif_jax.index import ItemIndex
from aif_jax.index.build import BATCH
from aif_jax.index.ids import Keys, raw_keys
from aif_jax.index.store import ItemProgram
from aif_jax.model import fit_new
from aif_jax.schema import Attribute
from aif_jax.store import sealed
from aif_jax.store.codec import unpack
from aif_jax.store.folders import CheckpointError
from aif_jax.store.trained import Trained
from aif_jax.store.version import digest
from aif_jax.trees import leaves_by_path
from aif_jax.types import ItemFeatures, Params
from aif_jax.user_table import Stored, UserTable

FORMAT, REBUILD = "aif_jax.delta/1", "publish it again"
SMALLEST = 256  # rows that are put into a table at once are padded to a power of two from this on


class MovedRows(NamedTuple):
    """Rows of one embedding table.

    Attributes:
      at, values: int32 [n], ascending, and float32 [n, D].
    """

    at: np.ndarray
    values: np.ndarray


class UserRows(NamedTuple):
    """Rows of some users in a `UserTable`.

    Attributes:
      users, rows: raw ids [n], and their rows [n].
    """

    users: list[Any]
    rows: Stored


class AdmittedItems(NamedTuple):
    """Items that get a row of the encoder.

    Attributes:
      ids: the n items and their rows, as a vocabulary of the fixed size of the encoder's.
      fitted: their rows [n] of the model's fitted tables, in the order of `ids.raw`, see `model.fit_new`.
      encoding: version of the encoder that has them.
    """

    ids: Vocabulary
    fitted: Params
    encoding: str

    @classmethod
    def make(cls, base: Trained, ids: Vocabulary, items: ItemFeatures) -> AdmittedItems:
        """Those of features [n] in the order of `ids.raw`. Raises ValueError for rows that are not free, or no encoder."""
        fitted = jax.tree.map(np.asarray, fit_new(base.params, items, base.config))
        return cls(ids, fitted, base.need_encoder("AdmittedItems").with_items(ids).version)

    def trained(self, base: Trained) -> Trained:
        """The model with these items. Raises ValueError for one in which they have no place, or that has them."""
        encoder = base.need_encoder("delta with new items").with_items(self.ids)
        expect(encoder.version == self.encoding, "delta, new items", f"the encoder {self.encoding}", encoder.version)
        fitted = dict(base.params["fitted"])
        for group, tables in self.fitted.items():
            shapes = {
                name: [np.shape(rows), (len(self.ids.raw), *fitted[group][name].shape[1:])] for name, rows in tables.items()
            }
            fits = all(got == wanted for got, wanted in shapes.values())
            expect(fits, f"delta, new items, {group!r}", "a row for each of them", shapes)
            put = {name: _with_rows(fitted[group][name], MovedRows(self.ids.rows, rows)) for name, rows in tables.items()}
            fitted[group] = {**fitted[group], **put}
        model = base.model._replace(config=base.config.with_encoding(encoder.version))
        return base.replace(model=model, params={**base.params, "fitted": fitted}, encoder=encoder)


class WrongBase(VersionMismatch):
    """A delta that builds on another version."""

    MESSAGE = (
        "{what}: expected one that builds on version {expected}, got one on {got}; apply the deltas between them first, in "
        "their order, or load the export that the chain begins with"
    )


class DeltaApplied(NamedTuple):
    """What serves after a delta.

    Attributes:
      trained, item_index, user_table: model, item index and user table after it; None for what the export lacks.
    """

    trained: Trained
    item_index: ItemIndex | None
    user_table: UserTable | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """What moved between two versions of a model.

    Attributes:
      base: version that it builds on.
      encoding: version of the encoder of the base, and without new items of both.
      number: place in its chain; 1 builds on an export.
      rows: rows of embedding tables by name of the table, at least one.
      items: keys [n] of the items whose index rows follow.
      item_rows: their rows by dotted name, decoded, each [n, ...], as an export has them.
      users: users whose rows follow; None for a chain without a user table.
      admitted: items that get a row of the encoder, whose index rows follow too; None for none.

    Raises:
      ValueError: nothing that moved, rows that are not ascending, arrays that do not fit together, values that are not finite.
    """

    base: str
    encoding: str
    number: int
    rows: Mapping[str, MovedRows]
    items: Keys
    item_rows: Mapping[str, np.ndarray]
    users: UserRows | None = None
    admitted: AdmittedItems | None = None

    def __post_init__(self):
        expect(self.number >= 1, "Delta.number", "at least 1", self.number)
        expect(len(self.rows) > 0, "Delta.rows", "rows of at least one table", "none; add some")
        for name, rows in self.rows.items():
            at = expect_array(rows.at, f"Delta.rows {name!r}", dtype=np.int32, shape=(None,))
            ascending = len(at) > 0 and at[0] >= 0 and (np.diff(at) > 0).all()
            expect(ascending, f"Delta.rows {name!r}", "ascending rows, at least one", at)
            values = expect_array(rows.values, f"Delta.rows {name!r}", dtype=np.float32, shape=(len(at), None))
            expect_finite(values, f"Delta.rows {name!r}")
        for name, values in self.item_rows.items():
            expect(len(values) == len(self.items.key), f"Delta.item_rows {name!r}", f"{len(self.items.key)} rows", len(values))

    @functools.cached_property
    def version(self) -> str:
        """The version behind it: a digest of the base and of the rows that moved, which decide everything else."""
        rows = {name: [dataclasses.astuple(digest(leaf)) for leaf in rows] for name, rows in sorted(self.rows.items())}
        parts: dict[str, Any] = {"base": self.base, "rows": rows}
        if self.admitted is not None:
            fitted = {path: dataclasses.astuple(digest(leaf)) for path, leaf in leaves_by_path(self.admitted.fitted).items()}
            parts["admitted"] = {"encoding": self.admitted.encoding, "fitted": fitted}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        moved = ", ".join(f"{len(rows.at):,} rows of {name}" for name, rows in self.rows.items())
        users = "" if self.users is None else f", {len(self.users.users):,} users"
        versions = f"{self.base[:12]} -> {self.version[:12]}"
        new = "" if self.admitted is None else f", {len(self.admitted.ids.raw):,} of them new"
        return f"Delta({self.number}: {versions}, {moved}, {len(self.items.key):,} items{new}{users})"

    @classmethod
    def make(
        cls, base: Trained, rows: Mapping[str, MovedRows], catalogue: Catalogue,
        *, number: int = 1, events: Dataset | None = None, also: Any = (), admitted: AdmittedItems | None = None,
    ) -> Delta:  # fmt: skip
        """The delta of rows that moved: recomputes the index rows of the items, and the rows of the users, that read one.

        Args:
          base: model that it builds on, of the version that serves.
          rows: the rows after training, by table; a table without rows may be left out.
          catalogue: features of the items, as the index of the export was built from, and of those that are admitted.
          number: place in the chain.
          events: the log with every user's whole history, for a chain with a user table; None for none.
          also: user rows of `events` whose histories have new events since the version before.
          admitted: items that get a row; `catalogue` and `events` are of the encoder that has them.

        Raises:
          ValueError: as the class; a model with item statistics, whose index rows move with time too.
          EncodingMismatch: a catalogue or events of another encoder.
        """
        schema = base.config.schema
        out = "publish a full refresh for a model with item_statistics: its index rows move with time too"
        expect(not schema.item_statistics, "Delta.make", "a model whose index rows depend on its parameters alone", out)
        encoding = base.encoding if admitted is None else admitted.encoding
        check_encoding("Catalogue", expected=encoding, got=catalogue.encoding)
        rows = {name: moved for name, moved in rows.items() if len(moved.at)}
        for name, moved in rows.items():
            way_out = "row 0; leave it out: items without a row read it, and their index rows are not known here"
            expect(moved.at[0] > 0, f"Delta.rows {name!r}", "rows from 1 on", way_out)
        made = cls(base=base.version, encoding=base.encoding, number=number, rows=rows, items=Keys(np.zeros(0, np.int64)),
                   item_rows={}, admitted=admitted)  # fmt: skip
        after = made.trained(base)
        new = np.zeros(len(catalogue), bool)
        if admitted is not None:
            new[admitted.ids.rows] = True
        tables = base.params["embedding"]
        masks = {name: np.isin(np.arange(len(tables[name])), each.at) for name, each in rows.items()}  # which rows moved
        of_items = new | _items_that_read(masks, schema.item_attributes, catalogue)
        raw_rows = np.arange(1, len(catalogue.raw) + 1) if catalogue.rows is None else np.asarray(catalogue.rows)
        chosen = np.flatnonzero(of_items[raw_rows])
        items = catalogue.features(raw_rows[chosen])
        keys = raw_keys(catalogue.raw[chosen], "ids") if len(chosen) else Keys(np.zeros(0, np.int64))
        users = None if events is None else _user_rows(masks, after, new, events, also)
        return dataclasses.replace(made, items=keys, item_rows=_item_rows(after, items, len(chosen)), users=users)

    def trained(self, base: Trained) -> Trained:
        """The model behind it. Raises WrongBase for one of another version than `base`."""
        self._expect_base("delta", base.version)
        check_encoding("delta", expected=base.encoding, got=self.encoding)
        base = base if self.admitted is None else self.admitted.trained(base)
        tables = dict(base.params["embedding"])
        for name, rows in self.rows.items():
            expect(name in tables, "delta", f"tables among {sorted(tables)}", repr(name))
            fits = rows.values.shape[1:] == tables[name].shape[1:] and rows.at[-1] < tables[name].shape[0]
            expect(fits, f"delta, table {name!r}", f"rows of {list(tables[name].shape)}", [rows.at[-1], *rows.values.shape[1:]])
            tables[name] = _with_rows(tables[name], rows)
        return base.replace(params={**base.params, "embedding": tables}).with_version(self.version)

    def apply(self, trained: Trained, index: ItemIndex | None = None, users: UserTable | None = None) -> DeltaApplied:
        """Model, index and user table behind it; those given stay as they are, for requests that began with them.

        Applied to what is behind it already, it returns just that.

        Args:
          trained: model of the version `base`.
          index: index of the same version; None for none.
          users: its user table, which nothing else updates; None for none.

        Raises:
          WrongBase: a model, an index or a table of another version.
          ValueError: a user table, and a delta without rows of users; an index or a table that cannot take rows.
        """
        parts = [("index", index), ("user table", users)]
        if trained.version == self.version and all(part is None or part.version == self.version for _, part in parts):
            return DeltaApplied(trained, index, users)
        for what, part in parts:
            if part is not None:
                self._expect_base(f"delta for {what}", part.version)
        after = self.trained(trained)
        if users is not None and self.users is None:
            out = "publish a full refresh with user_table, and deltas from there on"
            raise ValueError(f"delta: expected one with rows of users for a user table, got one without; {out}")
        table = None if users is None or self.users is None else users.moved(after, *self.users)
        new = None if self.admitted is None else np.isin(self.items.key, raw_keys(self.admitted.ids.raw, "ids").key)
        moved = None if index is None else index.moved(after, self.items, self.item_rows, new=new)  # last: it cannot be undone
        return DeltaApplied(after, moved, table)

    def save(self, path: str | Path) -> None:
        """Writes it into a new folder, which appears complete or not at all. FileExistsError where something is there."""
        trees: dict[str, Any] = {"rows": {name: rows._asdict() for name, rows in self.rows.items()}}
        trees["items"] = {"keys": self.items.key} | ({} if self.items.mark is None else {"marks": self.items.mark})
        trees["item_rows"] = dict(self.item_rows)
        if self.users is not None:
            known = Vocabulary(self.users.users)
            order = np.argsort(known.encode(self.users.users))
            trees["users"] = {"ids": known.to_arrays(), "rows": self.users.rows.take(order)._asdict()}
        record = {"base": self.base, "version": self.version, "encoding": self.encoding, "number": self.number}
        if self.admitted is not None:
            trees["admitted"] = {"ids": self.admitted.ids.to_arrays(), "fitted": self.admitted.fitted}
            record["admitted"] = self.admitted.encoding
        sealed.write(path, trees, record | {"user_table": self.users is not None}, format=FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """The delta in a folder.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError: torn or altered, not a delta.
        """
        record, trees = inspect(path), sealed.read(path, format=FORMAT, rebuild=REBUILD)
        try:
            users = None
            if record["user_table"]:
                users = UserRows(Vocabulary.from_arrays(trees["users"]["ids"]).raw.tolist(), Stored(**trees["users"]["rows"]))
            admitted = None
            if "admitted" in record:
                new = trees["admitted"]
                admitted = AdmittedItems(Vocabulary.from_arrays(new["ids"]), new["fitted"], record["admitted"])
            delta = cls(
                admitted=admitted, base=record["base"], encoding=record["encoding"], number=record["number"], users=users,
                rows={name: MovedRows(**rows) for name, rows in trees["rows"].items()},
                items=Keys(trees["items"]["keys"], trees["items"].get("marks")), item_rows=trees.get("item_rows", {}),
            )  # fmt: skip
            expect(delta.version == record["version"], "version", record["version"], delta.version)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: expected a delta, got other contents: {error}; {REBUILD}") from error
        return delta

    def _expect_base(self, what: str, version: str) -> None:
        if version != self.base:
            raise WrongBase(what, expected=version, got=self.base)


def inspect(path: str | Path) -> dict[str, Any]:
    """The record of a delta in a folder, "base" and "version" in it; reads no arrays. Raises as `Delta.load`."""
    return sealed.inspect(path, format=FORMAT, rebuild=REBUILD)


class Chain:
    """The deltas in a folder by the version that they build on; folders that come later are found by the next look.

    Args:
      folder: holds a folder for each delta, such as what `SnapshotStore.fetch` leaves; it may be missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}  # records by name

    def on(self, version: str) -> dict[str, Path]:
        """The deltas that build on a version, directly or on one another, in order: their folders by version.

        Where two build on the same version, the one that was published last counts. Raises as `Delta.load`.
        """
        names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".") if self.folder.is_dir() else []
        self._known = {name: self._known.get(name) or inspect(self.folder / name) for name in names}
        after = {record["base"]: (record["version"], self.folder / name) for name, record in self._known.items()}
        found: dict[str, Path] = {}
        while version in after:  # a version is a digest of the one before it, so there is no circle
            version, path = after[version]
            found[version] = path
        return found


def _with_rows(table: Any, rows: MovedRows) -> jax.Array:
    """A copy of a table with some rows replaced; compiled for a few numbers of rows."""
    size = max(SMALLEST, 1 << (len(rows.at) - 1).bit_length())
    at = np.full(size, table.shape[0], np.int32)  # out of range: dropped
    at[: len(rows.at)] = rows.at
    values = np.zeros((size, *rows.values.shape[1:]), rows.values.dtype)
    values[: len(rows.at)] = rows.values
    return _put(jnp.asarray(table), at, values)


@jax.jit
def _put(table: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    return table.at[at].set(values.astype(table.dtype), mode="drop")


_columns = jax.jit(unpack)


def _item_rows(after: Trained, items: ItemFeatures, count: int) -> dict[str, np.ndarray]:
    """Rows of items [count] by dotted name, made in batches of the size of an index, so that they equal its rows to the bit."""
    program = ItemProgram(after, storage="float32", batch_size=BATCH, mesh=None)
    parts = []
    for start in range(0, max(count, 1), BATCH):
        some = jax.tree.map(lambda leaf, start=start: np.asarray(leaf)[start : start + BATCH], items)
        made = _columns(program(dataclasses.replace(some, encoding="")))
        parts.append(jax.tree.map(lambda leaf, start=start: np.asarray(leaf)[: count - start], made))
    return dict(named(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)))


def _items_that_read(masks: Mapping[str, np.ndarray], attributes: Iterable[Attribute], catalogue: Catalogue) -> np.ndarray:
    """bool [N] in which catalogue rows the embedding row of one of the attributes moved."""
    reads = np.zeros(len(catalogue), bool)
    for attribute in attributes:
        if attribute.table_name in masks:
            hit = masks[attribute.table_name][np.asarray(catalogue.ids[attribute.name])]
            reads |= hit if hit.ndim == 1 else hit.any(axis=1)
    return reads


def _user_rows(masks: Mapping[str, np.ndarray], after: Trained, new: np.ndarray, events: Dataset, also: Any) -> UserRows:
    """Rows of the users who have met a new item, or one that moved if the model's blocks keep sums, and of those in `also`."""
    check_encoding("events", expected=after.encoding, got=events.encoding)
    log, chosen = events.log, np.zeros(len(events.users), bool)
    chosen[np.asarray(also, np.int64)] = True
    chosen[log.user[new[log.item]]] = True
    if any(block.streams for block in after.config.blocks):
        fields = map(after.config.schema.item_attribute, after.config.schema.behaviour_fields)
        chosen[log.user[_items_that_read(masks, fields, events.catalogue)[log.item]]] = True
    some = chosen[log.user]
    part = EventLog.from_arrays(*(getattr(log, name)[some] for name in COLUMNS), users=log.users)
    table = UserTable.build(after, dataclasses.replace(events, log=part), clock=None, progress=False)
    users = list(table.rows.of)  # type: ignore[attr-defined]  # in this process
    return UserRows(users, table.rows.get(users))
