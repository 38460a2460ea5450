"""Negatives: items drawn by popularity, fixed by (seed, epoch, step); and the items that a user has met before.

Source: popularity ** 0.75 is word2vec's (arXiv 1310.4546).
"""

from typing import Any

import numpy as np

from aif_jax.checks import BLOCK, expect, expect_array, expect_finite, expect_integers
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import ranges
from aif_jax.data.order import NEGATIVES, BatchKey

POWER = 0.75
"""Of the popularity by which negatives are drawn."""
ROUNDS = 16  # of redrawing what must be avoided, before the exact distribution is worked out


def item_counts(dataset: Dataset, positions: Any) -> np.ndarray:
    """Return events of each item among `positions`, int64 [N]. Pass training positions only: later counts leak the future."""
    parts = (np.asarray(positions[start : start + BLOCK]) for start in range(0, len(positions), BLOCK))  # may be on disk
    rows = (dataset.log.item[expect_integers(part, "positions", size=len(dataset.log))] for part in parts)
    return sum((np.bincount(row, minlength=len(dataset.catalogue)) for row in rows), np.zeros(len(dataset.catalogue), np.int64))


def counts_before(dataset: Dataset, time: int) -> np.ndarray:
    """Return events of each item before a time in seconds, of `Dataset.history_log`, int64 [N], read in blocks."""
    log, counts = dataset.history_log, np.zeros(len(dataset.catalogue), np.int64)
    for start in range(0, len(log), BLOCK):
        counts += np.bincount(log.item[start : start + BLOCK][log.time[start : start + BLOCK] < time], minlength=len(counts))
    return counts


class SeenPairs:
    """The items that the user of each sample has met in `Dataset.history_log` strictly before it; samples are `positions` [B].

    For each user and item only the first event is kept: a sample has met the item if its history ends after it.

    Example:
      >>> import aif_jax as aif
      >>> events = {"user": [7, 7, 7], "item": [1, 2, 1], "time": [10, 20, 30]}
      >>> data = aif.read(events, items={"item": [1, 2], "category": [1, 1]}, columns=aif.Columns())
      >>> SeenPairs(data, [1, 2]).contains([[0], [1]], [[1, 2], [1, 2]]).tolist()
      [[True, False], [True, True]]
    """

    def __init__(self, dataset: Dataset, positions: Any):
        log, at = dataset.history_log, expect_integers(positions, "positions", size=len(dataset.log)).astype(np.int64)
        self._end = dataset.history_log_end(at)
        users, self._owner = np.unique(dataset.log.user[at], return_inverse=True)
        start, last = log.offsets[users], np.zeros(len(users), np.int64)
        np.maximum.at(last, self._owner, self._end)
        lengths = last - start
        places = ranges(start, lengths)
        pairs = _pair(np.repeat(np.arange(len(users)), lengths), log.item[places])
        order = np.argsort(pairs)
        pairs = pairs[order]
        first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)])
        self._pairs, self._first = pairs[first], np.minimum.reduceat(places[order], first) if len(first) else first

    def contains(self, samples: Any, items: Any) -> np.ndarray:
        """Return bool, of the broadcast shape of the two arrays: whether the sample's user has met the item row before it."""
        sample, items = np.broadcast_arrays(samples, items)
        pairs = _pair(self._owner[sample], items)
        if not len(self._pairs):
            return np.zeros(pairs.shape, np.bool_)
        at = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        return (self._pairs[at] == pairs) & (self._first[at] < self._end[sample])

    def items(self, sample: int) -> np.ndarray:
        """Return int64, the item rows that the user of one sample has met before it, ascending."""
        owner = self._owner[sample]
        first, last = np.searchsorted(self._pairs, _pair(np.array([owner, owner + 1]), np.zeros(2, np.int64)))
        return self._pairs[first:last][self._first[first:last] < self._end[sample]] & 0xFFFFFFFF

    def drop(self, rows: np.ndarray, kept: Any = False) -> np.ndarray:
        """Return rows [B, C] with 0 for items that the user of each sample has met, unless `kept` [B, C] is true."""
        return np.where(self.contains(np.arange(len(rows))[:, None], rows) & ~np.asarray(kept), 0, rows).astype(rows.dtype)


