"""Raw ids and their positions: vocabularies and the ids of an index, read from plain arrays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from .files import ExportError

WORD = (1 << 64) - 1


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
        """int64 positions of raw ids of any shape, -1 for unknown ones; ExportError for ids of another kind than the known."""
        if not self.integers:
            texts = raw if isinstance(raw, np.ndarray) else np.array(raw, object)
            flat = texts.reshape(-1).tolist()
            if other := [text for text in flat if not isinstance(text, str)]:
                raise ExportError(f"{self.name}: expected strings, got {other[0]!r}")
            if not self.hashed:
                return np.fromiter(map(self._place.get, flat, itertools.repeat(-1)), np.int64, len(flat)).reshape(texts.shape)
            raw = string_keys(flat).reshape(texts.shape)
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


def string_keys(strings: list[str]) -> np.ndarray:
    """int64 hashes of strings, as `aif_jax.index.string_ids` computes them."""
    keys = []
    for text in strings:
        mixed = 0xCBF29CE484222325
        for character in text:
            step = (mixed ^ ord(character)) * 0x9E3779B97F4A7C15 & WORD
            mixed = step ^ step >> 32
        mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & WORD
        keys.append(mixed ^ mixed >> 32)
    found = np.array(keys, np.uint64).view(np.int64)
    return np.where(found == np.iinfo(np.int64).min, 0, found)


def _strings(utf8: np.ndarray, offsets: np.ndarray, name: str) -> np.ndarray:
    fits = utf8.dtype == np.uint8 and utf8.ndim == 1 and offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
    fits = fits and offsets[0] == 0 and offsets[-1] == len(utf8)
    # Only the first of ascending strings may be empty, so their number is bounded by their bytes.
    fits = fits and bool((offsets[1:2] >= 0).all()) and bool((offsets[2:] > offsets[1:-1]).all())
    if not fits:
        raise ExportError(f"{name}: expected utf8 uint8 [m] and offsets int64 [n + 1] that rise from 0 to m, got others")
    data = utf8.tobytes()
    try:
        texts = [data[start:stop].decode() for start, stop in itertools.pairwise(offsets.tolist())]
    except UnicodeDecodeError as error:
        raise ExportError(f"{name}: expected UTF-8, got something else ({error})") from None
    return np.array(texts, np.dtypes.StringDType())
