"""Times: their units, what a present-day time can be, and the order of events.

Inside the package times are whole seconds. `ticks` reads them once, at the edge, and refuses milliseconds given as seconds.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from aif_jax.checks import ArgumentError

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
EARLIEST, LATEST = 100_000_000, 4_102_444_800  # 1973 and 2100 in seconds: a present-day time is between them
FLOOR = -(2**62)  # below it differences of times could overflow
STAMP_ZERO = LATEST - 2**32 + 1  # 1963: the time that a stamp counts from


class Ticks(NamedTuple):
    """Times as they came: integers, of which `per_second` make a second."""

    value: np.ndarray  # int64 [...]
    per_second: int

    @property
    def seconds(self) -> np.ndarray:
        """int64 [...] whole seconds, rounded down."""
        return self.value if self.per_second == 1 else self.value // self.per_second


def ticks(times: Any, name: str, *, unit: TimeUnit = "s") -> Ticks:
    """Reads times of any shape: integers in `unit`, `datetime64` or `datetime` (UTC where they name no zone).

    Raises TypeError for no times, ValueError for a missing one or one that cannot be in `unit`, with the likely unit.

    Example:
      >>> ticks(1_511_544_070_999, "now")
      Traceback (most recent call last):
      ValueError: now: expected a time before 2100 in 's', got 1511544070999, which looks like 'ms'
    """
    if isinstance(times, datetime.datetime):
        times = np.datetime64(times if times.tzinfo is None else times.astimezone(datetime.UTC).replace(tzinfo=None), "us")
    try:
        array = np.asarray(times)
    except ValueError:
        raise TypeError(f"{name}: expected integer times in {unit!r} or datetime64, got lists of several lengths") from None
    if not array.size:
        return Ticks(np.zeros(array.shape, np.int64), PER_SECOND[unit])
    if array.dtype.kind == "M":
        if np.isnat(array).any():
            raise ValueError(f"{name}: expected a time, got none (NaT) {_place(np.isnat(array))}".rstrip())
        own = np.datetime_data(array.dtype)
        unit = own[0] if own[1] == 1 and own[0] in PER_SECOND else "s"  # type: ignore[assignment]
        value = array.astype(f"datetime64[{unit}]").astype(np.int64)
    elif array.dtype.kind in "iu":
        value = array.astype(np.int64, copy=False)
    else:
        raise TypeError(f"{name}: expected integer times in {unit!r} or datetime64, got dtype {array.dtype.name}")
    expect_plausible(value, name, unit=unit, dated=array.dtype.kind == "M")
    return Ticks(value, PER_SECOND[unit])


def seconds_of(value: Any, name: str, *, unit: TimeUnit = "s") -> int:
    """ONE time in whole seconds: an ISO date or date and time, a `datetime`, `date` or `datetime64`, or an integer in `unit`.

    A date is its first second. Raises ArgumentError for anything else, and for a time that cannot be in `unit`.

    Example:
      >>> seconds_of("2022-05-06", "test"), seconds_of(1_651_795_200_500, "test", unit="ms")
      (1651795200, 1651795200)
    """
    time: Any = value
    try:
        if isinstance(value, str):
            time = datetime.datetime.fromisoformat(value)
        elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            time = np.datetime64(value, "s")
        if isinstance(value, bool | np.bool_) or np.ndim(time):
            raise TypeError
        return int(ticks(time, name, unit=unit).seconds)
    except (TypeError, ValueError) as error:
        why = f"; {error}" if not isinstance(value, str) and isinstance(error, ValueError) else ""
        expected = f"an ISO date such as '2022-05-06', a datetime, or an integer in {unit!r}"
        raise ArgumentError(f"{name}: expected {expected}, got {value!r}{why}") from None


def shown(seconds: int) -> str:
    """A time as people read it, UTC.

    Example:
      >>> shown(1651795200)
      '2022-05-06T00:00:00'
    """
    return str(np.datetime64(int(seconds), "s"))


def stamps(seconds: Any, name: str = "times") -> np.ndarray:
    """Times in seconds as uint32, which devices compare and subtract exactly: 1 is in 1963, 0 stands for no time.

    Raises ValueError for one before 1963 or after 2100.

    Example:
      >>> stamps([1_500_000_060, 1_500_000_000]).tolist()
      [1692522555, 1692522495]
    """
    array = np.asarray(seconds, np.int64)
    outside = (array <= STAMP_ZERO) | (array > LATEST)
    if outside.any():
        got = int(array[outside].flat[0]) if array.ndim else int(array)
        raise ValueError(f"{name}: expected seconds in ({STAMP_ZERO}, {LATEST}], got {got} {_place(outside)}".rstrip())
    return (array - STAMP_ZERO).astype(np.uint32)


def expect_plausible(value: np.ndarray, name: str, *, unit: TimeUnit, dated: bool = False, start: int = 0) -> None:
    """Raises ValueError for a time that cannot be in `unit`; dates cannot be seconds. `start` is the first one's position."""
    late, early = wrong_unit(value, unit=unit, dated=dated)
    for wrong, expected in ((late, "before 2100"), (early, "after 1973"), (value < FLOOR, f"of at least {FLOOR}")):
        if wrong.any():
            got = int(value[wrong].flat[0]) if value.ndim else int(value)
            place = _place(wrong, start)
            looks = f", which looks like {likely_unit(got)!r}" if got > EARLIEST else ""
            raise ValueError(f"{name}: expected a time {expected} in {unit!r}, got {got}{place and ' ' + place}{looks}")


