"""Random choices that (seed, epoch, step) fix, and the order of the samples of an epoch, computed part by part, never stored.

A balanced Feistel network over the bits of an index is a bijection; an index outside [0, n) is sent through it again until it
falls inside (cycle walking). Source: format-preserving encryption (Black and Rogaway 2002).
"""

from typing import NamedTuple

import numpy as np

ORDER, NEGATIVES, SHUFFLE, HIDDEN, CHOICE, DRAWS = range(6)
"""Streams of random numbers, which do not change with each other: the order of samples, sampled negatives, the order of batches
within a window, hidden ids of items, candidates of a stage or a long list, retrieved candidates with a ranker's scores."""
ROUNDS = 6  # even, so that halves of different width end where they began
SMALL = 1 << 12  # up to here a list is cheaper, and a network over so few bits does not mix evenly


class BatchKey(NamedTuple):
    """Key of the random choices for one batch, so that a resumed run makes the same ones.

    Attributes:
      seed, epoch, step: seed of the run, epoch, and batch within the epoch.
    """

    seed: int
    epoch: int
    step: int

    def random(self, stream: int) -> np.random.Generator:
        """Return the random numbers of a stream, such as `CHOICE`."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, self.epoch, self.step)))


def permuted(size: int, start: int, stop: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the part `start:stop` of a pseudo-random permutation of [0, size), int64; (seed, epoch) fix the permutation."""
    random = BatchKey(seed, epoch, 0).random(ORDER)
    if size <= SMALL:
        return random.permutation(size)[start:stop]
    bits, keys = (size - 1).bit_length(), random.bit_generator.seed_seq.generate_state(ROUNDS, np.uint64)
    out = _feistel(np.arange(start, min(stop, size), dtype=np.uint64), keys, bits)
    while len(outside := np.flatnonzero(out >= size)):
        out[outside] = _feistel(out[outside], keys, bits)
    return out.astype(np.int64)


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
