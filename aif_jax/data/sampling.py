"""From positions to batches: order, negatives, labels. Each is a function of (seed, epoch, step) and nothing else,
so a run that is resumed at a step sees what it would have seen.

Source: popularity ** 0.75 is word2vec's (arXiv 1310.4546); the rest is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aif_jax.data.dataset import CorruptRecord, Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.order import EpochOrder
from aif_jax.data.positions import Positions
from aif_jax.data.validate import BLOCK, expect_array, expect_integers

ORDER, NEGATIVES = 0, 1  # streams of random numbers: the order must not change with the negatives; `order` uses 0 too
ROUNDS = 16  # of redrawing what must be avoided, before the exact distribution is worked out


def epoch_batches(
    positions: Any, batch_size: int, *, seed: int, epoch: int, drop_last: bool = True, start: int = 0
) -> Iterator[np.ndarray]:
    """Every position once an epoch, in an order of its own for each (seed, epoch).

    Args:
      positions: [n] integer positions of samples: an array, whose order is held in memory; or a `range` or a `Positions`, whose
        order is computed batch by batch, in memory that does not grow with n.
      batch_size: B.
      seed: 0 or more.
      epoch: 0 or more.
      drop_last: leave out a last batch of fewer than B, so that every batch has one shape.
      start: the step to begin with; the batches before it are skipped at no cost.

    Yields:
      int64 [B] (or fewer at the end) positions.

    Raises:
      ValueError: a batch size below 1, or a negative start.

    Example:
      >>> [len(batch) for batch in epoch_batches(range(10), 4, seed=0, epoch=0, drop_last=False)]
      [4, 4, 2]
    """
    if batch_size < 1 or start < 0:
        raise ValueError(f"epoch_batches: expected batch_size >= 1 and start >= 0, got {batch_size} and {start}")
    take = epoch_order(positions, seed=seed, epoch=epoch)
    stop = len(positions) - len(positions) % batch_size if drop_last else len(positions)

    def batches() -> Iterator[np.ndarray]:
        for at in range(start * batch_size, stop, batch_size):
            yield take(at, min(at + batch_size, stop))

    return batches()


def epoch_order(positions: Any, *, seed: int, epoch: int, block: int = 0, window: int = 64) -> Callable[[int, int], np.ndarray]:
    """The order of an epoch as a function: `take(start, stop)` gives the positions at those places of it, int64.

    Args:
      positions: as `epoch_batches` takes them.
      seed, epoch: 0 or more.
      block, window: of `EpochOrder`, for a log on disk; only for a `range` or `Positions`.

    Raises:
      TypeError, ValueError: positions that are not integers of at least 0, negative seed or epoch, a block for an array.
    """
    if isinstance(positions, range | Positions):
        _random(seed, ORDER, epoch)  # refuses negative ones
        order = EpochOrder(size=len(positions), seed=seed, epoch=epoch, block=block, window=window)
        if isinstance(positions, Positions):
            return lambda start, stop: positions[order.take(start, stop)]
        if len(positions) and min(positions[0], positions[-1]) < 0:
            raise ValueError(f"positions: expected integers of at least 0, got {positions}")
        return lambda start, stop: positions.start + positions.step * order.take(start, stop)
    if block:
        raise ValueError("block: expected positions as a range or Positions; the order of an array is held in memory")
    array = expect_integers(positions, "positions", size=2**62).astype(np.int64)
    mixed = _random(seed, ORDER, epoch).permutation(array)
    return lambda start, stop: mixed[start:stop]


def item_counts(dataset: Dataset, positions: Any) -> np.ndarray:
    """Events of each item among `positions`, int64 [N]. Pass training positions only: later counts leak the future.

    A `range` or `Positions` is read in blocks.
    """
    size = len(dataset.catalogue)
    if isinstance(positions, Positions):
        blocks = positions.blocks()
    elif isinstance(positions, range):
        blocks = (np.asarray(positions[start : start + BLOCK]) for start in range(0, len(positions), BLOCK))
    else:
        blocks = iter([positions])
    counts = np.zeros(size, np.int64)
    for at in blocks:
        counts += np.bincount(dataset.log.item[expect_integers(at, "positions", size=len(dataset.log))], minlength=size)
    return counts


class Seen:
    """Which (user, item) pairs occur among some events, for leaving them out of the negatives.

    Build it from training positions only: with later events, what is never a negative would tell the model the future.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 2], [4, 5, 6], [1, 1, 1], [10, 20, 30])
      >>> Seen(log, [0, 1, 2]).contains([1, 1, 2], [5, 6, 6]).tolist()
      [True, False, True]
    """

    def __init__(self, log: EventLog, positions: Any):
        at = expect_integers(positions, "positions", size=len(log))
        pairs = np.sort(_pair(log.user[at], log.item[at]))  # several times faster than np.unique
        self._pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)]]

    def contains(self, users: Any, items: Any) -> np.ndarray:
        """bool, of the broadcast shape of the two arrays of rows: whether the user has an event with the item."""
        pairs = _pair(np.asarray(users), np.asarray(items))
        if not len(self._pairs):
            return np.zeros(pairs.shape, np.bool_)
        at = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        return self._pairs[at] == pairs

    def items(self, user: int) -> np.ndarray:
        """int64, the item rows of one user, ascending."""
        first, last = np.searchsorted(self._pairs, _pair(np.array([user, user + 1]), np.zeros(2, np.int64)))
        return self._pairs[first:last] & 0xFFFFFFFF


class NegativeSampler:
    """Draws item rows with probability proportional to count ** power.

    Row 0, the unknown item, is never drawn, nor is an item without a count, except with power 0: that is uniform over
    all items.

    Attributes:
      probabilities: float64 [N], sum to 1; for correcting a sampled softmax.

    Args:
      counts: [N] how often each catalogue row occurs among the TRAINING events.
      power: 1 for popularity as it is, 0 for uniform.

    Raises:
      TypeError, ValueError: counts that are not finite numbers of at least 0 and shape [N], or fewer than two items
        that can be drawn.

    Example:
      >>> sampler = NegativeSampler([0, 1, 16], power=0.75)
      >>> sampler.probabilities.round(3).tolist()
      [0.0, 0.111, 0.889]
      >>> rows = sampler.sample(2, 3, avoid=[1, 2], seed=0, epoch=0, step=0)
      >>> rows.tolist()
      [[2, 2, 2], [1, 1, 1]]
    """

    def __init__(self, counts: Any, *, power: float = 0.75):
        counts = np.asarray(counts, np.float64)
        expect_array(counts, "counts", dtype=np.float64, shape=(None,))
        if not np.isfinite(counts).all() or counts.min(initial=0) < 0:
            raise ValueError("counts: expected finite values of at least 0")
        if not 0 <= power < np.inf:
            raise ValueError(f"power: expected a finite value of at least 0, got {power}")
        weights = counts**power
        weights[:1] = 0
        if np.count_nonzero(weights) < 2:
            raise ValueError(f"counts: expected at least 2 items that can be drawn, got {np.count_nonzero(weights)}")
        self.probabilities = weights / weights.sum()
        self._cumulative = np.cumsum(self.probabilities)
        self._cumulative /= self._cumulative[-1]  # exactly 1, so that no draw falls behind the last item
        # Where the search for a draw in [j, j + 1) / bins begins: a binary search over all rows would miss the cache.
        bins = 1 << min(22, len(counts).bit_length())
        self._guide = np.searchsorted(self._cumulative, np.arange(bins + 1) / bins, side="right").astype(np.int32)

    def sample(
        self,
        lists: int,
        negatives: int,
        *,
        seed: int,
        epoch: int,
        step: int,
        avoid: Any = None,
        users: Any = None,
        seen: Seen | None = None,
    ) -> np.ndarray:
        """Draws with replacement; what must be avoided is redrawn, so the rest keeps its proportions.

        Args:
          lists: B.
          negatives: n, rows for each list.
          seed, epoch, step: 0 or more; the same three give the same rows.
          avoid: integer rows [B] or [B, A] that the list must not hold, such as its target.
          users: integer user rows [B], for `seen`.
          seen: pairs that must not be drawn.

        Returns:
          int32 [B, n] item rows.

        Raises:
          ValueError: wrong shapes, or a list for which every item must be avoided.
        """
        size = len(self.probabilities)
        avoided = np.zeros([lists, 0], np.int64)
        if avoid is not None:
            avoided = expect_integers(avoid, "avoid", size=size).astype(np.int64)
            if avoided.ndim not in (1, 2) or len(avoided) != lists:
                raise ValueError(f"avoid: expected shape [{lists}] or [{lists}, A], got {list(avoided.shape)}")
            avoided = avoided.reshape(lists, -1) if avoided.size else np.zeros([lists, 0], np.int64)
        if (users is None) != (seen is None):
            raise ValueError("sample: expected users and seen together, got one of them")
        owners = np.zeros(lists, np.int64) if users is None else expect_integers(users, "users", size=2**31)
        if owners.shape != (lists,):
            raise ValueError(f"users: expected shape [{lists}], got {list(owners.shape)}")

        random = _random(seed, NEGATIVES, epoch, step)
        rows = self._rows(random.random(lists * negatives)).reshape(lists, negatives)
        at = np.arange(lists * negatives)  # flat positions that may hold a row to avoid
        flat = rows.reshape(-1)
        for round_ in range(ROUNDS + 1):
            of = at // max(negatives, 1)
            bad = (flat[at, None] == avoided[of]).any(axis=1)
            if seen is not None:
                bad |= seen.contains(owners[of], flat[at])
            at = at[bad]
            if not len(at) or round_ == ROUNDS:
                break
            flat[at] = self._rows(random.random(len(at)))
        # A list whose likely items must nearly all be avoided: draw from what is left, at O(N) for each such list.
        for row in np.unique(at // max(negatives, 1)):
            left = self.probabilities.copy()
            left[avoided[row]] = 0
            if seen is not None:
                left[seen.items(int(owners[row]))] = 0
            if not left.any():
                raise ValueError(f"sample: expected an item that list {row} need not avoid, got none of {size}")
            here = at[at // max(negatives, 1) == row]
            flat[here] = random.choice(size, len(here), p=left / left.sum())
        return rows

    def log_q(self, rows: Any, draws: int) -> np.ndarray:
        """log(draws * probability) of each row: the `log_q` of `losses.listwise_softmax` for what this sampler drew.

        Args:
          rows: integer item rows of any shape.
          draws: n, how many rows were drawn for the list.

        Returns:
          float32, shape of `rows`; -inf for a row that is never drawn.

        Example:
          >>> np.exp(NegativeSampler([0, 1, 3], power=1).log_q([1, 2], 4)).round(4).tolist()
          [1.0, 3.0]
        """
        probability = self.probabilities[expect_integers(rows, "rows", size=len(self.probabilities))]
        with np.errstate(divide="ignore"):
            return np.log(draws * probability).astype(np.float32)

    def _rows(self, uniform: np.ndarray) -> np.ndarray:
        """int32 [n], for each draw in [0, 1) the first row whose cumulative probability exceeds it."""
        bins = (uniform * (len(self._guide) - 1)).astype(np.int32)
        low, high = self._guide[bins], self._guide[bins + 1]
        pending = np.flatnonzero(low < high)
        while len(pending):
            first, last = low[pending], high[pending]
            middle = (first + last) >> 1
            beyond = self._cumulative[middle] > uniform[pending]
            low[pending] = np.where(beyond, first, middle + 1)
            high[pending] = np.where(beyond, middle, last)
            pending = pending[low[pending] < high[pending]]
        return low


def lists(
    dataset: Dataset,
    positions: Any,
    *,
    sampler: NegativeSampler,
    negatives: int,
    seed: int,
    epoch: int,
    step: int,
    seen: Seen | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and labels of the next-item task: which item did the user turn to, among sampled ones?

    Args:
      dataset: the data.
      positions: [B] integer positions of samples; their items must be known.
      sampler: of negatives.
      negatives: n.
      seed, epoch, step: 0 or more; the same three give the same lists.
      seen: pairs that are no negatives either; the target itself never is one.

    Returns:
      rows int32 [B, 1 + n], the positive first; labels float32 [B, 1 + n].

    Raises:
      ValueError: a sample of an unknown item; `split.eligible` leaves them out.
    """
    positions = expect_integers(positions, "positions", size=len(dataset.log))
    target = _targets(dataset, positions)
    users = None if seen is None else dataset.log.user[positions]
    drawn = sampler.sample(len(target), negatives, seed=seed, epoch=epoch, step=step, avoid=target, users=users, seen=seen)
    rows = np.concatenate([target[:, None], drawn], axis=1)
    labels = np.zeros(rows.shape, np.float32)
    labels[:, 0] = 1
    return rows, labels