def wrong_unit(value: np.ndarray, *, unit: str, dated: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Which times are too late for the unit (after 2100), and which are too early because they look like seconds."""
    late = value >= (LATEST + 1) * PER_SECOND[unit]
    if unit == "s" or dated:
        return late, np.zeros_like(late)
    return late, (value > EARLIEST) & (value < LATEST)


def quoted(value: int, unit: str, *, dated: bool) -> str:
    """A time as its file has it: an integer, or a date and time of day."""
    return str(np.array(value, f"datetime64[{unit}]")).replace("T", " ") if dated else str(value)


def readable(seconds: int) -> str:
    """Date and time of day (UTC) of a time that can be a present-day one, else "second 10"."""
    return quoted(seconds, "s", dated=True) if EARLIEST < seconds <= LATEST else f"second {seconds}"


def likely_unit(value: int) -> str:
    """The unit in which a time would be before 2100."""
    return next((unit for unit, per_second in PER_SECOND.items() if value // per_second <= LATEST), "ns")


def ascending(value: np.ndarray) -> np.ndarray | slice:
    """An index that sorts times [n]; events mostly come in the order of their time, or in the opposite one."""
    rises = value[1:] >= value[:-1]
    if rises.all():
        return slice(None)
    if not rises.any():
        return slice(None, None, -1)
    first, bits = value.min(), len(value).bit_length()
    if int(value.max()) - int(first) >= 2 ** (62 - bits):
        return np.argsort(value, kind="stable")
    return np.sort((value - first) << bits | np.arange(len(value))) & (2**bits - 1)  # several times as fast as argsort


def break_ties(keys: Sequence[np.ndarray], ties: Sequence[np.ndarray]) -> np.ndarray | slice:
    """An index [n] that orders events, sorted by `keys` [n] each, by `ties` [n] each where the keys are equal.

    Files and feature stores deliver events of one moment in any order; this gives both the same history.
    """
    same = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    if not same.any():
        return slice(None)
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    group = np.cumsum(np.append(True, ~same))[tied]
    order = np.arange(len(same) + 1)
    order[tied] = tied[np.lexsort((*(tie[tied] for tie in reversed(ties)), group))]
    return order


def _place(wrong: np.ndarray, start: int = 0) -> str:
    if not wrong.ndim:
        return ""
    first = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return f"at position {[int(first[0]) + start, *map(int, first[1:])]}"
