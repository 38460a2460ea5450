"""Raw item ids as the keys of the id map: integers as they are, int64, and strings by two fixed hashes, see `hashes`.

Strings with equal hashes, 96 bits, are one id: among 10^7 of them any two have equal ones with probability 6e-16.

*Map.* Keys to table rows: a hash table in NumPy whose versions share nearly all of their memory.

Keys are in buckets of 8, one cache line each; a full bucket overflows into the next. Keys are only ever added, so every version
reads the same array. Rows are in pages of 128; a version has a directory of pages, and a change copies the directory and the
pages that it alters. A key that a version does not hold has row -1 in it.
"""

from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.vocabulary import IdKind, as_ids
from aif_jax.export.consume.ids import EMPTY, TEXT, first_of, hashed, hashes


def kind_of(keys: np.ndarray) -> IdKind | None:
    """Return what the raw ids of keys are; None for none."""
    return "strings" if keys.dtype == TEXT else "integers" if len(keys) else None


def ascending(keys: np.ndarray) -> np.ndarray:
    """Return a stable order of keys."""
    return np.lexsort((keys["marks"], keys["keys"])) if keys.dtype == TEXT else np.argsort(keys, kind="stable")


def last_of(keys: np.ndarray) -> np.ndarray:
    """Return int64 positions, ascending, of the last occurrence of every key."""
    order, last = ascending(keys), np.ones(len(keys), bool)
    last[:-1] = keys[order][1:] != keys[order][:-1]
    return np.sort(order[last])


def raw_keys(raw: Any, name: str, *, like: IdKind | None = None) -> np.ndarray:
    """Return keys of raw ids [n] (array, list or Arrow), integers or strings of at most 1,024 characters, all of kind `like`.

    Raises TypeError, ValueError.
    """
    shape = raw.shape if isinstance(raw, np.ndarray) else np.shape(raw) if _nested(raw) else (len(raw),)
    expect(len(shape) == 1, name, "one axis", f"shape {list(shape)}")
    ids = as_ids(raw, name)
    keys = ids if isinstance(ids, np.ndarray) else hashes(ids)
    kind = kind_of(keys)
    expect(like is None or kind in (None, like), name, like, kind, error=TypeError)
    expect(kind != "integers" or keys.min() != EMPTY, name, f"ids but {EMPTY}, which is reserved", "it; give the item another")
    return keys


def _nested(raw: Any) -> bool:
    return not hasattr(raw, "__len__") or (len(raw) > 0 and isinstance(next(iter(raw)), list | tuple | np.ndarray))


BUCKET, PAGE = 8, 128  # powers of two
MAX_LOAD = 0.7


class View(NamedTuple):
    """One version of the map."""

    ids: "IdMap"
    pages: np.ndarray  # int32 [pages, PAGE] rows
    directory: np.ndarray  # int32 [buckets * BUCKET / PAGE] page of each run of keys
    length: int  # keys that have a row

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Return rows int32 [C] of keys [C], -1 where unknown."""
        return self.rows(self.ids.find(keys))

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """Return rows int32 [C] in this version of the slots of keys."""
        known = np.maximum(slots, 0)
        flat = self.directory.take(known // PAGE).astype(np.int64) * PAGE + (known & (PAGE - 1))
        return np.where(slots >= 0, self.pages.reshape(-1).take(flat), np.int32(-1))

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return keys [n] and rows int32 [n] of this version, by ascending key. Costs a pass over the whole map."""
        rows = self.pages[self.directory].reshape(-1)
        slots = np.flatnonzero(rows >= 0)
        keys = self.ids.at(slots)
        order = ascending(keys)
        return keys[order], rows[slots[order]]


class FreeList:
    """Free row or page numbers: returned ones, then all from `fresh` on."""

    def __init__(self, fresh: int = 0):
        self.free = np.zeros(0, np.int32)
        self.fresh = fresh

    def take(self, count: int) -> np.ndarray:
        """Return int32 [count], no longer free."""
        reused = min(count, len(self.free))
        self.free, taken = self.free[: len(self.free) - reused], self.free[len(self.free) - reused :]
        start, self.fresh = self.fresh, self.fresh + count - reused
        return np.concatenate([taken, np.arange(start, self.fresh, dtype=np.int32)])

    def give_back(self, numbers: np.ndarray) -> None:
        """Make numbers free that no living version reads."""
        self.free = np.concatenate([self.free, numbers])


