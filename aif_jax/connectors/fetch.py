"""`Reads` of a feature source, and `Fetch`: from a source to the features of a request, the `features` of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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

DAMAGE = (TypeError, ValueError, KeyError, OverflowError, AttributeError)
"""What an encoder raises for a record that does not fit."""


@dataclasses.dataclass(eq=False)
class _Reading:
    """A read of the source under way."""

    task: asyncio.Task[Record | None]
    began: float  # by the clock of its event loop
    waiters: int = 0


class Reads:
    """Reads of a feature source, counted and shared: requests of one user at one time share one read.

    A read is shared for `share` seconds: one that takes longer may hang, so later requests begin another one. A read that
    nobody waits for any more is cancelled.

    Args:
      source: source of raw users.
      timeout: seconds for one read of the source; None leaves it to the source.
      share: seconds since its start in which a read is shared with later requests.

    Attributes:
      counters: records "found" and "missing", reads that ran into "timeouts", records that were "damaged", reads that "failed"
        otherwise, that took longer than they are shared ("overdue"), and that every request gave up ("abandoned").
      seconds: latency of reads that ended, a `Histogram`.
    """

    def __init__(self, source: FeatureSource, *, timeout: float | None = None, share: float = 1.0):
        expect(timeout is None or timeout > 0, "timeout", "None or more than 0 seconds", timeout)
        expect(share > 0, "share", "more than 0 seconds", share)
        self.source, self.counters, self.seconds = source, Counter(), Histogram()
        self._timeout, self._share = timeout, share
        self._reading: dict[Any, _Reading] = {}

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
            if reading is not None:
                self.counters["overdue"] += 1
            task = loop.create_task(self._read(user))
            reading = self._reading[user] = _Reading(task, loop.time())
            task.add_done_callback(lambda done: self._done(user, done))
        reading.waiters += 1
        try:
            return await asyncio.shield(reading.task)  # one who gives up does not take it from the others
        finally:
            reading.waiters -= 1
            if not reading.waiters and not reading.task.done():
                self.counters["abandoned"] += 1
                reading.task.cancel()
                self._forget(user, reading.task)

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Counts a record that cannot be encoded within the block as damaged."""
        try:
            yield
        except DAMAGE:
            self.counters["damaged"] += 1
            raise

    def values(self) -> dict[str, Any]:
        """Counters, and the latency of reads as the stage "read": what `prometheus_text` takes."""
        counters = {f"features_{name}": count for name, count in self.counters.items()}
        return {"counters": counters, "stages": {"read": self.seconds.values()}}

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

    def _forget(self, user: Any, task: asyncio.Task[Any]) -> None:
        if (reading := self._reading.get(user)) is not None and reading.task is task:
            del self._reading[user]

    def _done(self, user: Any, task: asyncio.Task[Any]) -> None:
        self._forget(user, task)
        if not task.cancelled():
            task.exception()  # asked for, or asyncio complains where everybody gave up


class Fetch(Reads):
    """`features(request)` over a source: gets the record, encodes it, counts what happened.

    An error is raised, and the engine answers with the user's last state or the unknown user and says so; a user whom the
    source does not know is the unknown user without being an error. The engine's fetch and a retrieval that needs the same
    features share one read.

    Args:
      source, timeout, share: see `Reads`.
      encoder: encoder of the model, with histories as long as it reads (`run.encoder`); turns a record into features.
      now: the time of a request, in the unit of the events; None is the clock of this machine.
      past_only: leaves out events from the request's second on however late they are, for replays; without it an event later
        than the clock allows is an error.
      encode: `encode(request, record, now)`, in place of the encoder's, such as one that reads a `UserTable`.

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
        super().__init__(source, timeout=timeout, share=share)
        expect((encoder is None) != (encode is None), "encoder", "an encoder or a function `encode`, one of them", encoder)
        expect(encoder is not None or not past_only, "past_only", "an encoder, which knows the columns", None)
        self._encoder, self._encode, self._now, self._past_only = encoder, encode, now, past_only

    async def __call__(self, request: Request) -> UserFeatures:
        """The features of a request; raises what the source and the encoder raise."""
        if self._encoder is not None:
            return await self.features(request, self._encoder)
        assert self._encode is not None
        record = await self.record(request.user)
        with self.encoding():
            return self._encode(request, record, int(time.time()) if self._now is None else self._now(request))

    async def features(self, request: Request, encoder: Encoder) -> UserFeatures:
        """The features by another encoder, such as that of a retrieval model; one read serves both."""
        record = await self.record(request.user)
        with self.encoding():
            now = clock(encoder) if self._now is None else self._now(request)
            return encoded(encoder, record, now, past_only=self._past_only)


def encoded(encoder: Encoder, record: Record | None, now: Any, *, past_only: bool = False) -> UserFeatures:
    """The features of a record, those of the unknown user without one; see `Fetch`."""
    if record is None:
        return encoder.user(None, None, now)
    none = isinstance(record.events, Mapping) and not record.events
    events = None if none else record.events
    if past_only and events is not None:
        events = before(events, encoder, now)
    return encoder.user(record.attributes, events, now)


def clock(encoder: Encoder) -> int:
    """The time now, by this machine, in the unit of an encoder's events."""
    return time.time_ns() * PER_SECOND[encoder.columns.time_unit] // 10**9


def before(events: Any, encoder: Encoder, now: Any) -> dict[str, Any]:
    """The raw events that are earlier than the second of a moment."""
    columns = encoder.columns
    names = [columns.item, columns.time, *([] if columns.action is None else [columns.action])]
    raw = {name: column_of(events, name) for name in names}
    moment = int(ticks(now, "now", unit=columns.time_unit).seconds)
    at = np.flatnonzero(ticks(plain(raw[columns.time]), columns.time, unit=columns.time_unit).seconds < moment)
    return {name: taken(values, at) for name, values in raw.items()}
