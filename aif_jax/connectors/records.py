"""A feature store in raw values: events packed into records of one size, the protocol of a source, and the source in memory.

Each packed event has a checksum.

Features from Parquet files: the events and users files that training read, for replays and tests.

`Reads` of a feature source, and `Fetch`: from a source to the features of a request, the `features` of an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.raw import column_of, plain, taken
from aif_jax.encoding.times import PER_SECOND, TimeUnit, in_unit, whole_seconds
from aif_jax.encoding.vocabulary import as_ids
from aif_jax.readers.sources import pyarrow
from aif_jax.serving.metrics import Histogram
from aif_jax.serving.requests import Request
from aif_jax.serving.users import SingleFlight
from aif_jax.store.folders import local
from aif_jax.store.snapshots import integer
from aif_jax.types import UserFeatures

MOST_BYTES = 1024  # of a text in a record
UserId: TypeAlias = int | str
"""A raw user id."""
NONE = int(np.iinfo(np.int64).min)  # position of events that are not from a stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventLayout:
    """How an event is packed: item id, action and time, raw, in a fixed number of bytes.

    Attributes:
      item, time, action: columns of the events file; no action where the events are of one kind.
      time_unit: time unit of the packed times.
      item_bytes: 0 for ids that are integers; the longest id in UTF-8 where they are strings.
      action_bytes: the same for actions.

    Raises:
      ValueError: sizes out of range.

    Example:
      >>> layout = EventLayout(action="event", action_bytes=8)
      >>> packed = layout.pack({"item": [7, 8], "time": [1_600_000_000, 1_600_000_050], "event": ["buy", "view"]})
      >>> layout.nbytes, layout.columns_of(layout.checked(packed.tobytes(), "events"))["event"]
      (28, ['buy', 'view'])
    """

    item: str = "item"
    time: str = "time"
    action: str | None = None
    time_unit: TimeUnit = "s"
    item_bytes: int = 0
    action_bytes: int = 0

    def __post_init__(self):
        for name in ("item_bytes", "action_bytes"):
            size = getattr(self, name)
            expect(0 <= size <= MOST_BYTES, f"EventLayout.{name}", f"0 to {MOST_BYTES}", size)

    @classmethod
    def of(cls, encoder: Encoder, *, item_bytes: int = 32, action_bytes: int = 16) -> EventLayout:
        """The layout of what an encoder reads; the sizes count where ids or actions are text."""
        columns: Columns = encoder.columns
        if columns.action is None or columns.actions:
            text = any(isinstance(value, str) for value in columns.actions)
        else:
            text = encoder.vocabularies["action"].kind == "strings"
        return cls(
            item=columns.item, time=columns.time, action=columns.action, time_unit=columns.time_unit,
            item_bytes=item_bytes if encoder.vocabularies["item"].kind == "strings" else 0,
            action_bytes=action_bytes if text else 0,
        )  # fmt: skip

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Of one event; whole words, the last one a checksum of the others."""
        fields: list[tuple[str, Any]] = [("item", _field(self.item_bytes)), ("time", "<i8")]
        if self.action is not None:
            fields.append(("action", _field(self.action_bytes)))
        return np.dtype([*fields, ("check", "<u4")])

    @property
    def nbytes(self) -> int:
        """Of one event."""
        return self.dtype.itemsize

    @functools.cached_property
    def digest(self) -> str:
        """Eight hex digits: two layouts whose bytes mean different things differ."""
        return hashlib.sha256(f"{self.dtype.descr} {self.time_unit}".encode()).hexdigest()[:8]

    def pack(self, events: Any) -> np.ndarray:
        """Events [n], raw values by column, as records [n] in their order.

        Raises:
          TypeError: ids or actions of another kind, times that are no times.
          ValueError: columns of different lengths, a text that is too long, a time in another unit.
        """
        time = in_unit(plain(column_of(events, self.time)), f"events, column {self.time!r}", unit=self.time_unit)
        packed = np.zeros(len(time), self.dtype)
        packed["time"] = time
        for field, column, size in (("item", self.item, self.item_bytes), ("action", self.action, self.action_bytes)):
            if column is not None:
                values = as_ids(plain(column_of(events, column)), column)
                expect(len(values) == len(packed), "events", "columns of one length", f"{len(values)} and {len(packed)}")
                packed[field] = _integers(values, column) if not size else _texts(values, column, size)
        packed["check"] = self._checks(packed)
        return packed

    def checked(self, data: bytes, where: str) -> np.ndarray:
        """Records of packed bytes. Raises ValueError for bytes that are torn or altered; `where` names them."""
        expect(len(data) % self.nbytes == 0, where, f"whole events of {self.nbytes} bytes", f"{len(data)} bytes")
        packed = np.frombuffer(data, self.dtype)
        wrong = np.flatnonzero(packed["check"] != self._checks(packed))
        if len(wrong):
            raise ValueError(f"{where}: expected events with their checksums, got {len(wrong)} altered, first at [{wrong[0]}]")
        return packed

    def columns_of(self, packed: np.ndarray) -> Mapping[str, Any]:
        """Raw values by column, as the encoder takes them: int64 arrays [n], lists of texts."""
        columns: dict[str, Any] = {self.item: _values(packed["item"]), self.time: packed["time"].astype(np.int64)}
        if self.action is not None:
            columns[self.action] = _values(packed["action"])
        return columns

    def _checks(self, packed: np.ndarray) -> np.ndarray:
        """uint32 [n] sums over the words of each record, each times an odd number: a change of one word always shows."""
        words = np.ascontiguousarray(packed).view("<u4").reshape(len(packed), self.nbytes // 4)[:, :-1]
        weights = np.arange(1, words.shape[1] + 1, dtype=np.uint32) * np.uint32(0x9E3779B2) | np.uint32(1)
        return (words * weights).sum(1, dtype=np.uint32) + np.uint32(int(self.digest, 16))


def _field(size: int) -> str:
    return f"S{-(-size // 4) * 4}" if size else "<i8"


def _integers(values: Any, column: str) -> np.ndarray:
    if not isinstance(values, np.ndarray) and len(values):
        raise TypeError(f"events, column {column!r}: expected integers, got strings; EventLayout has sizes for text")
    return np.asarray(values, np.int64)


def _texts(values: Any, column: str, size: int) -> list[bytes]:
    if isinstance(values, np.ndarray) and len(values):
        raise TypeError(f"events, column {column!r}: expected strings, got integers")
    coded = [str(value).encode() for value in values]
    for text in coded:
        good = len(text) <= size and not text.endswith(b"\0")
        expect(good, f"events, column {column!r}", f"at most {size} bytes of UTF-8, no zero at the end", repr(text[: size + 8]))
    return coded


def _values(field: np.ndarray) -> Any:
    if field.dtype.kind == "i":
        return field.astype(np.int64)
    return [text.decode() for text in field.tolist()]


class Record(NamedTuple):
    """One user as a feature store keeps them: raw values, never rows of a vocabulary.

    Attributes:
      attributes: values by column of the users file; None if the store has none.
      events: the last events by column of the events file, in any order; None for none.
      version: changes with every event, for `Request.feature_version`; None if unknown.
    """

    attributes: Mapping[str, Any] | None = None
    events: Any = None
    version: Hashable = None


class FeatureSource(Protocol):
    """Where raw users come from."""

    async def get(self, user: UserId) -> Record | None:
        """The record of a user; None for an unknown one. Raises ValueError for one that is torn or foreign, and what its client
        raises."""
        ...


class EventSink(Protocol):
    """Where raw events go: the write path of a feature store."""

    def update(self, events: Any, *, position: int | np.ndarray | None = None, partition: int = 0) -> int:
        """Appends events of some users; returns how many were new.

        Args:
          events: raw values by column of the events file, the user's id among them.
          position: in the stream, one for all events or one for each [n], in rising order; events whose user has that position
            or a later one are left out. None appends in any case.
          partition: partition of the stream; always the same for one user.
        """
        ...


class MemoryFeatures(FeatureSource, EventSink):
    """A feature source, and its write path, in this process: for one replica, tests, and where there is no server.

    Args:
      length: events kept of a user, the last that came.

    Example:
      >>> import asyncio
      >>> source = MemoryFeatures(EventLayout(action=None), length=2)
      >>> source.update({"user": [7, 7, 7], "item": [1, 2, 3], "time": [1_600_000_000] * 3})
      3
      >>> source.put_user(7, {"city": "Oslo"})
      >>> record = asyncio.run(source.get(7))
      >>> record.attributes, record.events["item"].tolist(), record.version
      ({'city': 'Oslo'}, [2, 3], 3)
    """

    def __init__(self, layout: EventLayout, *, user: str = "user", length: int = 4096):
        expect(length >= 1, "length", "at least 1", length)
        self.layout, self.length, self._user = layout, length, user
        self._attributes: dict[UserId, Mapping[str, Any]] = {}
        self._events: dict[UserId, tuple[np.ndarray, int, int, int]] = {}  # packed, count, position, partition

    async def get(self, user: UserId) -> Record | None:
        attributes, events = self._attributes.get(user), self._events.get(user)
        if events is None:
            return None if attributes is None else Record(attributes)
        return Record(attributes, self.layout.columns_of(events[0]), events[1])

    def put_user(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keeps raw values of a user by column of the users file."""
        self._attributes[user] = dict(attributes)

    def update(self, events: Any, *, position: int | np.ndarray | None = None, partition: int = 0) -> int:
        """As `EventSink.update`; ValueError for a user whose events came by another partition."""
        parts = list(by_user(events, self._user, self.layout, position))
        for user, at, _ in parts:
            check_partition(user, self._events.get(user, (None, 0, NONE, partition))[2:], at, partition)
        new = 0
        for user, at, packed in parts:
            before, count, last, where = self._events.get(user, (packed[:0], 0, NONE, partition))
            if NONE < at <= last:
                continue
            kept = np.concatenate([before, packed])[-self.length :]
            place = (last, where) if at == NONE else (at, partition)
            self._events[user] = (kept, count + len(packed), *place)  # at once, so that a reader finds whole records
            new += len(packed)
        return new


def by_user(events: Any, column: str, layout: EventLayout, position: Any = None) -> Iterator[tuple[UserId, int, np.ndarray]]:
    """The packed events of each user and position, in the order in which they came; position `NONE` where they have none."""
    packed = layout.pack(events)
    ids = as_ids(plain(column_of(events, column)), column)
    names: Sequence[UserId] = ids.tolist() if isinstance(ids, np.ndarray) else ids
    expect(len(names) == len(packed), "events", "a user for each event", f"{len(names)} for {len(packed)} events")
    numbers: dict[tuple[UserId, int], int] = {}
    keys = zip(names, positions_of(position, len(packed)).tolist(), strict=True)
    owner = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(names))
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(numbers)))
    for (name, at), start, end in zip(numbers, [0, *ends], ends, strict=False):
        yield name, at, packed[order[start:end]]


def positions_of(position: Any, count: int) -> np.ndarray:
    """int64 [count]: the position in the stream of each of `count` events; `NONE` for events that are not from a stream.

    Args:
      position: one for all, one for each in rising order, or None.

    Raises:
      TypeError: what is no integer.
      ValueError: positions that fall, not one for each event, or outside 0 to 2^63 - 1.
    """
    if position is None:
        return np.full(count, NONE)
    if np.ndim(position) == 0:
        return np.full(count, integer(position, "position"), np.int64)
    at = np.asarray(position)
    expect(at.dtype.kind in "iu", "position", "integers", at.dtype, error=TypeError)
    one_each = f"one, or one for each of {count} events"
    expect(at.shape == (count,), "position", one_each, f"an array of shape {list(at.shape)}")
    expect((at[1:] >= at[:-1]).all(), "position", "positions of events in the order of the stream", "some that fall")
    for end in at[[0, -1]] if count else ():
        integer(end, "position")
    return at.astype(np.int64)


def check_partition(user: UserId, last: tuple[int, int], position: int, partition: int) -> None:
    """Raises ValueError for a user whose events came by another partition: positions of two cannot be compared."""
    if position != NONE and last[0] != NONE and last[1] != partition:
        expected = f"events of user {user!r} by partition {last[1]}, as before"
        raise ValueError(f"update: expected {expected}, got partition {partition}")


class ParquetFeatures(FeatureSource):
    """A `FeatureSource` over an events file or folder and, where there is one, a users file; held in memory as Arrow.

    A user's record has all their events, whenever they were. A replay leaves out what came later: `Fetch(past_only=True)`.

    Args:
      events: Parquet file or folder with the columns that training read.
      users: the same for users; None for none.

    Raises:
      ImportError: pyarrow is missing.
      FileNotFoundError: no such file.
      ValueError: a column is missing, or a user is listed twice.
    """

    def __init__(self, events: str | Path, *, users: str | Path | None = None, columns: Columns):
        parquet = pyarrow("pyarrow.parquet")
        self._events, self._places = _grouped(parquet, events, columns.of("events"), columns.user)
        self._users, self._records = None, {}
        if users is not None:
            self._users, self._records = _grouped(parquet, users, columns.of("users"), columns.user_record_id)
            twice = [user for user, (start, end) in self._records.items() if end - start > 1]
            expect(not twice, str(users), "each user once", f"{twice[:3]} more often")

    def __len__(self) -> int:
        """Users with events."""
        return len(self._places)

    async def get(self, user: UserId) -> Record | None:
        start, end = self._places.get(user, (0, 0))
        place = self._records.get(user)
        if place is None and end == start:
            return None
        attributes = None if place is None or self._users is None else self._users.slice(place[0], 1).to_pylist()[0]
        return Record(attributes, self._events.slice(start, end - start) if end > start else None, end - start)


def _grouped(parquet: Any, path: str | Path, wanted: Any, user: str) -> tuple[Any, dict[UserId, tuple[int, int]]]:
    """The columns of a file with the rows of a user next to each other, and where those of each user are."""
    file = local(path, "file")
    expect(file.exists(), str(file), "a Parquet file or folder", "no such file", error=FileNotFoundError)
    table = parquet.read_table(str(file))
    missing = [name for name in wanted if name not in table.schema.names]
    expect(not missing, str(file), f"columns {list(wanted)}", f"none of {missing}")
    table = table.select(list(wanted)).combine_chunks()
    coded = column_of(table, user).dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary))).tolist()
    places = zip([0, *ends], ends, strict=False)
    return table.take(order).combine_chunks(), dict(zip(coded.dictionary.to_pylist(), places, strict=True))


DAMAGE = (TypeError, ValueError, KeyError, OverflowError, AttributeError)
"""What an encoder raises for a record that does not fit."""


class Reads:
    """Reads of a feature source, counted and shared: requests of one user at one time share one read.

    A read is shared for `share` seconds: one that takes longer may hang, so later requests begin another one. A read that
    nobody waits for any more is cancelled.

    Args:
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
        self._reading = SingleFlight(detached_limit=0)

    async def record(self, user: Any) -> Record | None:
        """The record of a user; those who ask at one time share one read.

        Raises:
          TimeoutError: no answer within `timeout`.
          Exception: whatever the source raises.
        """
        loop, reading = asyncio.get_running_loop(), self._reading.get(user)
        if reading is not None:
            here = reading.task.get_loop() is loop
            if here and loop.time() - reading.began >= self._share:
                self.counters["overdue"] += 1
            if not here or loop.time() - reading.began >= self._share:
                self._reading.forget(user, reading.task)
        reading = self._reading.join(user, lambda: self._read(user))
        try:
            return await asyncio.shield(reading.task)  # one who gives up does not take it from the others
        finally:
            if self._reading.leave(reading, keep=False):
                self.counters["abandoned"] += 1

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
        start, limit = time.perf_counter(), asyncio.timeout(self._timeout)
        try:
            async with limit:
                record = await self.source.get(user)
        except TimeoutError:
            self.counters["timeouts"] += 1
            if not limit.expired():
                raise  # of the source itself
            raise TimeoutError(f"features: no answer of the source within {self._timeout} s") from None
        except Exception as error:
            self.counters["damaged" if isinstance(error, TypeError | ValueError) else "failed"] += 1
            raise
        self.seconds.observe(time.perf_counter() - start)
        self.counters["missing" if record is None else "found"] += 1
        return record


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
      encode: `encode(request, record, now)`, in place of the encoder's.

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
    moment = whole_seconds(now, "now", unit=columns.time_unit)
    at = np.flatnonzero(whole_seconds(plain(raw[columns.time]), columns.time, unit=columns.time_unit) < moment)
    return {name: taken(values, at) for name, values in raw.items()}