class IdMap:
    """The part of the map that its versions share. One writer at a time; readers of older versions need no lock."""

    def __init__(self, capacity: int, kind: IdKind | None = None):
        size = max(PAGE, 1 << int(np.ceil(np.log2(max(capacity, 1) / MAX_LOAD))))
        self.keys = np.full((size // BUCKET, BUCKET), EMPTY, np.int64)
        self.marks = np.zeros(self.keys.shape, np.uint32) if kind == "strings" else None  # second hashes
        self.used = 0  # keys ever added, those of deleted ids included
        self.pages = np.full((1, PAGE), -1, np.int32)
        self.numbers = FreeList(1)  # of pages; page 0 is the page of unused keys

    def fill(self, keys: np.ndarray) -> View:
        """Return the first version of a new map: distinct keys [n] with rows 0 to n - 1, written sorted by bucket: fast."""
        packed = np.sort((self.home(first_of(keys)) << 32) | np.arange(len(keys)))
        bucket, order = packed >> 32, packed & 0xFFFFFFFF
        first = np.flatnonzero(np.diff(bucket, prepend=-1))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        fits = rank < BUCKET
        slots, rows = (bucket * BUCKET + rank)[fits], order[fits].astype(np.int32)
        self._put(slots, keys[rows])
        directory = self.numbers.take(self.keys.size // PAGE)
        self.pages = np.full(((1 + len(directory)) * 9 // 8 + 64, PAGE), -1, np.int32)
        flat = self.pages.reshape(-1)
        flat[PAGE + slots] = rows
        late = order[~fits]
        flat[PAGE + self.add(keys[late])] = late
        return View(self, self.pages, directory, len(keys))

    @property
    def room(self) -> int:
        """Keys that fit without a rehash."""
        return int(MAX_LOAD * self.keys.size) - self.used

    def assign(self, view: View, keys: np.ndarray, rows: np.ndarray) -> tuple[View, np.ndarray, np.ndarray]:
        """Return a version with rows int32 [n] for distinct keys [n] (-1 to forget), and rows and pages of older ones alone."""
        slots = self.add(keys)
        before = view.rows(slots)
        changed, inverse = np.unique(slots // PAGE, return_inverse=True)
        old, new = view.directory[changed], self.numbers.take(len(changed))
        if self.numbers.fresh > len(self.pages):  # older versions keep the array that they have
            grown = np.full((max(self.numbers.fresh, len(self.pages) * 5 // 4), PAGE), -1, np.int32)
            grown[: len(self.pages)] = self.pages
            self.pages = grown
        self.pages[new] = self.pages[old]
        self.pages[new[inverse], slots % PAGE] = rows
        directory = view.directory.copy()
        directory[changed] = new
        length = view.length + int((rows >= 0).sum()) - int((before >= 0).sum())
        return View(self, self.pages, directory, length), before[before >= 0], old[old > 0]

    def home(self, first: np.ndarray) -> np.ndarray:
        """Return the buckets where keys belong, see `first_of`: the high bits of a multiplicative hash."""
        mixed = first.view(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(64 - (len(self.keys).bit_length() - 1))).astype(np.int64)

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Return slots int64 [n] of distinct keys, added where they are missing."""
        slots = self.find(keys)
        missing = np.flatnonzero(slots < 0)
        bucket = self.home(first_of(keys[missing]))
        while len(missing):
            order = np.argsort(bucket)
            missing, bucket = missing[order], bucket[order]
            first = np.concatenate([[True], bucket[1:] != bucket[:-1]])
            rank = np.arange(len(bucket)) - np.maximum.accumulate(np.where(first, np.arange(len(bucket)), 0))
            column = (self.keys.take(bucket, axis=0) != EMPTY).sum(1) + rank
            fits = column < BUCKET
            slots[missing[fits]] = bucket[fits] * BUCKET + column[fits]
            self._put(slots[missing[fits]], keys[missing[fits]])
            missing, bucket = missing[~fits], (bucket[~fits] + 1) % len(self.keys)
        return slots

    def _put(self, slots: np.ndarray, keys: np.ndarray) -> None:
        self.keys.reshape(-1)[slots] = first_of(keys)
        if self.marks is not None and len(keys):
            self.marks.reshape(-1)[slots] = keys["marks"]
        self.used += len(slots)

    def at(self, slots: np.ndarray) -> np.ndarray:
        """Return the keys [n] of slots, int64 for none."""
        keys = self.keys.reshape(-1)[slots]
        return keys if self.marks is None or not len(keys) else hashed(keys, self.marks.reshape(-1)[slots], "ids")

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return slots int64 [C] of keys, -1 where the map does not have them."""
        slots = np.full(len(keys), -1, np.int64)
        if (keys.dtype == TEXT) != (self.marks is not None):  # none of their kind is here
            return slots
        first = keys["keys"] if self.marks is not None else keys
        pending, bucket = np.arange(len(keys)), self.home(first)
        for _ in range(len(self.keys)):
            block = self.keys.take(bucket, axis=0)
            equal = block == first[:, None]
            if self.marks is not None:
                equal &= self.marks.take(bucket, axis=0) == keys["marks"][:, None]
            flat = equal.ravel().nonzero()[0]
            at = flat // BUCKET
            slots[pending[at]] = bucket[at] * BUCKET + (flat & (BUCKET - 1))
            beyond = block[:, -1] != EMPTY  # a bucket with a free slot never overflowed
            beyond[at] = False
            left = beyond.nonzero()[0]
            if not len(left):
                break
            pending, keys, first, bucket = pending[left], keys[left], first[left], (bucket[left] + 1) % len(self.keys)
        return slots
