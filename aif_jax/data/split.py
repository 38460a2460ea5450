"""Which events are samples, and which of them are trained on or held out: ascending positions in the log.

Histories are not split: a held-out sample's history may hold training events and earlier held-out ones, because a live system
would have seen them too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import BLOCK, expect, expect_integers
from aif_jax.data.events import EventLog
from aif_jax.encoding.times import TimeUnit, seconds_of, shown

BINS = 1 << 16  # of the histogram that finds a time by its rank


class Split(NamedTuple):
    """Positions in the event log, ascending, no position in two parts.

    Attributes:
      train, validation, test: int64 [n] positions of each part.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_by_time(log: EventLog, *, validation: float = 0.1, test: float = 0.1) -> Split:
    """Splits at two moments that are the same for all users: train on the past, choose on the near past, test on the rest.

    The last `test` share of all events by time is the test part, the `validation` share before it the validation part. Every
    event is strictly earlier than those of later parts: events with the time of a cut go to the later part. Users or items that
    are new after a cut stay in; `eligible` leaves out samples without a history. Take statistics from `train` alone.

    Args:
      validation, test: shares of events in [0, 1), together less than 1.

    Raises:
      ValueError: shares out of range, or no training event left, because too many events share one time.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], [1] * 5, [10, 30, 50, 20, 40])
      >>> [part.tolist() for part in split_by_time(log, validation=0.2, test=0.2)]
      [[0, 1, 3], [4], [2]]
    """
    first_validation, first_test = time_cuts(log, validation=validation, test=test)
    train = np.flatnonzero(log.time < first_validation)
    got = f"none of {len(log)} events with {validation=}, {test=}: too few events, or too many share one time"
    expect(len(train), "split_by_time", "training events before the first cut", got)
    return Split(
        train=train,
        validation=np.flatnonzero((log.time >= first_validation) & (log.time < first_test)),
        test=np.flatnonzero(log.time >= first_test),
    )


def time_cuts(log: EventLog, *, validation: float = 0.1, test: float = 0.1) -> tuple[int, int]:
    """The first times of the validation and test parts of `split_by_time`, in seconds, for a log whose positions need a file.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], [1] * 5, [10, 30, 50, 20, 40])
      >>> time_cuts(log, validation=0.2, test=0.2)
      (40, 50)
    """
    for name, share in (("validation", validation), ("test", test)):
        expect(0 <= share < 1, "split by time", f"{name} in [0, 1)", share)
    expect(validation + test < 1, "split by time", "validation + test below 1", f"{validation} + {test}")
    size = len(log)
    return _time_of_rank(log, size - round(size * (validation + test))), _time_of_rank(log, size - round(size * test))


def cuts_of_samples(
    times: np.ndarray, *, validation: Any = 0.1, test: Any = 0.1, since: Any = None, unit: TimeUnit = "s"
) -> tuple[int | None, int, int]:
    """The first times of the training, validation and test parts of a task's samples, in seconds; None where training has none.

    Shares are of the samples themselves, those from `since` on: where a request has many events, or requests come late in the
    log, shares of events would cut the samples elsewhere.

    Args:
      times: int64 [n] seconds of the samples, in any order.
      validation, test: a share of the samples in [0, 1), by time, the test part last; or the moment when the part begins: an
        ISO date, a `datetime`, a `datetime64`, or an integer in `unit`. The integer 0 is a share.

    Raises:
      ValueError: no share and no moment; shares or moments that leave no sample for training, for the test part after a
        moment, or for the validation part before it.

    Example:
      >>> cuts_of_samples(np.array([10, 20, 30, 40, 50]), validation=0.2, test=0.2)
      (None, 40, 50)
      >>> cuts_of_samples(np.array([10, 20, 30, 40, 50]), validation=0.2, test=35, since=15)
      (15, 30, 35)
    """
    expect(len(times), "fit", "samples of the task, events or requests with known items", "none; check item ids and the task")
    span = f"the samples are from {shown(times.min())} to {shown(times.max())}"
    start = None if since is None else seconds_of(since, "fit since", unit=unit)
    times = np.sort(times if start is None else times[times >= start])
    expect(len(times), "fit since", f"a moment with samples after it ({span})", repr(since))
    parts = {name: _share_or_moment(value, f"fit {name}", unit) for name, value in (("validation", validation), ("test", test))}
    shares = [part for part in parts.values() if isinstance(part, float)]
    expect(sum(shares) < 1, "fit", "validation + test below 1", f"{validation} + {test}")

    def rank(held_out: float) -> int:
        place = len(times) - round(held_out)
        return int(times[place]) if place < len(times) else int(times[-1]) + 1

    if isinstance(last := parts["test"], float):
        first_test, tested = rank(len(times) * last), len(times) * last
    else:
        first_test, tested = last, int((times >= last).sum())
        expect(tested, "fit test", f"a moment with samples from it on ({span})", repr(test))
    if not isinstance(before := parts["validation"], float):
        first_validation = before
        some = np.searchsorted(times, first_test) - np.searchsorted(times, first_validation)
        expected = f"a moment before the test part, {shown(first_test)}, with samples between the two ({span})"
        expect(some > 0, "fit validation", expected, repr(validation))
    elif isinstance(last, float):
        first_validation = rank(len(times) * (before + last))
    else:
        first_validation = min(rank(tested + len(times) * before), first_test) if before else first_test
    got = f"none of {len(times):,} with {validation=}, {test=}, {since=} ({span}): too few, or too many share one time"
    expect(times[0] < first_validation, "fit", "samples before the first cut, to train on", got)
    return start, first_validation, first_test


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


