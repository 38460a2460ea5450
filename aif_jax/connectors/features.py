"""A feature store in raw values: the protocol of a source, and what makes features of its records.

`Fetch` leads from a source to the features of a request: `fetch.encode(request.user, encoder)` in the function of an engine.
"""

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.encoder import Encoder, LaterEvents
from aif_jax.encoding.times import PER_SECOND, in_unit
from aif_jax.serving.metrics import Histogram
from aif_jax.serving.users import SingleFlight
from aif_jax.types import UserFeatures


class Record(NamedTuple):
    """One user as a feature store keeps them: raw values, never rows of a vocabulary.

    Attributes:
      attributes: values by column of the users file, with or without the id; None if the store has none.
      events: the last events by column of the events file, in any order; None for none.
    """

    attributes: Mapping[str, Any] | None = None
    events: Any = None


class FeatureSource(Protocol):
    """Where raw users come from."""

    async def get(self, user: int | str) -> Record | None:
        """Return the record of a user, None if unknown. Raises ValueError for one that is torn or foreign, and what its client
        raises."""


SHARED = 1.0  # seconds since its start in which a read is shared: one that takes longer may hang
DAMAGE = (TypeError, ValueError, KeyError, OverflowError, AttributeError)
"""What an encoder raises for a record that does not fit."""


class Fetch:
    """Features of users over a source: gets the record, encodes it, counts what happened.

    An error is raised, and the engine answers with the user's last state or the unknown user and says so; a user whom the
    source does not know is the unknown user without being an error. Requests of one user at one time share one read, those of
    a retrieval that needs the same features too. A read that nobody waits for any more is cancelled.

    Attributes:
      counters: records "found" and "missing", records that were "damaged", reads that "failed" otherwise, that a later request
        of the user did not share because they had run for a second ("overdue"), and that every request gave up ("abandoned").
      seconds: latency of reads that returned, a `Histogram`.
    """

    def __init__(self, source: FeatureSource):
        self.source, self.counters, self.seconds = source, Counter(), Histogram()
        self._reading = SingleFlight(detached_limit=0)

    async def encode(self, user: Any, encoder: Encoder, now: Any = None) -> UserFeatures:
        """Return the features of a user by an encoder, `run.encoder` or that of a retrieval model; one read serves both.

        They are as of `now`, in the unit of the events; None takes this machine's clock. Raises what source and encoder raise.
        """
        moment = clock(encoder) if now is None else in_unit(now, "now", unit=encoder.columns.time_unit)
        record = await self.record(user)
        try:
            return encoded(encoder, user, record, moment)
        except DAMAGE as error:
            self.counters["damaged"] += record is not None and (now is None or not isinstance(error, LaterEvents))
            raise

    async def record(self, user: Any) -> Record | None:
        """Return the record of a user; those who ask at one time share one read. Raises what the source raises."""
        loop = asyncio.get_running_loop()
        if (reading := self._reading.by_key.get(user)) is not None:
            here = reading.task.get_loop() is loop
            if not here or loop.time() - reading.began >= SHARED:
                self.counters["overdue"] += here
                self._reading.forget(reading)
        reading = self._reading.join(user, lambda: self._read(user))
        try:
            return await asyncio.shield(reading.task)  # one who gives up does not take it from the others
        finally:
            if self._reading.leave(reading, keep=False):
                self.counters["abandoned"] += 1

    def values(self) -> dict[str, Any]:
        """Return counters, and the latency of reads as the stage "read": what `prometheus_text` takes."""
        counters = {f"features_{name}": count for name, count in self.counters.items()}
        return {"counters": counters, "stages": {"read": self.seconds.values()}}

    async def _read(self, user: Any) -> Record | None:
        start = time.perf_counter()
        try:
            reading, got = self.source.get(user), "a plain function; define it with async"
            expect(inspect.isawaitable(reading), "feature source", "`async get(user)`", got, error=RuntimeError)
            record = await reading
        except Exception as error:
            self.counters["damaged" if isinstance(error, TypeError | ValueError) else "failed"] += 1
            raise
        self.seconds.observe(time.perf_counter() - start)
        self.counters["missing" if record is None else "found"] += 1
        return record


def encoded(encoder: Encoder, user: Any, record: Record | None, now: Any) -> UserFeatures:
    """Return the features of a user's record, those of the unknown user without one; ValueError for another user's."""
    if record is None:
        return encoder.user(None, None, now)
    expect(isinstance(record, tuple), "record", "Record(attributes, events) or None", type(record).__name__)
    columns, (attributes, events) = encoder.columns, record
    if attributes is None:
        attributes = dict.fromkeys((*columns.user_attributes, *columns.user_floats))
    name, none = columns.user_record_id, isinstance(events, Mapping) and not events
    given: Any = attributes.get(name, user)
    same = np.asarray(given, object).ravel().tolist() == [user]
    expect(same, f"user, column {name!r}", f"{user!r:.80}, the user's id", f"{given!r:.80}; leave it out")
    return encoder.user({**attributes, name: user}, None if none else events, now)


def clock(encoder: Encoder) -> int:
    """Return the time now, by this machine, in the unit of an encoder's events."""
    return time.time_ns() * PER_SECOND[encoder.columns.time_unit] // 10**9
