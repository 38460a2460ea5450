"""`Fetch`: from a feature source to the features of a request; the `features` callable of an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.records import FeatureSource, Record
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.raw import column_of, plain, taken
from aif_jax.encoding.times import PER_SECOND, ticks
from aif_jax.serving.metrics import Histogram
from aif_jax.serving.requests import Request
from aif_jax.types import UserFeatures


@dataclasses.dataclass(eq=False)
class _Reading:
    """A read of the source under way."""

    task: asyncio.Task[Record | None]
    began: float  # by the clock of its event loop
    waiters: int = 0


class Fetch:
    """`features(request)` over a source: gets the record, encodes it, counts what happened.

    An error is raised, and the engine answers with the user's last state or the unknown user and says so; a user whom the
    source does not know is the unknown user without being an error. Requests of one user at one time share one read, the
    engine's fetch and a retrieval that needs the same features among them, for `share` seconds: a read that takes longer may
    hang, so later requests begin another one, and it is cancelled when none of the earlier ones waits for it any more.

    Args:
      source: of raw users.
      encoder: of the model, with histories as long as it reads (`run.encoder`); turns a record into features.
      timeout: seconds for one read of the source; None leaves it to the source.
      share: seconds since its start in which a read is shared with later requests.
      now: the time of a request, in the unit of the events; None is the clock of this machine.
      past_only: leaves out events from the request's second on however late they are, for replays; without it an event later
        than the clock allows is an error.
      encode: `encode(request, record, now)`, in place of the encoder's, such as one that reads a `UserTable`.

    Attributes:
      counters: records found and missing, reads that timed out, records that were damaged, reads that failed otherwise, reads
        that took longer than they are shared ("overdue").
      seconds: of reads, a `Histogram`.

    Example:
      >>> from aif_jax.connectors import EventLayout, MemoryFeatures
      >>> source = MemoryFeatures(EventLayout())
      >>> fetch = Fetch(source, encode=lambda request, record, now: record)
      >>> asyncio.run(fetch(Request(user=7))), fetch.counters["missing"]
      (None, 1)
    """

    def __init__(
        self,
        source: FeatureSource,
        encoder: Encoder | None = None,
        *,
        timeout: float | None = None,
        share: float = 1.0,
        now: Callable[[Request], Any] | None = None,
        past_only: bool = False,
        encode: Callable[[Request, Record | None, Any], UserFeatures] | None = None,
    ):
        expect(timeout is None or timeout > 0, "timeout", "None or more than 0 seconds", timeout)
        expect(share > 0, "share", "more than 0 seconds", share)
        expect((encoder is None) != (encode is None), "encoder", "an encoder or a function `encode`, one of them", encoder)
        expect(encoder is not None or not past_only, "past_only", "an encoder, which knows the columns", None)
        self.source, self.counters, self.seconds = source, Counter(), Histogram()
        self._encoder, self._timeout, self._share, self._past_only = encoder, timeout, share, past_only
        self._encode = partial(self._by, encoder) if encoder is not None else encode
        self._now = now or self._clock
        self._reading: dict[Any, _Reading] = {}

    async def __call__(self, request: Request) -> UserFeatures:
        """The features of a request; raises what the source and the encoder raise."""
        return self._encoded(self._encode, request, await self.record(request.user))

    async def features(self, request: Request, encoder: Encoder) -> UserFeatures:
        """The features by another encoder, such as that of a retrieval model; one read serves both."""
        record = await self.record(request.user)
        return self._encoded(lambda *given: self._by(encoder, *given), request, record)

    async def record(self, user: Any) -> Record | None:
        """The record of a user; those who ask at one time share one read.

        Raises:
          TimeoutError: no answer within `timeout`.
          Exception: whatever the source raises.
        """
        loop, reading = asyncio.get_running_loop(), self._reading.get(user)
        if reading is not None and reading.task.get_loop() is not loop:
            reading = None
        if reading is None or loop.time() - reading.began >= self._share:
            late, task = reading, loop.create_task(self._read(user))
            reading = self._reading[user] = _Reading(task, loop.time())
            task.add_done_callback(lambda done: self._done(user, done))
            if late is not None:
                self.counters["overdue"] += 1
                self._drop_if_alone(user, late)
        reading.waiters += 1
        try:
            return await asyncio.shield(reading.task)  # one who gives up does not take it from the others
        finally:
            reading.waiters -= 1
            self._drop_if_alone(user, reading)

    def values(self) -> dict[str, Any]:
        """Counters and latency as plain values, with names for `engine.metrics()`."""
        return {"counters": {f"features_{name}": count for name, count in self.counters.items()}, "read": self.seconds.values()}

    async def _read(self, user: Any) -> Record | None:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                record = await self.source.get(user)
        except TimeoutError:
            self.counters["timeouts"] += 1
            raise TimeoutError(f"features: no answer of the source within {self._timeout} s") from None
        except (TypeError, ValueError):
            self.counters["damaged"] += 1
            raise
        except Exception:
            self.counters["failed"] += 1
            raise
        self.seconds.observe(time.perf_counter() - start)
        self.counters["missing" if record is None else "found"] += 1
        return record

    def _drop_if_alone(self, user: Any, reading: _Reading) -> None:
        """Cancels a read that nobody waits for and nobody can join any more."""
        if not reading.waiters and self._reading.get(user) is not reading:
            reading.task.cancel()

    def _done(self, user: Any, task: asyncio.Task[Any]) -> None:
        if (reading := self._reading.get(user)) is not None and reading.task is task:
            del self._reading[user]
        if not task.cancelled():
            task.exception()  # asked for, or asyncio complains where everybody gave up

    def _encoded(self, encode: Any, request: Request, record: Record | None) -> UserFeatures:
        try:
            return encode(request, record, self._now(request))
        except (TypeError, ValueError):
            self.counters["damaged"] += 1
            raise

    def _by(self, encoder: Encoder, request: Request, record: Record | None, now: Any) -> UserFeatures:
        if record is None:
            return encoder.user(None, None, now)
        events = record.events
        if self._past_only and events is not None:
            events = before(events, encoder, now)
        return encoder.user(record.attributes, events, now)

    def _clock(self, request: Request) -> Any:
        unit = "s" if self._encoder is None else self._encoder.columns.time_unit
        return int(time.time() * PER_SECOND[unit])


def before(events: Any, encoder: Encoder, now: Any) -> dict[str, Any]:
    """The raw events that are earlier than the second of a moment."""
    columns = encoder.columns
    names = [columns.item, columns.time, *([] if columns.action is None else [columns.action])]
    raw = {name: column_of(events, name) for name in names}
    moment = int(ticks(now, "now", unit=columns.time_unit).seconds)
    at = np.flatnonzero(ticks(plain(raw[columns.time]), columns.time, unit=columns.time_unit).seconds < moment)
    return {name: taken(values, at) for name, values in raw.items()}
