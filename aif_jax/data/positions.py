"""Which events of a log are samples, in one bit for each event: 12.5 MB for 100 million. Source: ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from aif_jax.data.events import EventLog
from aif_jax.data.validate import BLOCK, expect_array, expect_integers

WORDS = 8  # 64-bit words of bits that share one running count


class Positions:
    """An ascending set of positions in a log; `positions[i]` is the i-th of them.

    Stands wherever an array of positions does in `Pipeline` and `epoch_batches`, at one bit and an eighth for each event of
    the log in place of 64 for each sample.

    Args:
      bits: uint8 [ceil(size / 8)], bit p % 8 of byte p // 8 says whether position p is in the set.
      size: events of the log.

    Example:
      >>> positions = Positions.from_mask([False, True, False, True, True])
      >>> len(positions), positions[[0, 2]].tolist()
      (3, [1, 4])
    """

    def __init__(self, bits: np.ndarray, size: int):
        expect_array(bits, "bits", dtype=np.uint8, shape=(-(-size // 8),))
        if size % 8 and bits[-1] >> (size % 8):
            raise ValueError(f"bits: expected zeros behind the last of {size} positions, got {bits[-1]:#010b}")
        padded = np.zeros(-(-max(len(bits), 1) // (8 * WORDS)) * 8 * WORDS, np.uint8)
        padded[: len(bits)] = bits
        self.size = size
        self._bits = padded
        self._words = padded.view("<u8").reshape(-1, WORDS)
        counts = np.bitwise_count(self._words).sum(axis=1, dtype=np.int64)
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    @classmethod
    def from_mask(cls, mask: Any) -> Positions:
        """The positions where a bool mask [n] is true."""
        mask = expect_array(mask, "mask", dtype=np.bool_, shape=(None,))
        return cls(np.packbits(mask, bitorder="little"), len(mask))

    @classmethod
    def eligible(cls, log: EventLog, *, min_history: int, since: int | None = None, before: int | None = None) -> Positions:
        """Events of known items, in a span of time, whose user has at least `min_history` strictly earlier events.

        The same positions as `split.eligible(log, split_by_time(log).train, ...)` has, read in one pass over blocks.

        Args:
          log: the events; may be memory-mapped.
          min_history: 0 or more.
          since: the first time that counts, None for all; such as the cuts of `split.time_cuts`.
          before: the first time that counts no more, None for all.

        Example:
          >>> log = EventLog.from_arrays([1, 1, 1, 2], [4, 5, 6, 4], [1] * 4, [10, 20, 30, 40])
          >>> positions = Positions.eligible(log, min_history=1, before=30)
          >>> positions[range(len(positions))].tolist()
          [1]
        """
        if min_history < 0:
            raise ValueError(f"Positions.eligible: expected min_history of at least 0, got {min_history}")
        bits = np.zeros(-(-len(log) // 8), np.uint8)
        for start in range(0, len(log), BLOCK):  # a multiple of 8
            stop = min(start + BLOCK, len(log))
            user, time = log.user[start:stop], log.time[start:stop]
            good = log.item[start:stop] > 0
            if since is not None:
                good &= time >= since
            if before is not None:
                good &= time < before
            if min_history:
                good &= _first_of_ties(log, start, user, time) - log.offsets[user] >= min_history
            bits[start // 8 : -(-stop // 8)] = np.packbits(good, bitorder="little")
        return cls(bits, len(log))

    def __len__(self) -> int:
        """How many positions."""
        return int(self._before[-1])

    def __repr__(self) -> str:
        return f"Positions({len(self)} of {self.size} events)"

    def __getitem__(self, index: Any) -> np.ndarray:
        """int64 [B], the positions with these places [B] in the set, counted from 0.

        Raises:
          TypeError, ValueError: places that are not integers in [0, len).
        """
        place = expect_integers(index, "index", size=len(self)).astype(np.int64)
        row = np.searchsorted(self._before, place, side="right") - 1
        rest = place - self._before[row]  # its place among the bits of the row
        upto = np.cumsum(np.bitwise_count(self._words[row]), axis=-1, dtype=np.int64)
        word = np.sum(upto <= rest[..., None], axis=-1)
        rest = rest - np.where(word > 0, np.take_along_axis(upto, np.maximum(word - 1, 0)[..., None], -1)[..., 0], 0)
        bits, bit = self._words[row, word], np.zeros(place.shape, np.int64)
        for width in (32, 16, 8, 4, 2, 1):  # is it in the lower half of the bits that are left?
            lower = np.bitwise_count(bits & np.uint64((1 << width) - 1))
            upper = rest >= lower
            rest = np.where(upper, rest - lower, rest)
            bits = np.where(upper, bits >> np.uint64(width), bits)
            bit += upper * width
        return (row * WORDS + word) * 64 + bit

    def blocks(self) -> Iterator[np.ndarray]:
        """All positions, ascending, in arrays of bounded size: the quick way to go through the whole set."""
        for start in range(0, self.size, BLOCK):
            bits = np.unpackbits(self._bits[start // 8 : -(-min(start + BLOCK, self.size) // 8)], bitorder="little")
            yield start + np.flatnonzero(bits)


def _first_of_ties(log: EventLog, start: int, user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """For each event of a block of neighbours, the first event of its user and time: where its history ends."""
    first = np.zeros(len(user), np.int64)
    first[0] = log.history_end([start])[0]  # it may lie in the block before
    new = 1 + np.flatnonzero((user[1:] != user[:-1]) | (time[1:] != time[:-1]))
    first[new] = start + new
    return np.maximum.accumulate(first)
