"""Raw ids of an export, found by value: those of its vocabularies and of its index; strings of an index by two fixed hashes."""

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from .files import ExportError, expect

MULTIPLIER, PRIME = np.uint64(0x9E3779B97F4A7C15), np.uint32(0x01000193)
HASHES = {"keys": np.int64, "marks": np.uint32}  # of a string
TEXT = np.dtype([*HASHES.items()])
EMPTY = np.iinfo(np.int64).min
"""Marks a free slot of the id map of an index, and so is no valid id."""


class Ids:
    """Known raw ids.

    From integers {"ids": int64 [n]}, ascending; strings {"utf8": uint8 [bytes], "offsets": int64 [n + 1]}; or strings by their
    hashes {"keys": int64 [n], "marks": uint32 [n]}, ascending. Other arrays raise ExportError.

    Attributes:
      raw: int64 [n], StringDType [n] or hashes [n].
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str):
        self.name, self.hashed, self.integers = name, set(arrays) == set(HASHES), set(arrays) == {"ids"}
        if self.hashed or self.integers:
            self._first = first = arrays["keys" if self.hashed else "ids"]
            if first.ndim != 1 or first.dtype != np.int64 or (first[1:] <= first[:-1]).any():
                raise ExportError(f"{name}: expected ascending int64 [n], got {first.dtype}{list(first.shape)}")
            self.raw = hashed(first, arrays["marks"], name) if self.hashed else first
        elif set(arrays) == {"utf8", "offsets"}:
            self.raw = _strings(arrays["utf8"], arrays["offsets"], name)
        else:
            raise ExportError(f"{name}: expected the arrays ids, keys and marks, or utf8 and offsets, got {sorted(arrays)}")

    def positions(self, raw: Any) -> np.ndarray:
        """Return int64 positions of raw ids of any shape, -1 for unknown ones; ExportError for ids of another kind."""
        if not self.integers:
            texts = raw if isinstance(raw, np.ndarray) else np.array(raw, object)
            flat = texts.reshape(-1).tolist()
            if other := [text for text in flat if not isinstance(text, str)]:
                raise ExportError(f"{self.name}: expected strings, got {other[0]!r}")
            if not self.hashed:
                return np.fromiter(map(self._place.get, flat, itertools.repeat(-1)), np.int64, len(flat)).reshape(texts.shape)
            ids = hashes(flat).reshape(texts.shape)
        else:
            ids = np.asarray(raw)
        if not ids.size or not len(self.raw):
            return np.full(ids.shape, -1)
        if self.integers:
            if ids.dtype.kind not in "iu" or (ids.dtype == np.uint64 and ids.max() >= 1 << 63):
                raise ExportError(f"{self.name}: expected integers below 2^63, got dtype {ids.dtype}, first {ids.flat[0]!r}")
            ids = ids.astype(np.int64)
        nearest = np.minimum(np.searchsorted(self._first, first_of(ids)), len(self.raw) - 1)
        return np.where(self.raw[nearest] == ids, nearest, -1)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.raw.tolist())}


def ids_by_name(arrays: Mapping[str, np.ndarray]) -> dict[str, Ids]:
    """Return the ids of vocabularies by name, from "NAME/ids", or "NAME/utf8" and "NAME/offsets"."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        name, _, kind = path.rpartition("/")
        parts.setdefault(name, {})[kind] = array
    return {name: Ids(part, f"vocabulary {name!r}") for name, part in parts.items()}


def first_of(keys: np.ndarray) -> np.ndarray:
    """Return int64 of keys of any shape: integers themselves, the first hash of strings."""
    return keys["keys"] if keys.dtype == TEXT else keys


def hashed(keys: np.ndarray, marks: np.ndarray, name: str) -> np.ndarray:
    """Return two hashes [n] of strings as one array of `TEXT`. Raises ExportError for arrays that are none."""
    fits = keys.dtype == np.int64 and marks.dtype == np.uint32 and keys.shape == marks.shape == (len(keys),)
    expect(fits, name, "hashes of strings, int64 [n] and uint32 [n]", "others; export again")
    both = np.empty(len(keys), TEXT)
    both["keys"], both["marks"] = keys, marks
    return both


def hashes(strings: list[str]) -> np.ndarray:
    """Return two hashes of strings [n], see `TEXT`, the same in every version; memory follows the characters."""
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    points = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32)
    order = np.argsort(-lengths, kind="stable")  # the longest first: strings with a character left are a prefix
    starts, sizes = (np.cumsum(lengths) - lengths)[order], lengths[order]
    mixed, marks = np.full(len(strings), 0xCBF29CE484222325, np.uint64), np.full(len(strings), 0x811C9DC5, np.uint32)
    for at, count in enumerate(np.searchsorted(-sizes, -np.arange(lengths.max(initial=0)), side="left").tolist()):
        character = points[starts[:count] + at]
        step = (mixed[:count] ^ character) * MULTIPLIER
        mixed[:count], marks[:count] = step ^ (step >> np.uint64(32)), (marks[:count] ^ character) * PRIME
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    keys, both = (mixed ^ (mixed >> np.uint64(32))).view(np.int64), np.empty(len(strings), TEXT)
    both["keys"][order], both["marks"][order] = np.where(keys == EMPTY, 0, keys), marks
    return both


def _strings(utf8: np.ndarray, offsets: np.ndarray, name: str) -> np.ndarray:
    fits = utf8.dtype == np.uint8 and utf8.ndim == 1 and offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
    fits = fits and offsets[0] == 0 and offsets[-1] == len(utf8)
    # Only the first of ascending strings may be empty, so their number is bounded by their bytes.
    fits = fits and bool((offsets[1:2] >= 0).all()) and bool((offsets[2:] > offsets[1:-1]).all())
    expect(fits, name, "utf8 uint8 [m], offsets int64 that rise from 0 to m", "others; export again")
    data = utf8.tobytes()
    try:
        texts = [data[start:stop].decode() for start, stop in itertools.pairwise(offsets.tolist())]
    except UnicodeDecodeError as error:
        raise ExportError(f"{name}: expected UTF-8, got something else ({error})") from None
    return np.array(texts, np.dtypes.StringDType())