class NegativeSampler:
    """Draws item rows with probability proportional to count ** 0.75.

    Row 0, the unknown item, is never drawn, nor is an item without a count: nothing in training pushes down their scores.

    Attributes:
      probabilities: float64 [N], sum to 1; for correcting a sampled softmax.

    Args:
      counts: [N] how often each catalogue row occurs among the TRAINING events.

    Raises:
      TypeError, ValueError: counts that are not finite numbers of at least 0, or fewer than two items that can be drawn.

    Example:
      >>> sampler = NegativeSampler([0, 1, 16])
      >>> sampler.probabilities.round(3).tolist()
      [0.0, 0.111, 0.889]
      >>> sampler.sample(2, 3, key=BatchKey(0, 0, 0), avoid=[1, 2]).tolist()
      [[2, 2, 2], [1, 1, 1]]
    """

    def __init__(self, counts: Any):
        counts = np.asarray(counts, np.float64)
        expect_array(counts, "counts", dtype=np.float64, shape=(None,))
        expect_finite(counts, "counts", minimum=0)
        weights = counts**POWER
        weights[:1] = 0
        drawable = np.count_nonzero(weights)
        expect(drawable >= 2, "counts", "at least 2 items with an event to draw as negatives", drawable)
        self.probabilities = weights / weights.sum()
        self._cumulative = np.cumsum(self.probabilities)
        self._cumulative /= self._cumulative[-1]  # exactly 1, so that no draw falls after the last item

    def sample(
        self, lists: int, negatives: int, *, key: BatchKey, avoid: Any = None, seen: SeenPairs | None = None
    ) -> np.ndarray:
        """Draw with replacement; what must be avoided is redrawn, so the rest keeps its proportions.

        Args:
          lists: B.
          negatives: n, rows for each list.
          key: the same one gives the same rows.
          avoid: integer row [B] that each list must not hold, such as its target; None for none.
          seen: items that the user of each list has met, which it must not hold either.

        Returns:
          int32 [B, n] item rows; 0 in lists for which every item that can be drawn must be avoided.

        Raises:
          ValueError: wrong shapes.
        """
        size = len(self.probabilities)
        avoided = expect_integers(np.zeros(lists, np.int64) if avoid is None else avoid, "avoid", size=size)
        expect(avoided.shape == (lists,), "avoid", f"shape [{lists}]", list(avoided.shape))
        random = key.random(NEGATIVES)
        rows = self._rows(random.random(lists * negatives)).reshape(lists, negatives)
        flat, list_of = rows.reshape(-1), np.repeat(np.arange(lists), negatives)
        at = np.arange(len(flat))  # flat positions that may hold a row to avoid
        for round_ in range(ROUNDS + 1):
            bad = flat[at] == avoided[list_of[at]]
            if seen is not None:
                bad |= seen.contains(list_of[at], flat[at])
            at = at[bad]
            if not len(at) or round_ == ROUNDS:
                break
            flat[at] = self._rows(random.random(len(at)))
        # A list whose likely items must nearly all be avoided: draw from what is left, at O(N) for each such list.
        for row in np.unique(list_of[at]):
            left = self.probabilities.copy()
            left[avoided[row]] = 0
            if seen is not None:
                left[seen.items(row)] = 0
            here = at[list_of[at] == row]
            flat[here] = random.choice(size, len(here), p=left / left.sum()) if left.any() else 0
        return rows

    def log_q(self, rows: Any, draws: int) -> np.ndarray:
        """Return log(draws * probability) of rows, float32: the `log_q` of `losses.listwise_softmax` for so many draws a list.

        Example:
          >>> np.exp(NegativeSampler([0, 1, 16]).log_q([1, 2], 9)).round(4).tolist()
          [1.0, 8.0]
        """
        probability = self.probabilities[expect_integers(rows, "rows", size=len(self.probabilities))]
        with np.errstate(divide="ignore"):
            return np.log(draws * probability).astype(np.float32)

    def _rows(self, uniform: np.ndarray) -> np.ndarray:
        """Return int32 [n], for each draw in [0, 1) the first row whose cumulative probability exceeds it."""
        order, rows = np.argsort(uniform), np.empty(len(uniform), np.int32)  # ascending draws search within the cache
        rows[order] = np.searchsorted(self._cumulative, uniform[order], side="right")
        return rows


def _pair(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return one int64 key for each (user, item)."""
    return (users.astype(np.int64) << 32) | items.astype(np.int64)
