"""Candidate counts padded to a few sizes, so that every request meets a function compiled at warm-up."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import numpy as np


def geometric(smallest: int, largest: int, *, ratio: float = 2.0) -> tuple[int, ...]:
    """Bucket sizes from `smallest` to at least `largest`, each at most `ratio` times the one before, in multiples of 8.

    The padding wasted on a request is at most a share 1 - 1 / ratio of its bucket.

    Args:
      smallest: the first bucket, at least 1.
      largest: the last bucket holds at least so many candidates.
      ratio: above 1.

    Example:
      >>> geometric(128, 1000)
      (128, 256, 512, 1000)

    Raises:
      ValueError: sizes below 1, out of order, or a ratio of 1 or less.
    """
    if not 1 <= smallest <= largest:
        raise ValueError(f"geometric: expected 1 <= smallest <= largest, got smallest={smallest}, largest={largest}")
    if not ratio > 1:
        raise ValueError(f"geometric ratio: expected above 1, got {ratio}")
    sizes = [smallest]
    while sizes[-1] < largest:
        grown = max(math.floor(sizes[-1] * ratio / 8) * 8, sizes[-1] + 1)
        sizes.append(min(grown, largest))
    return tuple(sizes)


def bucket_for(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest bucket that holds `count` candidates. Raises ValueError above the largest: callers split first."""
    place = bisect.bisect_left(sizes, count)
    if place == len(sizes):
        raise ValueError(f"bucket_for: expected at most {sizes[-1]} candidates, got {count}")
    return sizes[place]


def split(count: int, sizes: tuple[int, ...]) -> Iterator[slice]:
    """Slices of at most the largest bucket that cover `count` candidates in order."""
    for start in range(0, count, sizes[-1]):
        yield slice(start, min(start + sizes[-1], count))


def pad(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """A new array [size] that starts with `values` [n] and ends with `fill`; the caller may give its memory to a device."""
    padded = np.full(size, fill, values.dtype)
    padded[: len(values)] = values
    return padded
