"""Lengths of histories in batches: what `FitConfig(buckets=None)` chooses."""

import itertools
from typing import Any

import numpy as np

from aif_jax.data.dataset import Dataset

SHORTEST_LENGTH = 128
"""The shortest length that is chosen: below it a step costs what does not depend on the history."""
FEW_STEPS = 3000
"""Runs of fewer steps compile two lengths at most, longer ones `MOST_LENGTHS`."""
MOST_LENGTHS = 5
COMPILE = 1 << 24
"""Places of histories in batches that cost as much training as one more length costs to compile, some 15 s of CPU."""
COUNTED_SAMPLES = 100_000  # histories that are counted: of twice as many every second, of three times every third, ...


def sampled_lengths(data: Dataset, positions: Any, *, longest: int) -> np.ndarray:
    """Return int64 [m], how many of the last `longest` events before a sample there are, of all or evenly spread positions."""
    return np.minimum(data.history_lengths(positions[:: max(1, len(positions) // COUNTED_SAMPLES)]), longest)


def choose_lengths(histories: np.ndarray, *, longest: int, batch_size: int, steps: int) -> tuple[int, ...]:
    """Return the shorter lengths for `Pipeline.buckets`: powers of two from 128 on that save more than they cost to compile.

    The lengths minimise places trained on, steps x batch_size x the mean length that holds a history, plus `COMPILE` for each
    length. Below `FEW_STEPS` steps there are two lengths at most, `longest` among them; () if that is 128 or shorter.
    """
    shorter = [length for power in range(longest.bit_length()) if SHORTEST_LENGTH <= (length := 1 << power) < longest]
    most = (2 if steps < FEW_STEPS else MOST_LENGTHS) - 1
    if not len(histories):
        return ()
    subsets = (subset for count in range(min(most, len(shorter)) + 1) for subset in itertools.combinations(shorter, count))

    def cost(shorter: tuple[int, ...]) -> float:
        lengths = (*shorter, longest)
        return steps * batch_size * np.take(lengths, np.searchsorted(lengths, histories)).mean() + COMPILE * len(shorter)

    return min(subsets, key=cost)
