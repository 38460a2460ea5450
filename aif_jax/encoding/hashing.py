"""Ids hashed to a bounded table: no vocabulary to build or to ship, but collisions, whose share is known beforehand.

The hash is splitmix64's finaliser (Steele, Lea and Flood 2014), the same in every process. Of n distinct ids in m = size - 1
rows the expected share with the row of another is 1 - (1 - 1/m)^(n - 1), about n / m. Source: arXiv 0902.2206.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.vocabulary import Vocabulary, as_ids

FEW = 16  # strings below which Python's integers are faster than NumPy's calls


def folded(
    strings: list[str], start: tuple[np.generic, ...], step: Callable[..., tuple[np.ndarray, ...]],
    one: Callable[..., tuple[int, ...]],
) -> list[np.ndarray]:  # fmt: skip
    """The states [n] of each string after its last character, in memory that follows the characters.

    Args:
      strings: texts of any lengths.
      start: state before the first character, a scalar of its dtype for each part.
      step: `step(*state, character)`: the next states of several strings from uint32 characters [m], the same in each place.
      one: `one(*state, characters)`: the last state of one string from its remaining characters, in Python's integers. The
        longest strings end here, so that one long string among short ones costs no array operation for each character.
    """
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    points = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32)
    order = np.argsort(-lengths, kind="stable")  # the longest first: strings with a character left are a prefix
    starts, sizes = (np.cumsum(lengths) - lengths)[order], lengths[order]
    states = [np.full(len(strings), part, part.dtype) for part in start]
    place = int(sizes[FEW]) if len(strings) > FEW else 0
    for at, count in enumerate(np.searchsorted(-sizes, -np.arange(place), side="left").tolist()):
        character = points[starts[:count] + at]
        for state, after in zip(states, step(*(state[:count] for state in states), character), strict=True):
            state[:count] = after
    for row in range(min(FEW, len(strings))):
        rest = points[starts[row] + place : starts[row] + sizes[row]].tolist()
        for state, after in zip(states, one(*(int(state[row]) for state in states), rest), strict=True):
            state[row] = after
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return [state[back] for state in states]


STEP = np.uint64(0x9E3779B97F4A7C15)


def hash_ids(raw: Any, size: int, *, seed: int = 0) -> np.ndarray:
    """Rows of raw ids: int32 in [1, size), of the shape of `raw`; row 0 stays for unknown and padding.

    Args:
      raw: integers or strings; 0 and the empty string are ids like others.
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
    ids = as_ids(raw, "hash_ids", short=False)
    words = ids.view(np.uint64) if isinstance(ids, np.ndarray) else folded(ids, (np.uint64(0),), _step, _rest)[0]
    mixed = mix(words + mix(np.full(1, seed % 2**64, np.uint64) + STEP))
    shape = raw.shape if isinstance(raw, np.ndarray) else np.array(raw, object).shape  # np.shape pads strings
    return (mixed % np.uint64(size - 1)).astype(np.int32).reshape(shape) + np.int32(1)


def hash_rest(vocabulary: Vocabulary, raw: Any, size: int, *, seed: int = 0) -> np.ndarray:
    """Rows of a vocabulary, whose frequent ids never collide, and for other ids hashed rows behind it: int32 in [1, size).

    Args:
      vocabulary: vocabulary of the frequent ids.
      raw, seed: see `hash_ids`, of the vocabulary's kind.
      size: rows of the table, more than `len(vocabulary)`.

    Raises:
      ValueError: no row is left for the rest.
    """
    first = len(vocabulary)
    expect(size > first, "hash_rest.size", f"more than the vocabulary's {first} rows", size)
    known = vocabulary.encode(raw)
    return np.where(known > 0, known, hash_ids(raw, size - first + 1, seed=seed) + np.int32(first - 1)).astype(np.int32)


def collision_rate(ids: int, size: int) -> float:
    """Expected share of `ids` distinct ids that share their row with another one, in a table of `size` rows.

    Example:
      >>> round(collision_rate(100_000, 1_000_001), 3)  # ten rows for each id
      0.095
    """
    _check_size(size)
    if ids < 2 or size == 2:
        return float(ids >= 2)
    return -math.expm1((ids - 1) * math.log1p(-1.0 / (size - 1)))


def _check_size(size: int) -> None:
    expect(2 <= size <= 2**31, "size", "2 to 2^31 rows, row 0 included", size)


def _step(words: np.ndarray, character: np.ndarray) -> tuple[np.ndarray]:
    """The next character of each string mixed into its word, but for those of code 0."""
    return (np.where(character > 0, mix((words ^ character.astype(np.uint64)) + STEP), words),)


def _rest(word: int, characters: list[int]) -> tuple[int]:
    """`_step` for every character of one string: `mix` on Python's integers."""
    step, whole = int(STEP), 0xFFFFFFFFFFFFFFFF
    for character in characters:
        if character:
            word = (word ^ character) + step & whole
            word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & whole
            word = (word ^ word >> 27) * 0x94D049BB133111EB & whole
            word ^= word >> 31
    return (word,)


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 [n]: every bit of the result depends on every bit of `value`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
