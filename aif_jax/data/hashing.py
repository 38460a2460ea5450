"""Ids hashed to a bounded table: no vocabulary to build or to ship, at the price of collisions that can be counted beforehand.

A raw id goes to one of the rows 1 .. size - 1; row 0 stays for unknown and padding. The mixing is splitmix64's finaliser
(Steele, Lea and Flood 2014), so that consecutive ids spread evenly, and an id has the same row in every process and on every
machine. With n distinct ids in m = size - 1 rows the expected share of ids that share their row with another is

    1 - (1 - 1/m)^(n - 1),    about n / m where n is much smaller than m.

`hash_rest` keeps a vocabulary for the frequent ids and hashes the rest behind it. Source: the hashing
trick of Weinberger et al. 2009 (arXiv 0902.2206).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aif_jax.vocabulary import Vocabulary


def hash_ids(raw: Any, size: int, *, seed: int = 0) -> np.ndarray:
    """Rows of raw ids: int32 in [1, size), of the shape of `raw`.

    Args:
      raw: integers of any dtype, or strings; 0 and the empty string are ids like others.
      size: rows of the table, row 0 included: the `size` of the attribute.
      seed: another seed collides other ids; two attributes with one table each may take different ones.

    Raises:
      TypeError: neither integers nor strings.
      ValueError: size below 2 or above 2^31.

    Example:
      >>> rows = hash_ids([7, 8, 7], 1000)
      >>> bool(rows[0] == rows[2] != rows[1]), int(rows.min()) >= 1
      (True, True)
    """
    _check_size(size)
    raw = np.asarray(raw)
    if raw.size == 0:
        return np.zeros(raw.shape, np.int32)
    if raw.dtype.kind == "T":
        raw = np.array(raw.tolist(), str)
    if raw.dtype.kind == "U":
        words = _string_words(raw)
    elif raw.dtype.kind in "iu":
        words = raw.astype(np.int64 if raw.dtype.kind == "i" else np.uint64).view(np.uint64)
    else:
        raise TypeError(f"hash_ids: expected integers or strings, got dtype {raw.dtype}")
    mixed = _mix(words + _mix(np.full((), seed % 2**64, np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return (mixed % np.uint64(size - 1)).astype(np.int32) + np.int32(1)


def hash_rest(vocabulary: Vocabulary, raw: Any, size: int, *, seed: int = 0) -> np.ndarray:
    """Rows of a vocabulary where it knows the id, of the hashed rows behind it where not: int32 in [1, size).

    Frequent ids, which the vocabulary holds, never collide; the `size - len(vocabulary)` rows behind it are shared by the rest.

    Args:
      vocabulary: of the frequent ids.
      raw: integers or strings, as the vocabulary's.
      size: rows of the table, more than `len(vocabulary)`.
      seed: of the hash.

    Raises:
      ValueError: no row is left for the rest.

    Example:
      >>> hash_rest(Vocabulary([10, 20]), [20, 10, 99], 4).tolist()
      [2, 1, 3]
    """
    first = len(vocabulary)
    if size <= first:
        raise ValueError(f"hash_rest.size: expected more than the vocabulary's {first} rows, got {size}")
    known = vocabulary.encode(raw)
    return np.where(known > 0, known, hash_ids(raw, size - first + 1, seed=seed) + np.int32(first - 1)).astype(np.int32)


def collision_rate(ids: int, size: int) -> float:
    """Expected share of `ids` distinct ids that share their row with another one, in a table of `size` rows.

    Example:
      >>> round(collision_rate(100_000, 1_000_001), 3)  # ten rows for each id
      0.095
    """
    _check_size(size)
    if ids < 2:
        return 0.0
    if size == 2:
        return 1.0
    return -math.expm1((ids - 1) * math.log1p(-1.0 / (size - 1)))


def size_for(ids: int, rate: float) -> int:
    """The smallest table whose expected `collision_rate` is at most `rate`.

    Raises:
      ValueError: a rate outside (0, 1), or a table of more than 2^31 rows.

    Example:
      >>> size = size_for(1_000_000, 0.05)
      >>> size // 10**6, round(collision_rate(1_000_000, size), 4)
      (19, 0.05)
    """
    if not 0 < rate < 1:
        raise ValueError(f"size_for.rate: expected a share between 0 and 1, got {rate}")
    if ids < 2:
        return 2
    rows = -1.0 / math.expm1(math.log1p(-rate) / (ids - 1))
    size = math.ceil(rows) + 1
    _check_size(size)
    return size


def _check_size(size: int) -> None:
    if not 2 <= size <= 2**31:
        raise ValueError(f"size: expected 2 to 2^31 rows, row 0 included, got {size}")


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _string_words(raw: np.ndarray) -> np.ndarray:
    """One word for each string: its characters mixed in one after another, without what pads it to the array's width."""
    width = raw.dtype.itemsize // 4
    characters = np.ascontiguousarray(raw).reshape(-1).view(np.uint32).reshape(-1, width) if width else np.zeros((raw.size, 0))
    words = np.zeros(raw.size, np.uint64)
    with np.errstate(over="ignore"):
        for column in characters.T:
            mixed = _mix((words ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
            words = np.where(column > 0, mixed, words)
    return words.reshape(raw.shape)