def liked_or_not(dataset: Dataset, positions: Any, *, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """Items and labels of the liked-or-not task: one candidate a sample, label 1 where the action is at least `threshold`.

    Args:
      dataset: the data; its action rows must be in ascending order of liking, as rating buckets are.
      positions: [B] integer positions of samples; their items and actions must be known.
      threshold: the least action row that counts as liked.

    Returns:
      rows int32 [B, 1]; labels float32 [B, 1].

    Raises:
      ValueError: a threshold that every or no action reaches, a sample with an unknown item or action.
    """
    if not 2 <= threshold < dataset.schema.actions:
        raise ValueError(f"threshold: expected an action row in [2, {dataset.schema.actions}), got {threshold}")
    positions = expect_integers(positions, "positions", size=len(dataset.log))
    action = dataset.log.action[positions]
    if (action == 0).any():
        at = positions[int(np.argmax(action == 0))]
        raise ValueError(f"liked_or_not: expected samples with a known action, got action 0 at position {at}")
    rows = _targets(dataset, positions)[:, None]
    return rows, (action >= threshold).astype(np.float32)[:, None]


def _targets(dataset: Dataset, positions: np.ndarray) -> np.ndarray:
    target = dataset.log.item[positions]
    if (target == 0).any():
        at = positions[int(np.argmax(target == 0))]
        raise ValueError(
            f"positions: expected samples of known items, got the unknown item at position {at}; see split.eligible"
        )
    size = len(dataset.catalogue)
    if target.size and (target.min() < 0 or target.max() >= size):
        at = int(np.argmax((target < 0) | (target >= size)))
        raise CorruptRecord(
            f"{dataset.name}: event {positions[at]} of the log is corrupt: expected item in [0, {size}), got {target[at]}"
        )
    return target


def _random(seed: int, stream: int, *counters: int) -> np.random.Generator:
    if min(seed, *counters) < 0:
        raise ValueError(f"expected seed, epoch and step of at least 0, got {(seed, *counters)}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *counters)))


def _pair(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """One int64 key for each (user, item)."""
    return (users.astype(np.int64) << 32) | items.astype(np.int64)
