"""Events of the future: which are wrong by what the stream itself says, and which by this machine's clock alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.times import STAMP_ZERO


class ClockError(RuntimeError):
    """Events are later than this machine's clock, and nothing but that clock says that they are wrong."""


class Written(NamedTuple):
    """When the messages of n events were written to the stream."""

    seconds: np.ndarray  # float64 [n] since 1970, NaN where the stream does not tell
    by_broker: np.ndarray  # bool [n], whether by the broker's clock and not the producer's


def check_future(stamped: np.ndarray, written: Written | None, *, clock: Callable[[], float], skew: int) -> None:
    """Raises for events of the future: all that come after one would be late.

    An event that is later than its own message is wrong wherever and whenever it is read. One that is later than this machine's
    clock is wrong or the clock is; where the broker's clock has confirmed it, this machine's does not count.

    Args:
      stamped: uint32 [n] times, see `times.stamps`.
      written: when their messages were written; None where that is not known.
      clock: of this machine, seconds since 1970.
      skew: seconds that clocks may differ by.

    Raises:
      ValueError: an event later than its message. ClockError: one later than `clock`, without a broker's time.
    """
    seconds = stamped.astype(np.int64) + STAMP_ZERO
    doubtful = np.ones(len(seconds), bool)
    if written is not None:
        early = seconds > written.seconds + skew  # never where the stream does not tell
        if early.any():
            at = int(np.argmax(early))
            moment = f"that of their message, {written.seconds[at]:.0f}"
            expect(False, "events", f"times up to {moment}, {skew} s of skew allowed", int(seconds[at]))
        doubtful = ~(written.by_broker & np.isfinite(written.seconds))
    now, last = int(clock()), int(seconds[doubtful].max(initial=0))
    if last > now + skew:
        raise ClockError(
            f"events: expected times up to this machine's clock, {now}, {skew} s of skew allowed, got {last}, {last - now} s"
            f" later; set the clock right, or let the stream carry the broker's time (Kafka:"
            f" message.timestamp.type=LogAppendTime), or give clock=None for a stream that is not of today"
        )
