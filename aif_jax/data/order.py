"""The order of an epoch, computed part by part and never stored: a permutation of 0..n-1.

A balanced Feistel network over the bits of an index is a bijection; an index that falls outside [0, n) is sent through it again
until it falls inside (cycle walking). So every index occurs once an epoch, in an order fixed by (seed, epoch), and a part of it
takes memory for that part alone. Source: format-preserving encryption (Black and Rogaway 2002).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from aif_jax.checks import expect, expect_integers

ORDER = 0  # stream of random numbers: the order must not change with anything else that is drawn
ROUNDS = 6  # even, so that halves of different width end where they began
SMALL = 1 << 12  # up to here a list is cheaper, and a network over so few bits does not mix evenly


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The indices 0..size-1, each once, in another order for each (seed, epoch).

    With `block` neighbours stay near each other, for a log on disk: blocks of neighbouring indices in random order, of which
    `window` at a time are mixed index by index. A run reads from `window * block` indices at any moment, so a disk reads each
    page once an epoch. The borders of blocks move from epoch to epoch.

    Attributes:
      size: n, how many indices.
      seed, epoch: 0 or more.
      block: neighbouring indices that stay together; 0 mixes all of them.
      window: blocks that are mixed with each other.
    """

    size: int
    seed: int
    epoch: int
    block: int = 0
    window: int = 64

    def __post_init__(self):
        for field, least in (("size", 0), ("seed", 0), ("epoch", 0), ("block", 0), ("window", 1)):
            expect(getattr(self, field) >= least, f"EpochOrder.{field}", f"at least {least}", getattr(self, field))

    def take(self, start: int, stop: int) -> np.ndarray:
        """The indices at places `start:stop` of the order, int64; `stop` is cut at `size`."""
        places = np.arange(start, min(stop, self.size), dtype=np.uint64)
        if not self.block or self.block * 2 > self.size:
            return self._permute(places, self.size, 0)
        blocks = self.size // self.block  # whole ones; the rest is mixed with the last group
        groups = -(-blocks // self.window)
        stride = self.window * self.block
        group = np.minimum(places // np.uint64(stride), np.uint64(groups - 1)).astype(np.int64)
        parts = []
        for g in range(int(group[0]), int(group[-1]) + 1) if len(places) else ():
            here = places[group == g] - np.uint64(g * stride)
            length = (self.size if g == groups - 1 else (g + 1) * stride) - g * stride
            mixed = self._permute(here, length, 3 + g)
            slot = g * self.window + mixed // self.block
            whole = slot < blocks
            chosen = slot.astype(np.uint64)
            chosen[whole] = self._permute(chosen[whole], blocks, 1).astype(np.uint64)
            parts.append(chosen.astype(np.int64) * self.block + mixed % self.block)
        shift = int(self._sequence(2).generate_state(1, np.uint64)[0] % np.uint64(self.size))
        return (np.concatenate([np.zeros(0, np.int64), *parts]) + shift) % self.size

    def _permute(self, index: np.ndarray, size: int, stream: int) -> np.ndarray:
        """Each index in [0, size) to another in it, one to one; uint64 in, int64 out."""
        if not len(index):
            return np.zeros(0, np.int64)
        if size <= SMALL:
            return np.random.default_rng(self._sequence(stream)).permutation(size)[index]
        bits = (size - 1).bit_length()
        keys = self._sequence(stream).generate_state(ROUNDS, np.uint64)
        out = _feistel(index, keys, bits)
        outside = np.flatnonzero(out >= size)
        while len(outside):
            out[outside] = _feistel(out[outside], keys, bits)
            outside = outside[out[outside] >= size]
        return out.astype(np.int64)

    def _sequence(self, stream: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=(ORDER, self.epoch, stream))


def epoch_order(positions: Any, *, seed: int, epoch: int, block: int = 0, window: int = 64) -> Callable[[int, int], np.ndarray]:
    """The order of an epoch as `take(start, stop)`, which gives the positions int64 at those places of it.

    `positions` [n] is a `range` or an array, memory-mapped perhaps; nothing is copied. Other arguments as `EpochOrder`.
    """
    order = EpochOrder(size=len(positions), seed=seed, epoch=epoch, block=block, window=window)
    if not isinstance(positions, range):
        array = expect_integers(positions, "positions", size=2**62)
        return lambda start, stop: array[order.take(start, stop)].astype(np.int64)
    positive = not len(positions) or min(positions[0], positions[-1]) >= 0
    expect(positive, "positions", "integers of at least 0", positions)
    return lambda start, stop: positions.start + positions.step * order.take(start, stop)


def _feistel(index: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A bijection of [0, 2 ** bits) that the keys choose; uint64 [n] to uint64 [n]."""
    high, low = np.uint64(bits // 2), np.uint64(bits - bits // 2)  # widths of the two halves
    left, right = index >> low, index & _ones(low)
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & _ones(high))
        high, low = low, high
    return (left << low) | right


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 [n]: every bit of the result depends on every bit of `value`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _ones(bits: np.uint64) -> np.uint64:
    return np.uint64((1 << int(bits)) - 1)
