"""Which candidates a sample has: one item, the list that was shown, sampled ones, or what retrieval found.

A source is a function of positions and a `Draw`; `Pipeline` calls it for every batch. Lists of [C] candidates let the user
function run once a list in training, as in serving. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.data.positions import Positions
from aif_jax.data.sampling import NegativeSampler, Seen, liked_or_not, lists
from aif_jax.data.validate import BLOCK, expect_integers


class Draw(NamedTuple):
    """What random choices may depend on, so that a resumed run makes the same ones."""

    seed: int
    epoch: int
    step: int


class Candidates(NamedTuple):
    """C candidates of each of B samples."""

    rows: np.ndarray  # int32 [B, C] catalogue rows, 0 where there is no candidate
    labels: np.ndarray  # float32 [B, C]
    log_q: np.ndarray | None = None  # float32 [B, C] for a corrected softmax, see `losses.listwise_softmax`


Source: TypeAlias = Callable[[np.ndarray, Draw], Candidates]
"""`source(positions [B], draw) -> Candidates`."""


def pointwise(dataset: Dataset, *, threshold: int) -> Source:
    """One candidate a sample, the event's item; label 1 where its action is at least `threshold`. See `liked_or_not`."""

    def source(positions: np.ndarray, draw: Draw) -> Candidates:
        return Candidates(*liked_or_not(dataset, positions, threshold=threshold))

    return source


def sampled(
    dataset: Dataset, *, sampler: NegativeSampler, negatives: int, seen: Seen | None = None, corrected: bool = False
) -> Source:
    """The event's item, label 1, and `negatives` drawn by popularity, label 0; C = 1 + negatives.

    Args:
      dataset: the data.
      sampler: of negatives, from training counts.
      negatives: n.
      seen: pairs that are no negatives.
      corrected: give `log_q` too: log(n q) of a negative, 0 of the positive, which always is there.
    """

    def source(positions: np.ndarray, draw: Draw) -> Candidates:
        rows, labels = lists(dataset, positions, sampler=sampler, negatives=negatives, seen=seen, **draw._asdict())
        if not corrected:
            return Candidates(rows, labels)
        log_q = sampler.log_q(rows, negatives)
        log_q[:, 0] = 0
        return Candidates(rows, labels, log_q)

    return source


def impressed(dataset: Dataset, *, candidates: int, threshold: int) -> Source:
    """The list that was shown: all events of a request, label 1 where the action is at least `threshold`.

    A request is the events of one user at one time, so every member of the list has the same history: none of them is strictly
    earlier than another. Of longer lists the first `candidates` events count; items that the catalogue lacks are left out.

    Args:
      dataset: the data; its log holds impressions, its action rows are in ascending order of what they mean (seen, clicked).
      candidates: C.
      threshold: the least action row with label 1.

    Returns:
      A source whose positions are the first events of requests: `request_starts(log)`.
    """
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")

    def source(positions: np.ndarray, draw: Draw) -> Candidates:
        log = dataset.log
        at = expect_integers(positions, "positions", size=len(log)).astype(np.int64)[:, None] + np.arange(candidates)
        inside = at < len(log)
        at = np.minimum(at, len(log) - 1)
        first = at[:, :1]
        inside &= (log.user[at] == log.user[first]) & (log.time[at] == log.time[first])
        return Candidates(log.item[at] * inside, ((log.action[at] >= threshold) & inside).astype(np.float32))

    return source


def retrieved(dataset: Dataset, *, retrieval: Callable[[np.ndarray], Any] | np.ndarray, candidates: int) -> Source:
    """The event's item, label 1, and what retrieval found for its request, label 0: what pre-ranking sees in production.

    The event's item is left out of the rest of the list, and so is the second of two equal rows.

    Args:
      dataset: the data.
      retrieval: a function from positions [B] to integer catalogue rows [B, R], 0 where there is none; or an array of such
        rows [n, R] for every event of the log, memory-mapped perhaps. It must see the past only: `dataset.log.history_end`.
      candidates: C, cut from the front of [B, 1 + R] or padded.
    """
    if candidates < 2:
        raise ValueError(f"candidates: expected at least 2, got {candidates}")

    def source(positions: np.ndarray, draw: Draw) -> Candidates:
        found = retrieval(positions) if callable(retrieval) else retrieval[positions]
        found = expect_integers(found, "retrieval", size=len(dataset.catalogue))
        if found.ndim != 2 or len(found) != len(positions):
            raise ValueError(f"retrieval: expected rows [{len(positions)}, R], got shape {list(found.shape)}")
        rows = np.zeros((len(found), candidates), np.int32)
        rows[:, 0] = dataset.log.item[positions]
        width = min(found.shape[1], candidates - 1)
        rows[:, 1 : 1 + width] = found[:, :width]
        order = np.argsort(rows, axis=1, kind="stable")
        ascending = np.take_along_axis(rows, order, axis=1)
        repeated = np.zeros(rows.shape, np.bool_)
        np.put_along_axis(repeated, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
        rows[repeated] = 0
        labels = np.zeros(rows.shape, np.float32)
        labels[:, 0] = rows[:, 0] > 0
        return Candidates(rows, labels)

    return source


def request_starts(log: EventLog, *, min_history: int = 0, since: int | None = None, before: int | None = None) -> Positions:
    """The first event of every request, a request being the events of one user at one time.

    Args:
      log: the events; may be memory-mapped.
      min_history: strictly earlier events that the user must have.
      since, before: the span of time, as in `Positions.eligible`.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2], [4, 5, 6, 4], [1, 1, 2, 1], [10, 10, 30, 30])
      >>> starts = request_starts(log)
      >>> starts[range(len(starts))].tolist()
      [0, 2, 3]
    """
    bits = np.zeros(-(-len(log) // 8), np.uint8)
    for start in range(0, len(log), BLOCK):
        stop = min(start + BLOCK, len(log))
        user, time = log.user[start:stop], log.time[start:stop]
        good = np.ones(stop - start, np.bool_)
        good[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
        good[0] = log.history_end([start])[0] == start
        good &= np.arange(start, stop) - log.offsets[user] >= min_history
        if since is not None:
            good &= time >= since
        if before is not None:
            good &= time < before
        bits[start // 8 : -(-stop // 8)] = np.packbits(good, bitorder="little")
    return Positions(bits, len(log))