def eligible_positions(
    log: EventLog,
    *, min_history: int, since: int | None = None, before: int | None = None, file: str | os.PathLike[str] | None = None,
) -> np.ndarray:  # fmt: skip
    """Events int64 of known items, in a span of time, whose user has at least `min_history` strictly earlier events.

    `eligible(log, split_by_time(log).train, ...)` gives the same positions; this reads the log in one pass over blocks.

    Args:
      log: the events; may be memory-mapped.
      since, before: the first time of the span and the first after it, None for all; such as those of `time_cuts`.
      file: a new .npy file to write them to and map, 8 bytes each; None keeps them in memory.

    Raises:
      FileExistsError: something is at `file`.
      ValueError: a negative `min_history`.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2], [4, 5, 6, 4], [1] * 4, [10, 20, 30, 40])
      >>> eligible_positions(log, min_history=1, before=30).tolist()
      [1]
    """
    return _select(log, lambda places, first: log.item[places] > 0, min_history, since, before, file)


def request_starts(
    log: EventLog,
    *, min_history: int = 0, since: int | None = None, before: int | None = None, file: str | os.PathLike[str] | None = None,
) -> np.ndarray:  # fmt: skip
    """The first event of every request (the events of one user at one time); arguments and errors as `eligible_positions`.

    Example:
      >>> log = EventLog.from_arrays([1, 1, 1, 2], [4, 5, 6, 4], [1, 1, 2, 1], [10, 10, 30, 30])
      >>> request_starts(log).tolist()
      [0, 2, 3]
    """
    return _select(log, lambda places, first: first == np.arange(places.start, places.stop), min_history, since, before, file)


def _select(
    log: EventLog, chosen: Callable[[slice, np.ndarray], np.ndarray], min_history: int, since: int | None, before: int | None,
    file: str | os.PathLike[str] | None,
) -> np.ndarray:  # fmt: skip
    """Positions by `chosen(places, first event of the same user and time)`; one bit for each event until all are counted."""
    expect(min_history >= 0, "positions", "min_history of at least 0", min_history)
    if file is not None and os.path.lexists(file):
        raise FileExistsError(f"{os.fspath(file)}: expected a new file, but something is there; name another, or remove it")
    blocks = []
    for start in range(0, len(log), BLOCK):
        places = slice(start, min(start + BLOCK, len(log)))
        user, time = log.user[places], log.time[places]
        first = np.zeros(len(user), np.int64)  # where the history of each event ends
        first[0] = log.history_end([start])[0]  # it may be in the block before
        new = 1 + np.flatnonzero((user[1:] != user[:-1]) | (time[1:] != time[:-1]))
        first[new] = start + new
        np.maximum.accumulate(first, out=first)
        mask = chosen(places, first) & (first - log.offsets[user] >= min_history)
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


def _share_or_moment(value: Any, name: str, unit: TimeUnit) -> float | int:
    """A share as a float, a moment as an int in seconds."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if number and (value == 0 or isinstance(value, float | np.floating)):
        expected = f"a share in [0, 1), or a moment: an ISO date such as '2022-05-06', a datetime, or an integer in {unit!r}"
        expect(0 <= value < 1, name, expected, repr(value))
        return float(value)
    return seconds_of(value, name, unit=unit)


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
