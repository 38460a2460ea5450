"""Which events are trained on and which are held out.

A split is a set of positions; histories are not split: a held-out sample's history may hold training events and earlier
held-out ones, because a live system would have seen them too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import BLOCK, expect, expect_integers
from aif_jax.data.events import EventLog

BINS = 1 << 16  # of the histogram that finds a time by its rank


class Split(NamedTuple):
    """Positions in the event log, ascending, no position in two parts."""

    train: np.ndarray  # int64 [n_train]
    validation: np.ndarray  # int64 [n_validation]
    test: np.ndarray  # int64 [n_test]


def split_by_time(log: EventLog, *, validation: float = 0.1, test: float = 0.1) -> Split:
    """Splits at two moments that are the same for all users: train on the past, choose on the near past, test on the rest.

    The last `test` share of all events by time is the test part, the `validation` share before it the validation part. Every
    event is strictly earlier than those of later parts: events with the time of a cut go to the later part. Users or items that
    are new after a cut stay in; `eligible` leaves out samples without a history. Take statistics from `train` alone.

    Args:
      log: the events.
      validation, test: shares of events in [0, 1), together less than 1.

    Returns:
      Split of positions in the log, ascending.

    Raises:
      ValueError: shares out of range, or no training event left, because too many events share one time.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], [1] * 5, [10, 30, 50, 20, 40])
      >>> [part.tolist() for part in split_by_time(log, validation=0.2, test=0.2)]
      [[0, 1, 3], [4], [2]]
    """
    first_validation, first_test = time_cuts(log, validation=validation, test=test)
    train = np.flatnonzero(log.time < first_validation)
    if not len(train):
        raise ValueError(
            f"split_by_time: expected training events before the first cut, got none of {len(log)} events"
            f" with validation={validation}, test={test}: too few events, or too many share one time"
        )
    return Split(
        train=train,
        validation=np.flatnonzero((log.time >= first_validation) & (log.time < first_test)),
        test=np.flatnonzero(log.time >= first_test),
    )


def time_cuts(log: EventLog, *, validation: float = 0.1, test: float = 0.1) -> tuple[int, int]:
    """The first times of the validation and test parts of `split_by_time`, in seconds, for a log whose positions need a file.

    Args:
      log: the events; may be memory-mapped, is read in blocks.
      validation, test: as in `split_by_time`.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], [1] * 5, [10, 30, 50, 20, 40])
      >>> time_cuts(log, validation=0.2, test=0.2)
      (40, 50)
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"expected {name} in [0, 1), got {share}")
    if validation + test >= 1:
        raise ValueError(f"expected validation + test below 1, got {validation} + {test}")
    size = len(log)
    return _time_of_rank(log, size - round(size * (validation + test))), _time_of_rank(log, size - round(size * test))


def leave_last(log: EventLog) -> Split:
    """Holds out the last events of every user: the protocol of many published sequential recommenders.

    A user's last event is the test sample, the last event strictly earlier than it the validation sample; those strictly
    earlier are trained on. Ties with a held-out event are in no part. The cut differs from user to user, so training knows
    events later than other users' tests, which no live system does; `split_by_time` has no such leak.

    Returns:
      Split of positions in the log, ascending.

    Example:
      >>> log = EventLog.from_arrays([1] * 5, [1, 2, 3, 4, 5], [1] * 5, [10, 20, 30, 40, 40])
      >>> [part.tolist() for part in leave_last(log)]
      [[0, 1], [2], [4]]
    """
    starts, ends = log.offsets[:-1], log.offsets[1:]
    starts, ends = starts[ends > starts], ends[ends > starts]
    test = ends - 1
    before_test = log.history_end(test)
    has_validation = before_test > starts
    validation = before_test[has_validation] - 1
    before_validation = log.history_end(validation)
    lengths = before_validation - starts[has_validation]
    # every training range start:start + length, one after the other
    skipped = np.cumsum(lengths) - lengths
    train = np.arange(lengths.sum()) + np.repeat(starts[has_validation] - skipped, lengths)
    return Split(train=train, validation=validation, test=test)


def eligible(log: EventLog, positions: Any, *, min_history: int) -> np.ndarray:
    """The positions [B] whose item is known and whose user has at least `min_history` strictly earlier events, in their order.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1], [4, 5, 6], [1, 1, 1], [10, 20, 20])
      >>> eligible(log, [2, 1, 0], min_history=1).tolist()
      [2, 1]
    """
    expect(min_history >= 0, "eligible", "min_history of at least 0", min_history)
    at = expect_integers(positions, "positions", size=len(log)).astype(np.int64)
    history = log.history_end(at) - log.offsets[log.user[at]]
    return at[(history >= min_history) & (log.item[at] > 0)]


def _time_of_rank(log: EventLog, rank: int) -> int:
    """The time of the event with that rank by time; one past the last time for the rank after the last event."""
    if rank == len(log):
        return int(log.time.max(initial=-1)) + 1
    low, high = int(log.time.min()), int(log.time.max())
    while low < high:  # the time lies in [low, high]: each pass narrows that to one of BINS parts
        width = (high - low) // BINS + 1
        counts = np.zeros(BINS, np.int64)
        for start in range(0, len(log), BLOCK):
            time = log.time[start : start + BLOCK]
            counts += np.bincount((time[(time >= low) & (time <= high)] - low) // width, minlength=BINS)
        upto = np.cumsum(counts)
        part = int(np.searchsorted(upto, rank, side="right"))
        rank -= int(upto[part - 1]) if part else 0
        low, high = low + part * width, min(high, low + (part + 1) * width - 1)
    return low
