"""Keys to table rows: a hash table in NumPy whose versions share nearly all of their memory.

Keys are in buckets of 8, one cache line each; a full bucket overflows into the next. Keys are only ever added, so every version
reads the same array. Rows are in pages of 128; a version has a directory of pages, and a change copies the directory and the
pages that it alters. A key that a version does not hold has row -1 in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from aif_jax.index.ids import COLLISION, EMPTY, Keys
from aif_jax.vocabulary import Kind

BUCKET = 8
PAGE = 128
MAX_LOAD = 0.7
CHUNK = 1 << 20  # keys handled in one go, so that temporary arrays stay small


class View(NamedTuple):
    """One version of the map."""

    places: Places
    pages: np.ndarray  # int32 [pages, PAGE] rows
    directory: np.ndarray  # int32 [buckets * BUCKET / PAGE] page of each run of keys

    def lookup(self, keys: Keys) -> np.ndarray:
        """Rows int32 [C] of keys [C], -1 where unknown."""
        places = self.places.find(keys)
        known = np.maximum(places, 0)
        flat = self.directory.take(known // PAGE).astype(np.int64) * PAGE + known % PAGE
        return np.where(places >= 0, self.pages.reshape(-1).take(flat), np.int32(-1))

    def items(self) -> tuple[Keys, np.ndarray]:
        """Keys [n] and rows int32 [n] of this version, by ascending key. Costs a pass over the whole map."""
        rows = self.pages[self.directory].reshape(-1)
        at = np.flatnonzero(rows >= 0)
        at = at[np.argsort(self.places.flat.key[at])]
        return self.places.flat.take(at), rows[at]


class Places:
    """Where each key is; keys are only added. `kind` is that of the raw ids; strings have marks too."""

    def __init__(self, capacity: int, kind: Kind | None):
        size = max(PAGE, 1 << int(np.ceil(np.log2(max(capacity, 1) / MAX_LOAD))))
        self.keys = np.full((size // BUCKET, BUCKET), EMPTY, np.int64)
        self.flat = Keys(self.keys.reshape(-1), np.zeros(size, np.uint32) if kind == "strings" else None)
        self.used = 0  # keys ever added, those of deleted ids included

    def home(self, key: np.ndarray) -> np.ndarray:
        """The bucket where a key belongs: the high bits of a multiplicative hash."""
        mixed = key.view(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        bits = len(self.keys).bit_length() - 1
        return (mixed >> np.uint64(64 - bits)).astype(np.int64)

    def find(self, keys: Keys) -> np.ndarray:
        """Places int64 [C] of keys, -1 where the map does not have them."""
        places = self._find(keys.key)
        if keys.mark is not None and self.flat.mark is not None:
            places[self.flat.mark[places] != keys.mark] = -1
        return places

    def add(self, keys: Keys) -> np.ndarray:
        """Places of keys, added where they are missing. Raises ValueError for a string whose hash another string has."""
        places = self._find(keys.key)
        if keys.mark is not None and self.flat.mark is not None and (self.flat.mark[places] != keys.mark)[places >= 0].any():
            raise ValueError(f"ids: {COLLISION}")
        missing = np.flatnonzero(places < 0)
        bucket = self.home(keys.key[missing])
        while len(missing):
            order = np.argsort(bucket)
            missing, bucket = missing[order], bucket[order]
            first = np.concatenate([[True], bucket[1:] != bucket[:-1]])
            rank = np.arange(len(bucket)) - np.maximum.accumulate(np.where(first, np.arange(len(bucket)), 0))
            column = (self.keys[bucket] != EMPTY).sum(1) + rank
            fits = column < BUCKET
            places[missing[fits]] = bucket[fits] * BUCKET + column[fits]
            self.put(places[missing[fits]], keys.take(missing[fits]))
            missing, bucket = missing[~fits], (bucket[~fits] + 1) % len(self.keys)
        return places

    def put(self, places: np.ndarray, keys: Keys) -> None:
        """Writes new keys into free places."""
        if keys.mark is not None and self.flat.mark is not None:
            self.flat.mark[places] = keys.mark  # before the key, by which a reader finds it
        self.flat.key[places] = keys.key
        self.used += len(places)

    def _find(self, key: np.ndarray) -> np.ndarray:
        places = np.full(len(key), -1, np.int64)
        pending = None
        bucket = self.home(key)
        for _ in range(len(self.keys)):
            block = self.keys.take(bucket, axis=0)
            flat = np.flatnonzero(block == (key if pending is None else key[pending])[:, None])
            at = flat // BUCKET
            places[at if pending is None else pending[at]] = bucket[at] * BUCKET + flat % BUCKET
            beyond = block[:, -1] != EMPTY  # a bucket with a free place never overflowed
            beyond[at] = False
            left = np.flatnonzero(beyond)
            if not len(left):
                break
            pending = left if pending is None else pending[left]
            bucket = (bucket[left] + 1) % len(self.keys)
        return places


class IdMap:
    """The part of the map that its versions share. One writer at a time; readers of older versions need no lock."""

    def __init__(self, capacity: int, kind: Kind | None):
        self.kind: Kind | None = kind
        self.places = Places(capacity, kind)
        self.pages = np.full((1, PAGE), -1, np.int32)
        self.free = np.zeros(0, np.int32)  # pages that no living version reads
        self.fresh = 1  # pages from here on were never used; page 0 is the page of unused keys

    @property
    def nbytes(self) -> int:
        """Host bytes of keys and pages."""
        mark = self.places.flat.mark
        return self.places.keys.nbytes + (0 if mark is None else mark.nbytes) + self.pages.nbytes

    def fill(self, keys: Keys) -> View:
        """The first version of a new map: distinct keys [n] with rows 0 to n - 1, written sorted by bucket: fast."""
        packed = np.sort((self.places.home(keys.key) << 32) | np.arange(len(keys.key)))
        bucket, order = packed >> 32, packed & 0xFFFFFFFF
        first = np.flatnonzero(np.diff(bucket, prepend=-1))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        fits = rank < BUCKET
        places, rows = (bucket * BUCKET + rank)[fits], order[fits].astype(np.int32)
        self.places.put(places, keys.take(rows))
        self.fresh = 1 + self.places.keys.size // PAGE
        self.pages = np.full((self.fresh * 9 // 8 + 64, PAGE), -1, np.int32)
        flat = self.pages.reshape(-1)
        flat[PAGE + places] = rows
        late = order[~fits]
        flat[PAGE + self.places.add(keys.take(late))] = late
        return View(self.places, self.pages, np.arange(1, self.fresh, dtype=np.int32))

    def has_room(self, count: int) -> bool:
        """Whether so many more keys fit without a rehash."""
        return self.places.used + count <= MAX_LOAD * self.places.keys.size

    def assign(self, view: View, keys: Keys, rows: np.ndarray) -> tuple[View, np.ndarray]:
        """A version with rows int32 [n] for distinct keys [n] (-1 to forget), and the pages that only older versions read."""
        parts = [self.places.add(keys.take(slice(i, i + CHUNK))) for i in range(0, len(rows), CHUNK)]
        places = np.concatenate([np.zeros(0, np.int64), *parts])
        changed, inverse = np.unique(places // PAGE, return_inverse=True)
        old = view.directory[changed]
        new = self._take_pages(len(changed))
        self.pages[new] = self.pages[old]
        self.pages[new[inverse], places % PAGE] = rows
        directory = view.directory.copy()
        directory[changed] = new
        return View(self.places, self.pages, directory), old[old > 0]

    def release(self, pages: np.ndarray) -> None:
        """Takes pages back that no living version reads."""
        self.free = np.concatenate([self.free, pages])

    def _take_pages(self, count: int) -> np.ndarray:
        reused = min(count, len(self.free))
        self.free, taken = self.free[: len(self.free) - reused], self.free[len(self.free) - reused :]
        start, self.fresh = self.fresh, self.fresh + count - reused
        if self.fresh > len(self.pages):  # older versions keep the array that they have
            grown = np.full((max(self.fresh, len(self.pages) * 5 // 4), PAGE), -1, np.int32)
            grown[: len(self.pages)] = self.pages
            self.pages = grown
        return np.concatenate([taken, np.arange(start, self.fresh, dtype=np.int32)])
