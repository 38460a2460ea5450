"""The order of the samples of an epoch, computed part by part and never stored: a permutation of positions.

A balanced Feistel network over the bits of an index is a bijection; an index outside [0, n) is sent through it again until it
falls inside (cycle walking). Source: format-preserving encryption (Black and Rogaway 2002).
"""

from typing import Any

import numpy as np

from aif_jax.checks import expect, expect_integer, expect_integers

ORDER = 0  # stream of random numbers: the order must not change with anything else that is drawn
ROUNDS = 6  # even, so that halves of different width end where they began
BLOCK_WINDOW = 64  # blocks that are mixed with each other
SMALL = 1 << 12  # up to here a list is cheaper, and a network over so few bits does not mix evenly


class EpochOrder:
    """Pseudo-random permutation of sample positions, fixed by (seed, epoch).

    With `block`, for a log on disk, blocks of neighbouring positions come in random order, and `window` blocks at a time are
    mixed: a run reads from `window * block` positions at any moment. The borders of blocks move from epoch to epoch.

    Args:
      positions: a `range` or an array of integers [n], memory-mapped perhaps; nothing is copied.
      block: neighbouring positions that stay together; 0 mixes all of them.
    """

    def __init__(self, positions: Any, *, seed: int, epoch: int, block: int = 0, window: int = BLOCK_WINDOW):
        for field, value, least in (("seed", seed, 0), ("epoch", epoch, 0), ("block", block, 0), ("window", window, 1)):
            expect_integer(value, f"EpochOrder.{field}", least=least)
        if isinstance(positions, range):
            positive = not len(positions) or min(positions[0], positions[-1]) >= 0
            expect(positive, "positions", "integers of at least 0", positions)
        else:
            positions = expect_integers(positions, "positions", size=2**62)
        self._positions, self._size = positions, len(positions)
        self._seed, self._epoch, self._block, self._window = seed, epoch, block, window

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return positions at places `start:stop` of the order, int64; `stop` is cut at n. ValueError for negative places."""
        start, stop = (expect_integer(v, f"EpochOrder.take {name}", least=0) for name, v in (("start", start), ("stop", stop)))
        places = np.arange(start, min(stop, self._size), dtype=np.uint64)
        whole = not self._block or self._block * 2 > self._size
        index = self._permute(places, self._size, 0) if whole else self._by_block(places)
        if isinstance(self._positions, range):
            return self._positions.start + self._positions.step * index
        return self._positions[index].astype(np.int64)

    def _by_block(self, places: np.ndarray) -> np.ndarray:
        blocks = self._size // self._block  # whole ones; the rest is mixed with the last group
        groups = -(-blocks // self._window)
        stride = self._window * self._block
        group = np.minimum(places // np.uint64(stride), np.uint64(groups - 1)).astype(np.int64)
        parts = [np.zeros(0, np.int64)]
        for g in np.unique(group).tolist():
            here = places[group == g] - np.uint64(g * stride)
            length = (self._size if g == groups - 1 else (g + 1) * stride) - g * stride
            mixed = self._permute(here, length, 3 + g)
            slot = g * self._window + mixed // self._block
            whole = slot < blocks
            slot[whole] = self._permute(slot[whole].astype(np.uint64), blocks, 1)
            parts.append(slot * self._block + mixed % self._block)
        shift = int(self._sequence(2).generate_state(1, np.uint64)[0] % np.uint64(self._size))
        return (np.concatenate(parts) + shift) % self._size

    def _permute(self, index: np.ndarray, size: int, stream: int) -> np.ndarray:
        """Return each index in [0, size) to another in it, one to one; uint64 in, int64 out."""
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
        return np.random.SeedSequence(self._seed, spawn_key=(ORDER, self._epoch, stream))


def _feistel(index: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """Return a bijection of [0, 2 ** bits) that the keys choose; uint64 [n] to uint64 [n]."""
    high, low, one = np.uint64(bits // 2), np.uint64(bits - bits // 2), np.uint64(1)  # widths of the two halves
    left, right = index >> low, index & ((one << low) - one)
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & ((one << high) - one))
        high, low = low, high
    return (left << low) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser, uint64 [n]: every bit depends on every bit of `value` (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
