"""Items without a row that get a free one between two full refreshes: which, when, and with which features.

Events hold *codes* of items: below `size` the row that the export's encoder gives, from `size` on the number of an item that it
lacks, in the order in which these came. A row that was given stays, so a code means one item in all versions of a chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import expect
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.encoding.capacity import Capacity, add_counts, assign
from aif_jax.encoding.encoder import Encoder, schema_of
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.export import AdmittedItems
from aif_jax.readers import load_columns, read, read_items
from aif_jax.readers.sources import Source
from aif_jax.readers.tables import Content
from aif_jax.store.trained import Trained
from aif_jax.trees import take
from aif_jax.types import ItemFeatures


class NewItems(NamedTuple):
    """Items that a micro-batch admits, and their features [n] under the new encoder."""

    items: AdmittedItems
    features: ItemFeatures


class Admission:
    """The items of a chain that its export's encoder lacks, and the rule by which they get a row.

    Args:
      encoder: encoder of the export, whose item vocabulary has a fixed size.
      items: items file with the features of the items that get a row; read again when there are such.
      content: see `read`.
      after: events, of the files and the stream, after which an item gets a row.
      say: prints a line.

    Raises:
      ValueError: a vocabulary that is not of fixed size, no items file, a number below 1.
    """

    def __init__(self, encoder: Encoder, items: Source | None, content: Content | None, after: int, say: Callable[[str], None]):
        vocabulary = encoder.vocabularies["item"]
        out = "one that grows; publish a full refresh of a Dataset whose encoder is that of readers.admit"
        expect(vocabulary.fixed, "admit_after", "a model with an item vocabulary of fixed size", out)
        expect(items is not None, "admit_after", "events and items as files or tables", "a Dataset")
        expect(after >= 1, "admit_after", "at least 1 event", after)
        self.encoder, self.size = encoder, len(vocabulary)
        self._items, self._content, self._after, self._say = items, content, after, say
        self._codes: dict[Any, int] = {}

    @property
    def ids(self) -> list[Any]:
        """Raw ids of the codes from `size` on."""
        return list(self._codes)

    def encode(self, raw: Any) -> np.ndarray:
        """Codes int32 [n] of raw item ids; new ones are noted."""
        raw = raw.tolist() if isinstance(raw, np.ndarray) else raw
        codes = self.encoder.vocabularies["item"].encode(raw)
        for at in np.flatnonzero(codes == 0):
            codes[at] = self._codes.setdefault(raw[at], self.size + len(self._codes))
        return codes

    def rows(self, encoder: Encoder) -> np.ndarray:
        """int32 [codes] the row of each code under a later encoder of the chain, 0 for none."""
        more = encoder.vocabularies["item"].encode(self.ids) if self._codes else np.zeros(0, np.int32)
        return np.append(np.arange(self.size, dtype=np.int32), more)

    def to_arrays(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """The ids behind some codes, as arrays: another process may give the items other codes."""
        numbers = np.unique(codes[codes >= self.size]) - self.size
        ids = self.ids
        named = Vocabulary([ids[number] for number in numbers], rows=(numbers + 1).astype(np.int32), size=len(ids) + 1)
        return named.to_arrays()

    def from_arrays(self, codes: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The codes here of those that `to_arrays` was given."""
        named, codes = Vocabulary.from_arrays(arrays), codes.copy()
        new = codes >= self.size
        if new.any():
            codes[new] = self.encode(named.ids_of(codes[new] - self.size + 1))
        return codes

    def read(self, events: Source, users: Source | None, *, progress: bool) -> tuple[Dataset, EventLog]:
        """The data under the export's encoder, and its log with codes in place of rows."""
        columns, own = self.encoder.columns, self.encoder.vocabularies["item"]
        self.encode(Vocabulary(load_columns(events, {columns.item: "id"}, columns=columns)[columns.item]).raw)
        more = np.arange(self.size, self.size + len(self._codes), dtype=np.int32)
        ids = [*own.raw.tolist(), *self._codes]
        wide = Vocabulary(ids, rows=np.append(own.rows, more), size=self.size + len(more))
        vocabularies = {**self.encoder.vocabularies, "item": wide}
        schema = schema_of(columns, vocabularies, content=self.encoder.schema.content)
        encoder = dataclasses.replace(self.encoder, schema=schema, vocabularies=vocabularies)
        data = read(
            events, items=self._items, users=users, encoder=encoder, content=self._content, unknown="skip", progress=progress
        )
        catalogue = _catalogue(self.encoder, take(data.catalogue.items, slice(self.size)))
        log = dataclasses.replace(data.log, item=np.where(data.log.item < self.size, data.log.item, 0))
        parts: dict[str, Any] = {"schema": self.encoder.schema, "catalogue": catalogue, "items": own, "log": log}
        return dataclasses.replace(data, encoder=self.encoder, **parts), data.log

    def new_items(self, codes: np.ndarray, times: np.ndarray, trained: Trained) -> NewItems | None:
        """The items that get a row now: known to the items file, with enough events, those seen last where few rows are free.

        Args:
          codes, times: item code and time of each event.
          trained: model of the last published version.
        """
        encoder, count, ids = trained.need_encoder("follow"), self.size + len(self._codes), self.ids
        last, counts = np.zeros(count, np.int64), np.bincount(codes, minlength=count)
        np.maximum.at(last, codes, times)
        wanted = self.size + np.flatnonzero(((counts >= self._after) & (self.rows(encoder) == 0))[self.size :])
        raw, features = self._features([ids[code - self.size] for code in wanted])
        if not raw:
            return None
        at = np.array([self._codes[each] for each in raw])
        rule = Capacity(rows=self.size - 1, admit_after=self._after, when_full="refuse")
        seen = add_counts(None, raw, last[at], counts[at])
        assigned, turnover = assign(encoder.vocabularies["item"], seen, rule, now=int(times.max()))
        if turnover.refused:
            way_out = "they stay unknown until the next full refresh"
            self._say(f"refresh: no row is free for {turnover.refused:,} of {len(raw):,} new items; {way_out}")
        rows = assigned.encode(raw)
        if not rows.any():
            return None
        features = take(dataclasses.replace(features, ids={**features.ids, "item": rows}), rows > 0)
        named = [each for each, row in zip(raw, rows, strict=True) if row]
        more = Vocabulary(named, rows=rows[rows > 0], size=self.size)
        return NewItems(AdmittedItems.make(trained, more, features), features)

    def _features(self, ids: list[Any]) -> tuple[list[Any], Any]:
        """Those of the ids that the items file has, ascending, and their features."""
        wanted, places, parts = Vocabulary(ids), [], []
        for raw, features in read_items(self._items, self.encoder, content=self._content) if ids else ():  # type: ignore[arg-type]
            place = wanted.encode(raw)
            at = np.flatnonzero(place)
            places.append(place[at])
            parts.append(take(dataclasses.replace(features, encoding=""), at))
        if not places:
            return [], None
        place = np.concatenate(places)
        order = np.argsort(place)
        features = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *parts)
        return wanted.ids_of(place[order]).tolist(), features


def with_items(catalogue: Catalogue, encoder: Encoder, new: NewItems) -> Catalogue:
    """The catalogue of the next encoder, with the features of the items that it admits."""

    def put(table: np.ndarray, values: np.ndarray) -> np.ndarray:
        table = table.copy()
        table[new.items.ids.rows] = values
        return table

    return _catalogue(encoder, jax.tree.map(put, catalogue.items, dataclasses.replace(new.features, encoding="")))


def _catalogue(encoder: Encoder, items: ItemFeatures) -> Catalogue:
    known = encoder.vocabularies["item"]
    parts = {"ids": items.ids, "floats": items.floats, "content": items.content, "side": items.side}
    return Catalogue(schema=encoder.schema, raw=known.raw, rows=known.rows, **parts)
