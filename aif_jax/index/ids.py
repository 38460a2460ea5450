"""Raw item ids as the 64-bit keys of the id map: integers as they are, strings by a fixed hash and a check mark."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aif_jax.encoding.characters import folded
from aif_jax.encoding.vocabulary import Kind, as_ids

EMPTY = np.iinfo(np.int64).min
"""Marks a free place of the id map, and so is no valid id."""


class Keys(NamedTuple):
    """Ids of one kind. Two strings are equal where key and mark are."""

    key: np.ndarray  # int64 [n]
    mark: np.ndarray | None = None  # uint32 [n] a second hash of strings; None for integers

    @property
    def kind(self) -> Kind | None:
        """What the raw ids are; None for none."""
        if self.mark is not None:
            return "strings"
        return "integers" if len(self.key) else None

    def take(self, at: Any) -> Keys:
        """Some of the ids."""
        return Keys(self.key[at], None if self.mark is None else self.mark[at])

    def last(self, name: str) -> np.ndarray:
        """int64 positions, ascending, of the last occurrence of every id. ValueError for two strings with one hash."""
        distinct, first = np.unique(self.key[::-1], return_index=True)
        last = len(self.key) - 1 - first
        if self.mark is not None and (self.mark[last][np.searchsorted(distinct, self.key)] != self.mark).any():
            raise ValueError(f"{name}: {COLLISION}")
        return np.sort(last)


COLLISION = "expected strings with hashes that differ, got two with one; give one of the items another id"


def raw_keys(raw: Any, name: str, *, like: Kind | None = None) -> Keys:
    """Keys of raw ids [n] (array, list or Arrow), integers or strings, all of kind `like`; raises TypeError, ValueError."""
    return _keys(raw, name, like, short=True)


def _keys(raw: Any, name: str, like: Kind | None, *, short: bool) -> Keys:
    shape = raw.shape if isinstance(raw, np.ndarray) else np.shape(raw) if _nested(raw) else (len(raw),)
    if len(shape) != 1:
        raise ValueError(f"{name}: expected one axis, got shape {list(shape)}")
    ids = as_ids(raw, name, short=short)
    keys = Keys(ids) if isinstance(ids, np.ndarray) else _hashed(ids)
    if None not in (like, keys.kind) and keys.kind != like:
        raise TypeError(f"{name}: expected {like}, got {keys.kind}")
    if keys.kind == "integers" and keys.key.min() == EMPTY:
        raise ValueError(f"{name}: the id {EMPTY} is reserved")
    return keys


def string_ids(names: Any) -> np.ndarray:
    """int64 ids of strings [n]: a fixed 64-bit hash of the code points, the same on every machine and in every version.

    An index hashes strings itself, of at most 1,024 characters each; here they may be longer. Use this to keep integers in the
    retrieval instead, and build the index from them too.

    Example:
      >>> string_ids(["B00X4WHP5E", "B00X4WHP5F"]).tolist()
      [-1363410762929181125, -8533427915187302917]
    """
    return _keys(names, "names", "strings", short=False).key


def _nested(raw: Any) -> bool:
    return not hasattr(raw, "__len__") or (len(raw) > 0 and isinstance(next(iter(raw)), list | tuple | np.ndarray))


MULTIPLIER, PRIME = np.uint64(0x9E3779B97F4A7C15), np.uint32(0x01000193)


def _hashed(strings: list[str]) -> Keys:
    """Key and mark of strings; a hash that an index stores, the same in every version."""
    mixed, marks = folded(strings, (np.uint64(0xCBF29CE484222325), np.uint32(0x811C9DC5)), _step, _rest)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    ids = (mixed ^ (mixed >> np.uint64(32))).view(np.int64)
    return Keys(np.where(ids == EMPTY, 0, ids), marks)


def _step(mixed: np.ndarray, marks: np.ndarray, character: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = (mixed ^ character) * MULTIPLIER
    return step ^ (step >> np.uint64(32)), (marks ^ character) * PRIME


def _rest(mixed: int, mark: int, characters: list[int]) -> tuple[int, int]:
    """`_step` for every character of one string."""
    multiplier, prime = int(MULTIPLIER), int(PRIME)
    for character in characters:
        step = (mixed ^ character) * multiplier & 0xFFFFFFFFFFFFFFFF
        mixed, mark = step ^ step >> 32, (mark ^ character) * prime & 0xFFFFFFFF
    return mixed, mark
