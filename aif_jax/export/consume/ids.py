"""Raw ids of an export, found by value: those of its vocabularies and of its index; strings of an index by a fixed hash."""

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from .files import ExportError, expect

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
EMPTY = np.iinfo(np.int64).min
"""Marks a free slot of the id map of an index, and so is no valid id."""


class Ids:
    """Known raw ids.

    From integers {"ids": int64 [n]}, ascending; strings {"utf8": uint8 [bytes], "offsets": int64 [n + 1]}; or strings by their
    hashes {"keys": int64 [n]}, ascending. Other arrays raise ExportError.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str):
        self.name, self.hashed, self.integers = name, set(arrays) == {"keys"}, set(arrays) == {"ids"}
        if self.hashed or self.integers:
            (self.raw,) = arrays.values()
            if self.raw.ndim != 1 or self.raw.dtype != np.int64 or (self.raw[1:] <= self.raw[:-1]).any():
                raise ExportError(f"{name}: expected ascending int64 [n], got {self.raw.dtype}{list(self.raw.shape)}")
        elif set(arrays) == {"utf8", "offsets"}:
            self.raw = _strings(arrays["utf8"], arrays["offsets"], name)
        else:
            raise ExportError(f"{name}: expected the arrays ids, keys, or utf8 and offsets, got {sorted(arrays)}")

    def __len__(self) -> int:
        return len(self.raw)

    def positions(self, raw: Any) -> np.ndarray:
        """Return int64 positions of raw ids of any shape, -1 for unknown ones; ExportError for ids of another kind."""
        if not self.integers:
            texts = raw if isinstance(raw, np.ndarray) else np.array(raw, object)
            flat = texts.reshape(-1).tolist()
            if other := [text for text in flat if not isinstance(text, str)]:
                raise ExportError(f"{self.name}: expected strings, got {other[0]!r}")
            if not self.hashed:
                return np.fromiter(map(self._place.get, flat, itertools.repeat(-1)), np.int64, len(flat)).reshape(texts.shape)
            raw = hashes(flat).reshape(texts.shape)
        ids = np.asarray(raw)
        if not ids.size or not len(self):
            return np.full(ids.shape, -1)
        if ids.dtype.kind not in "iu" or (ids.dtype == np.uint64 and ids.max() >= 1 << 63):
            raise ExportError(f"{self.name}: expected integers below 2^63, got dtype {ids.dtype}, first {ids.flat[0]!r}")
        ids = ids.astype(np.int64)
        nearest = np.minimum(np.searchsorted(self.raw, ids), len(self) - 1)
        return np.where(self.raw[nearest] == ids, nearest, -1)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.raw.tolist())}


def hashes(strings: list[str]) -> np.ndarray:
    """Return int64 hashes of strings [n], as an index stores them, the same in every version; memory follows the characters."""
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    points = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32)
    order = np.argsort(-lengths, kind="stable")  # the longest first: strings with a character left are a prefix
    starts, sizes = (np.cumsum(lengths) - lengths)[order], lengths[order]
    mixed = np.full(len(strings), 0xCBF29CE484222325, np.uint64)
    for at, count in enumerate(np.searchsorted(-sizes, -np.arange(lengths.max(initial=0)), side="left").tolist()):
        step = (mixed[:count] ^ points[starts[:count] + at]) * MULTIPLIER
        mixed[:count] = step ^ (step >> np.uint64(32))
    mixed[order] = mixed.copy()
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    ids = (mixed ^ (mixed >> np.uint64(32))).view(np.int64)
    return np.where(ids == EMPTY, 0, ids)


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
