"""Item ids to table rows: a hash table in NumPy whose versions share nearly all of their memory.

Keys stand in buckets of 8, one cache line each, filled from the left; a full bucket overflows into the next. Keys are only ever
added, so every version reads the same array. The row of each key lies in pages of 128; a version owns a directory of pages, and
a change copies the pages that it touches and the directory, 1/128 of the table. A key that a version does not hold has row -1
there. Source: ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

BUCKET = 8
PAGE = 128
MAX_LOAD = 0.7
EMPTY = np.iinfo(np.int64).min
"""Marks a free place, and so is no valid id."""
CHUNK = 1 << 20  # keys handled in one go, so that temporary arrays stay small


class View(NamedTuple):
    """One version of the map."""

    keys: np.ndarray  # int64 [buckets, BUCKET]
    pages: np.ndarray  # int32 [pages, PAGE] rows
    directory: np.ndarray  # int32 [buckets * BUCKET / PAGE] page of each run of keys

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """int64 [C] -> int32 [C] rows, -1 where unknown."""
        return self.rows_at(find(self.keys, ids))

    def rows_at(self, places: np.ndarray) -> np.ndarray:
        """Rows of places in the key array; place -1 gives -1."""
        known = np.maximum(places, 0)
        flat = self.directory.take(known // PAGE).astype(np.int64) * PAGE + known % PAGE
        return np.where(places >= 0, self.pages.reshape(-1).take(flat), np.int32(-1))

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [n], rows int32 [n]) of this version, by ascending id. Costs a pass over the whole map."""
        rows = self.pages[self.directory].reshape(-1)
        places = np.flatnonzero(rows >= 0)
        ids = self.keys.reshape(-1)[places]
        order = np.argsort(ids)
        return ids[order], rows[places[order]]


