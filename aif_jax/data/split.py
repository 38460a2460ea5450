"""Which events are samples, and which of them are trained on or held out: ascending positions in the log.

Histories are not split: a held-out sample's history may hold training events and earlier held-out ones, as in a live system.
"""

import bisect
import os
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import BLOCK, expect
from aif_jax.data.events import EventLog
from aif_jax.encoding.times import TimeUnit, iso_text, seconds_of


class Split(NamedTuple):
    """Positions in the event log, ascending, no position in two parts.

    Attributes:
      train, validation, test: int64 [n] positions of each part.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_by_time(log: EventLog, *, validation: Any = 0.1, test: Any = 0.1, min_history: int = 0) -> Split:
    """Split at two moments that are the same for all users: train on the past, choose on the near past, test on the rest.

    The cuts are `time_cuts` of all events of known items, whatever their histories; the parts are `sample_positions` between
    them. Users or items that are new after a cut stay in. Take statistics from `train` alone.

    Example:
      >>> log = EventLog([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], [1] * 5, [10, 30, 50, 20, 40])
      >>> [part.tolist() for part in split_by_time(log, validation=0.2, test=0.2)]
      [[0, 1, 3], [4], [2]]
    """
    _, first_validation, first_test = time_cuts(log.time[sample_positions(log)], validation=validation, test=test)
    bounds = (None, first_validation), (first_validation, first_test), (first_test, None)
    return Split(*(sample_positions(log, min_history=min_history, since=since, before=before) for since, before in bounds))


def time_cuts(
    times: np.ndarray, *, validation: Any = 0.1, test: Any = 0.1, since: Any = None, unit: TimeUnit = "s"
) -> tuple[int | None, int, int]:
    """Return the first times of the training, validation and test parts, in seconds; the first is None without `since`.

    Every sample is strictly earlier than the samples of later parts: a sample at the time of a cut goes to the later part.
    Shares are of the samples from `since` on.

    Args:
      times: int64 [n] seconds of the samples in any order, such as `log.time`; may be memory-mapped.
      validation, test: a share of the samples in [0, 1), by time, the test part last; or the moment when the part begins: an
        ISO date, a `datetime`, a `datetime64`, or an integer in `unit`. The integer 0 is a share.

    Raises:
      ValueError: no share and no moment; shares or moments that leave no sample for training, for the test part after a
        moment, or for the validation part before it.

    Example:
      >>> time_cuts(np.array([10, 20, 30, 40, 50]), validation=0.2, test=0.2)
      (None, 40, 50)
      >>> time_cuts(np.array([10, 20, 30, 40, 50]), validation=0.2, test=35, since=15)
      (15, 30, 35)
    """
    expect(len(times), "times", "samples of the task, events or requests with known items", "none; check item ids and the task")
    span = f"the samples are from {iso_text(times.min())} to {iso_text(times.max())}"
    start = None if since is None else seconds_of(since, "since", unit=unit)
    earlier = 0 if start is None else _count(times, start)
    samples = len(times) - earlier
    expect(samples, "since", f"a moment with samples after it ({span})", repr(since))
    parts = {name: _share_or_moment(value, name, unit) for name, value in (("validation", validation), ("test", test))}
    shares = [part for part in parts.values() if isinstance(part, float)]
    expect(sum(shares) < 1, "validation, test", "validation + test below 1", f"{validation} + {test}")

    def first_of_last(count: float) -> int:
        """Return the first second of a last part of `count` samples, rounded, or more: all of one second stay together."""
        low, high = int(times.min()), int(times.max())
        # the first t such that more than n - count samples are at or before it: those from t on are the last count or more
        return low + bisect.bisect_right(range(low, high + 1), len(times) - round(count), key=lambda t: _count(times, t + 1))

    if isinstance(last := parts["test"], float):
        first_test, tested = first_of_last(samples * last), samples * last
    else:
        first_test, tested = last, len(times) - _count(times, last)
        expect(tested, "test", f"a moment with samples from it on ({span})", repr(test))
    if not isinstance(before := parts["validation"], float):
        first_validation = before
        expected = f"a moment before the test part, {iso_text(first_test)}, with samples between the two ({span})"
        expect(_count(times, before) < _count(times, first_test), "validation", expected, repr(validation))
    elif isinstance(last, float):
        first_validation = first_of_last(samples * (before + last))
    else:
        first_validation = min(first_of_last(tested + samples * before), first_test) if before else first_test
    got = f"none of {samples:,} with {validation=}, {test=}, {since=} ({span}): too few, or too many share one time"
    expect(_count(times, first_validation) > earlier, "times", "samples before the first cut, to train on", got)
    return start, first_validation, first_test


def sample_positions(
    log: EventLog, *, min_history: int = 0, since: int | None = None, before: int | None = None, requests: bool = False,
    file: str | os.PathLike[str] | None = None,
) -> np.ndarray:  # fmt: skip
    """Return events int64 [n] of known items, in a span of time, whose user has at least `min_history` strictly earlier events.

    Reads the log in one pass over blocks and holds a byte for each event.

    Args:
      log: the events; may be memory-mapped.
      since, before: the first time of the span and the first after it, None for all; such as those of `time_cuts`.
      requests: gives the first event of every request (the events of one user at one time), of a known item or not.
      file: a new .npy file to write the positions to and map, 8 bytes each; None keeps them in memory.

    Raises:
      FileExistsError: something is at `file`.
      ValueError: a negative `min_history`.

    Example:
      >>> log = EventLog([1, 1, 1, 2], [4, 5, 6, 4], [1] * 4, [10, 10, 30, 40])
      >>> sample_positions(log, min_history=1, before=40).tolist(), sample_positions(log, requests=True).tolist()
      ([2], [0, 2, 3])
    """
    expect(min_history >= 0, "sample_positions", "min_history of at least 0", min_history)
    if file is not None and os.path.lexists(file):
        raise FileExistsError(f"{os.fspath(file)}: expected a new file, but something is there; name another, or remove it")
    chosen = np.zeros(len(log), np.bool_)
    blocks = [slice(start, min(start + BLOCK, len(log))) for start in range(0, len(log), BLOCK)]
    for block in blocks:
        user, time = log.user[block], log.time[block]
        places, new = np.arange(block.start, block.stop), np.append(True, (user[1:] != user[:-1]) | (time[1:] != time[:-1]))
        first = np.where(new, places, 0)  # where the history of each event ends: the first event of its user and time
        first[0] = log.history_end([block.start])[0]  # it may be in the block before
        np.maximum.accumulate(first, out=first)
        mask = first == places if requests else log.item[block] > 0
        mask &= first - log.offsets[user] >= min_history
        mask &= (time >= since) if since is not None else True
        mask &= (time < before) if before is not None else True
        chosen[block] = mask
    if file is None:
        return np.flatnonzero(chosen)
    positions, written = np.lib.format.open_memmap(file, "w+", np.int64, (int(np.count_nonzero(chosen)),)), 0
    for block in blocks:
        found = block.start + np.flatnonzero(chosen[block])
        positions[written : written + len(found)] = found
        written += len(found)
    positions.flush()
    return np.load(file, mmap_mode="r")


def _share_or_moment(value: Any, name: str, unit: TimeUnit) -> float | int:
    """Return a share as a float, a moment as an int in seconds."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if number and (value == 0 or isinstance(value, float | np.floating)):
        expected = f"a share in [0, 1), or a moment: an ISO date such as '2022-05-06', a datetime, or an integer in {unit!r}"
        expect(0 <= value < 1, name, expected, repr(value))
        return float(value)
    return seconds_of(value, name, unit=unit)


def _count(times: np.ndarray, before: int) -> int:
    """Return how many times are before a moment."""
    return sum(int(np.count_nonzero(times[start : start + BLOCK] < before)) for start in range(0, len(times), BLOCK))
