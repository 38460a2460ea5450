"""Times: units, plausible values, and the order of events.

`in_unit` reads times once, at the edge, as integers in `Columns.time_unit`; ages and the log count whole seconds.
"""

import datetime
import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from aif_jax.checks import ArgumentError, expect

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
Moment: TypeAlias = int | float | str | datetime.datetime
"""A moment in settings: an integer in `Columns.time_unit`, ISO date or `datetime`; or a share, see `FitConfig.validation`."""
PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
MODERN, LATEST = 100_000_000, 4_102_444_800  # 1973 and 2100 in seconds: a present-day time is between them
FLOOR = -(2**62) // 10**9  # 1823 in seconds, the first time taken: times and their differences fit nanoseconds


def in_unit(times: Any, name: str, *, unit: TimeUnit = "s") -> np.ndarray:
    """Return times of any shape as integers in `unit`, int64, finer ones rounded down: the form that is compared.

    Arrays, JSON and stores come through here, files through `Cells.times` with the same limits. Dates written as numbers are
    told by other times: of the same column there, of the request in `Encoder.user`. Takes integers in `unit`, `datetime64`,
    `datetime` and ISO text (UTC where they name no zone). TypeError for others, ValueError for missing or implausible ones.
    """
    try:
        array = np.asarray(times)
    except ValueError:
        raise TypeError(f"{name}: expected integer times in {unit!r} or datetime64, got lists of several lengths") from None
    array = array if array.dtype.kind not in "UT" or isinstance(times, np.ndarray) else np.asarray(times, object)
    kind = array.dtype.kind
    if not array.size:
        return np.zeros(array.shape, np.int64)
    if kind in "iu":
        expect_plausible(array, name, unit=unit)
        return array.astype(np.int64, copy=False)
    if kind in "OM":
        missing = np.isnat(array) if kind == "M" else np.reshape([value is None for value in array.flat], array.shape)
        expect(not missing.any(), name, "a time", f"none{_place(missing)}")
    if kind in "OUT" and all(isinstance(value, str | datetime.date) for value in array.flat):
        nanoseconds, step = [_nanoseconds(value, name) for value in array.flat], PER_SECOND["ns"] // PER_SECOND[unit]
        whole = np.array([value // PER_SECOND["ns"] for value in nanoseconds]).reshape(array.shape)
        expect_plausible(whole, name, unit="s", dated=True)
        return np.array([value // step for value in nanoseconds], np.int64).reshape(array.shape)
    if kind != "M":
        raise TypeError(f"{name}: expected integer times in {unit!r} or datetime64, got dtype {array.dtype.name}")
    expect_plausible(array.astype("datetime64[s]").astype(np.int64), name, unit="s", dated=True)
    return array.astype(f"datetime64[{unit}]").astype(np.int64)


def rescaled(value: np.ndarray, *, given: str, unit: str) -> np.ndarray:
    """Return plausible times int64 in the unit `given` as integers in `unit`, finer ones rounded down."""
    wanted, had = PER_SECOND[unit], PER_SECOND[given]  # a second
    return value * (wanted // had) if wanted >= had else value // (had // wanted)


def seconds_of(value: Any, name: str, *, unit: TimeUnit = "s") -> int:
    """Return ONE time in whole seconds: an ISO date or time, `datetime`, `date`, `datetime64`, or an integer in `unit`.

    A date is its first second. Raises ArgumentError for anything else, for a time that cannot be in `unit`, and for an integer
    such as 20240501, which may be meant as a date and would be in August 1970.
    """
    try:
        if isinstance(value, bool | np.bool_) or np.ndim(value):
            raise TypeError
        moment = int(in_unit(value, name, unit=unit)) // PER_SECOND[unit]
    except (TypeError, ValueError) as error:
        why = f"; {error}" if not isinstance(value, str) and isinstance(error, ValueError) else ""
        expected = f"an ISO date such as '2022-05-06', a datetime, or an integer in {unit!r}"
        raise ArgumentError(f"{name}: expected {expected}, got {value!r}{why}") from None
    if isinstance(value, int | np.integer) and dates_as_numbers(np.asarray(value)):
        date = re.sub(r"^(....)(..)(..).*", r"\1-\2-\3", str(value))
        out = f"give {date!r} for that date, {iso_text(moment)!r} for that moment"
        raise ArgumentError(f"{name}: expected a moment, got {value}, a date written as a number or {unit!r} since 1970; {out}")
    return moment


def iso_text(seconds: int) -> str:
    """Return a time in ISO form, UTC."""
    return str(np.datetime64(int(seconds), "s"))


def expect_plausible(value: np.ndarray, name: str, *, unit: TimeUnit, dated: bool = False) -> None:
    """Raise ValueError for a time that cannot be in `unit`; `dated`: read from dates, so not tested for a coarser unit."""
    late, coarse, ancient = wrong_unit(value, unit=unit, dated=dated)
    least = f"of at least {FLOOR * PER_SECOND[unit]}"
    for wrong, expected in ((late, "before 2100"), (coarse, "that looks like no coarser unit"), (ancient, least)):
        if wrong.any():
            got = int(value[wrong].flat[0]) if value.ndim else int(value)
            looks = f"which looks like {likely_unit(got)!r}"
            looks = "a date written as a number" if dates_as_numbers(np.array(got)) else looks
            hint = f", {looks}" if got > MODERN and not dated else ""
            raise ValueError(f"{name}: expected a time {expected} in {unit!r}, got {got}{_place(wrong)}{hint}")


def wrong_unit(value: np.ndarray, *, unit: str, dated: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which times (integers) are after 2100, which look like a coarser unit, which are before 1823."""
    late = np.asarray(value >= (LATEST + 1) * PER_SECOND[unit], bool)
    ancient, coarse = np.asarray(value < FLOOR * PER_SECOND[unit], bool), np.zeros_like(late)
    for other in PER_SECOND.values() if not dated else ():
        if other < PER_SECOND[unit]:
            coarse |= (value > MODERN * other) & (value < LATEST * other)
    return late, coarse, ancient


def dates_as_numbers(values: np.ndarray) -> np.ndarray:
    """Return which integers may be meant as dates from 1970 to 2099, such as 20240501, 202405011230 or 20240501123000."""
    minutes = np.where(values < 10**11, 0, np.where(values < 10**13, values, values // 100) % 10**4)
    dates = np.where(values < 10**11, values, np.where(values < 10**13, values // 10**4, values // 10**6))
    month, day = dates // 100 % 100, dates % 100
    fits = (dates >= 19700101) & (dates < 21000101) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    return fits & (minutes < 2400) & (minutes % 100 < 60)


def quoted(value: int, unit: str, *, dated: bool) -> str:
    """Return a time as its file has it: an integer, or a date and time of day."""
    return str(np.array(value, f"datetime64[{unit}]")).replace("T", " ") if dated else str(value)


def likely_unit(value: int) -> str:
    """Return the unit in which a time would be before 2100."""
    return next((unit for unit, per_second in PER_SECOND.items() if value // per_second <= LATEST), "ns")


def history_order(
    time: np.ndarray, item: np.ndarray, action: np.ndarray, *, ids: Callable[[np.ndarray], Any], user: np.ndarray | None = None
) -> np.ndarray | slice:
    """Return THE order of one user's events or, given `user` [n], user by user: an index [n] that sorts them oldest first.

    By time (integers of `in_unit`), ties by raw item id, then by action; histories read it backwards. So events of one moment,
    in any order of arrival, give one history, whatever a vocabulary knows: ties of known items are ordered by rows of `item`,
    others by `ids`, the raw ids of the tied events, and both keys give the same order because rows ascend with the ids.
    """
    keys = [time] if user is None else [user, time]
    order = slice(None) if user is not None and not out_of_order(user, time).any() else np.lexsort(keys[::-1])
    ordered = [key[order] for key in keys]
    same = np.logical_and.reduce([key[1:] == key[:-1] for key in ordered])
    if not same.any():
        return order
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    group, index = np.cumsum(np.append(True, ~same))[tied], np.arange(len(time))[order]
    at = index[tied]
    place = item[at] if item[at].all() else np.unique(ids(at), return_inverse=True)[1]
    index[tied] = at[np.lexsort((action[at], place, group))]
    return index


def out_of_order(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Return bool [n - 1]: events that do not come after the one before them, by user and time."""
    return (user[1:] < user[:-1]) | ((user[1:] == user[:-1]) & (time[1:] < time[:-1]))


def _nanoseconds(value: str | datetime.date, name: str) -> int:
    """Return nanoseconds since 1970 of a date and time; a date is its first moment."""
    if hasattr(value, "to_datetime64"):  # of pandas, with nanoseconds
        return int(value.to_datetime64().astype("datetime64[ns]").astype(np.int64))  # type: ignore[union-attr]
    beyond = 0  # nanoseconds of a text, of which Python keeps microseconds
    if isinstance(value, str):
        whole, point, fraction = value.partition(".")
        try:
            time = datetime.datetime.fromisoformat(value if not point or whole.count(":") == 2 else "")  # no parts of hours
        except ValueError:
            expected = "a date and time in ISO form such as '2022-05-06T12:00:00'"
            raise ValueError(f"{name}: expected {expected}, got {str(value)!r:.80}") from None
        beyond = int((re.match(r"\d{6}(\d{1,3})", fraction) or "00")[1].ljust(3, "0"))
    else:
        time = value if isinstance(value, datetime.datetime) else datetime.datetime.combine(value, datetime.time.min)
    since = (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)) - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return since // datetime.timedelta(microseconds=1) * 1000 + beyond


def _place(wrong: np.ndarray) -> str:
    return f" at position {[int(at) for at in np.unravel_index(np.argmax(wrong), wrong.shape)]}" if wrong.ndim else ""
