"""An index that is split by item id over several hosts: which of them holds an item."""

from __future__ import annotations

from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.index.ids import raw_keys


def shard_of(ids: Any, shards: int) -> np.ndarray:
    """int64 [n] which of `shards` shards, counted from 0, holds each of raw ids [n]: a fixed hash, the same on every machine.

    Args:
      ids: integers or strings, as an index takes them.
      shards: N, at least 1.

    Raises:
      TypeError, ValueError: ids of both kinds or of neither, N below 1.

    Example:
      >>> shard_of([10, 20, 30, 40], 2).tolist(), shard_of(["item 2", "item 3"], 3).tolist()
      ([1, 0, 0, 1], [1, 2])
    """
    expect(isinstance(shards, int) and shards >= 1, "shards", "an integer of at least 1", repr(shards))
    return shard_of_keys(raw_keys(ids, "ids").key, shards)


def shard_of_keys(keys: np.ndarray, shards: int) -> np.ndarray:
    """`shard_of` of the keys int64 [n] of ids."""
    mixed = keys.astype(np.uint64)  # ids that count up, or in steps, must not favour a shard: the finalizer of splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(shards)).astype(np.int64)


def expect_shard(shard: Any) -> tuple[int, int]:
    """A pair (place, N) of a shard; ValueError for another."""
    good = isinstance(shard, tuple) and len(shard) == 2 and all(type(number) is int for number in shard)
    expect(good and 0 <= shard[0] < shard[1], "shard", "(place, N) with 0 <= place < N", repr(shard))
    return shard