class IdMap:
    """The part of the map that its versions share, and the one way to make a new version.

    One writer at a time; readers of older versions need no lock, since what they read is never written.
    """

    def __init__(self, capacity: int):
        """Room for about `capacity` ids before the first rehash."""
        size = max(PAGE, 1 << int(np.ceil(np.log2(max(capacity, 1) / MAX_LOAD))))
        self.keys = np.full((size // BUCKET, BUCKET), EMPTY, np.int64)
        self.used = 0  # keys ever added, those of deleted ids included
        self.pages = np.full((1, PAGE), -1, np.int32)
        self.free = np.zeros(0, np.int32)  # pages that no living version reads
        self.fresh = 1  # pages from here on were never used; page 0 is the page of unused keys

    @property
    def nbytes(self) -> int:
        """Host bytes of keys and pages."""
        return self.keys.nbytes + self.pages.nbytes

    def fill(self, ids: np.ndarray) -> View:
        """The first version of a new map: ids int64 [n], distinct, with rows 0 to n - 1.

        Sorted by bucket, keys and rows are written from front to back, which takes a quarter of the time of `assign`.
        """
        packed = np.sort((home(self.keys, ids) << 32) | np.arange(len(ids)))
        bucket, order = packed >> 32, packed & 0xFFFFFFFF
        first = np.flatnonzero(np.diff(bucket, prepend=-1))
        rank = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
        fits = rank < BUCKET
        places, rows = (bucket * BUCKET + rank)[fits], order[fits].astype(np.int32)
        self.keys.reshape(-1)[places] = ids[rows]
        self.used = len(places)
        self.fresh = 1 + self.keys.size // PAGE
        self.pages = np.full((self.fresh * 9 // 8 + 64, PAGE), -1, np.int32)
        flat = self.pages.reshape(-1)
        flat[PAGE + places] = rows
        late = order[~fits]
        flat[PAGE + self._add(ids[late])] = late
        return View(self.keys, self.pages, np.arange(1, self.fresh, dtype=np.int32))

    def has_room(self, count: int) -> bool:
        """Whether so many more keys fit without a rehash."""
        return self.used + count <= MAX_LOAD * self.keys.size

    def assign(self, view: View, ids: np.ndarray, rows: np.ndarray) -> tuple[View, np.ndarray]:
        """A version with some rows changed.

        Args:
          view: the version to start from.
          ids: int64 [n], distinct.
          rows: int32 [n], -1 for ids to forget.

        Returns:
          the new version, and the pages int32 that only `view` and versions before it read.
        """
        places = np.concatenate([self._add(ids[i : i + CHUNK]) for i in range(0, len(ids), CHUNK)] or [np.zeros(0, np.int64)])
        touched, inverse = np.unique(places // PAGE, return_inverse=True)
        old = view.directory[touched]
        new = self._take_pages(len(touched))
        self.pages[new] = self.pages[old]
        self.pages[new[inverse], places % PAGE] = rows
        directory = view.directory.copy()
        directory[touched] = new
        return View(self.keys, self.pages, directory), old[old > 0]

    def release(self, pages: np.ndarray) -> None:
        """Gives pages back that no living version reads."""
        self.free = np.concatenate([self.free, pages])

    def _add(self, ids: np.ndarray) -> np.ndarray:
        """Places of ids, which are added where they are missing."""
        places = find(self.keys, ids)
        missing = np.flatnonzero(places < 0)
        bucket = home(self.keys, ids[missing])
        while len(missing):
            order = np.argsort(bucket)
            missing, bucket = missing[order], bucket[order]
            first = np.concatenate([[True], bucket[1:] != bucket[:-1]])
            rank = np.arange(len(bucket)) - np.maximum.accumulate(np.where(first, np.arange(len(bucket)), 0))
            column = (self.keys[bucket] != EMPTY).sum(1) + rank
            fits = column < BUCKET
            places[missing[fits]] = bucket[fits] * BUCKET + column[fits]
            self.keys[bucket[fits], column[fits]] = ids[missing[fits]]
            self.used += int(fits.sum())
            missing, bucket = missing[~fits], (bucket[~fits] + 1) % len(self.keys)
        return places

    def _take_pages(self, count: int) -> np.ndarray:
        reused = min(count, len(self.free))
        self.free, taken = self.free[: len(self.free) - reused], self.free[len(self.free) - reused :]
        start, self.fresh = self.fresh, self.fresh + count - reused
        if self.fresh > len(self.pages):  # older versions keep the array that they have
            grown = np.full((max(self.fresh, len(self.pages) * 5 // 4), PAGE), -1, np.int32)
            grown[: len(self.pages)] = self.pages
            self.pages = grown
        return np.concatenate([taken, np.arange(start, self.fresh, dtype=np.int32)])


def home(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The bucket where an id belongs: the high bits of a multiplicative hash."""
    mixed = ids.view(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    bits = len(keys).bit_length() - 1
    return (mixed >> np.uint64(64 - bits)).astype(np.int64)


def find(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Places int64 [C] of ids in the key array, -1 where it does not have them."""
    places = np.full(len(ids), -1, np.int64)
    pending = None
    bucket = home(keys, ids)
    for _ in range(len(keys)):
        block = keys.take(bucket, axis=0)
        flat = np.flatnonzero(block == (ids if pending is None else ids[pending])[:, None])
        at = flat // BUCKET
        places[at if pending is None else pending[at]] = bucket[at] * BUCKET + flat % BUCKET
        beyond = block[:, -1] != EMPTY  # a bucket with a free place never overflowed
        beyond[at] = False
        left = np.flatnonzero(beyond)
        if not len(left):
            break
        pending = left if pending is None else pending[left]
        bucket = (bucket[left] + 1) % len(keys)
    return places


def expect_ids(ids: Any, name: str) -> np.ndarray:
    """Ids as int64 [n].

    Raises:
      TypeError: not integers; strings go through `string_ids` first.
      ValueError: not one axis, or the reserved id -2^63.
    """
    array = np.asarray(ids)
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        hint = "; turn strings into ids with aif_jax.index.string_ids" if array.dtype.kind in "OSU" else ""
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype.name}{hint}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one axis, got shape {list(array.shape)}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected ids that fit int64, got {array.max()}")
    array = np.ascontiguousarray(array, np.int64)
    if (array == EMPTY).any():
        raise ValueError(f"{name}: the id {EMPTY} is reserved")
    return array


def string_ids(names: Any) -> np.ndarray:
    """int64 ids for strings: a fixed 64-bit hash of the code points, the same on every machine and in every version.

    Two of 10^7 strings share an id with probability 3e-6; `ItemIndex.build` refuses a catalogue where it happens.

    Args:
      names: strings [n].

    Example:
      >>> string_ids(["B00X4WHP5E", "B00X4WHP5F"]).tolist()
      [-1363410762929181125, -8533427915187302917]
    """
    text = np.asarray(names, dtype=np.str_)
    if text.ndim != 1:
        raise ValueError(f"names: expected one axis, got shape {list(text.shape)}")
    points = np.ascontiguousarray(text).view(np.uint32).reshape(len(text), -1).astype(np.uint64)
    mixed = np.full(len(text), 0xCBF29CE484222325, np.uint64)
    for column in points.T:  # padding is left out: the id must not depend on the longest string of the array
        step = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed = np.where(column > 0, step ^ (step >> np.uint64(32)), mixed)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    ids = (mixed ^ (mixed >> np.uint64(32))).view(np.int64)
    return np.where(ids == EMPTY, 0, ids)


def raw_ids(raw: Any, name: str) -> np.ndarray:
    """Integer ids as int64, strings by their hash."""
    array = np.asarray(raw)
    return string_ids(array) if array.dtype.kind in "UOS" and array.size else expect_ids(raw, name)
