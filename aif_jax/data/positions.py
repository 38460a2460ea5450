"""Which events of a log are samples: ascending positions, in memory or in a file for a log that does not fit there."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from aif_jax.checks import BLOCK, expect
from aif_jax.data.events import EventLog


def eligible_positions(
    log: EventLog,
    *,
    min_history: int,
    since: int | None = None,
    before: int | None = None,
    file: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Events of known items, in a span of time, whose user has at least `min_history` strictly earlier events.

    `split.eligible(log, split_by_time(log).train, ...)` gives the same positions; this reads the log in one pass over blocks.

    Args:
      log: the events; may be memory-mapped.
      min_history: 0 or more.
      since, before: the first time of the span and the first after it, None for all; such as those of `split.time_cuts`.
      file: a new .npy file to write them to and map, 8 bytes each; None keeps them in memory.

    Returns:
      int64, ascending.

    Raises:
      FileExistsError: something is at `file`.
      ValueError: a negative `min_history`.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2], [4, 5, 6, 4], [1] * 4, [10, 20, 30, 40])
      >>> eligible_positions(log, min_history=1, before=30).tolist()
      [1]
    """
    expect(min_history >= 0, "positions", "min_history of at least 0", min_history)

    def good(start: int, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        known = log.item[start : start + len(user)] > 0
        return known & (_first_of_ties(log, start, user, time) - log.offsets[user] >= min_history) if min_history else known

    return _select(log, good, since, before, file)


def request_starts(
    log: EventLog,
    *,
    min_history: int = 0,
    since: int | None = None,
    before: int | None = None,
    file: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """The first event of every request (the events of one user at one time); arguments and errors as `eligible_positions`.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2], [4, 5, 6, 4], [1, 1, 2, 1], [10, 10, 30, 30])
      >>> request_starts(log).tolist()
      [0, 2, 3]
    """
    expect(min_history >= 0, "positions", "min_history of at least 0", min_history)

    def good(start: int, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        places = np.arange(start, start + len(user))
        return (_first_of_ties(log, start, user, time) == places) & (places - log.offsets[user] >= min_history)

    return _select(log, good, since, before, file)


def _select(
    log: EventLog,
    good: Callable[[int, np.ndarray, np.ndarray], np.ndarray],
    since: int | None,
    before: int | None,
    file: str | os.PathLike[str] | None,
) -> np.ndarray:
    """The positions of events that are good, in a span of time, block by block; one bit each until all are counted."""
    if file is not None and os.path.lexists(file):
        raise FileExistsError(f"{os.fspath(file)}: expected a new file, but something is there; it stays as it is")
    blocks = []
    for start in range(0, len(log), BLOCK):
        user, time = log.user[start : start + BLOCK], log.time[start : start + BLOCK]
        mask = good(start, user, time)
        for bound, inside in ((since, np.greater_equal), (before, np.less)):
            if bound is not None:
                mask &= inside(time, bound)
        blocks.append((np.packbits(mask), len(mask), int(np.count_nonzero(mask))))
    total = sum(count for _, _, count in blocks)
    positions = np.empty(total, np.int64) if file is None else np.lib.format.open_memmap(file, "w+", np.int64, (total,))
    written = 0
    for number, (bits, size, count) in enumerate(blocks):
        positions[written : written + count] = number * BLOCK + np.flatnonzero(np.unpackbits(bits, count=size))
        written += count
    if file is None:
        return positions
    positions.flush()  # type: ignore[union-attr]
    return np.load(file, mmap_mode="r")


def _first_of_ties(log: EventLog, start: int, user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """For each event of a block of neighbours, the first event of its user and time: where its history ends."""
    first = np.zeros(len(user), np.int64)
    first[0] = log.history_end([start])[0]  # it may be in the block before
    new = 1 + np.flatnonzero((user[1:] != user[:-1]) | (time[1:] != time[:-1]))
    first[new] = start + new
    return np.maximum.accumulate(first)
