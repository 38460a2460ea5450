"""Candidate counts padded to a few sizes, so that every request meets a function compiled at warm-up."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import numpy as np

from aif_jax.checks import expect


def geometric(smallest: int, largest: int, *, ratio: float = 2.0) -> tuple[int, ...]:
    """Bucket sizes from `smallest` to `largest`, each at most `ratio` times the one before, in multiples of 8.

    At most a share 1 - 1 / ratio of a bucket is padding.

    Example:
      >>> geometric(128, 1000)
      (128, 256, 512, 1000)

    Raises:
      ValueError: sizes below 1, out of order, or a ratio of 1 or less.
    """
    ordered = 1 <= smallest <= largest
    expect(ordered, "geometric", "1 <= smallest <= largest", f"smallest={smallest}, largest={largest}")
    expect(ratio > 1, "geometric ratio", "above 1", ratio)
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
