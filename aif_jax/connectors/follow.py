"""`Follower`: applies an update stream to an index or a feature store, exactly once, poison messages aside."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.records import EventSink
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.connectors.streams import Change, Message, StreamError, UpdateStream, decode, joined
from aif_jax.index import IndexWriter
from aif_jax.index.ids import raw_keys
from aif_jax.store.snapshots import positions_by_partition, snapshots

POISON = (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError)
"""What a message raises that can never be applied; anything else stops the follower."""
logger = logging.getLogger(__name__)


class StreamEntry(NamedTuple):
    """A message that could be read.

    Attributes:
      message, change: the message and its contents.
    """

    message: Message
    change: Change


class Target(Protocol):
    """What a stream is applied to."""

    @property
    def positions(self) -> Mapping[int, int]:
        """Where the stream goes on, by partition."""
        ...

    @property
    def saved(self) -> Mapping[int, int]:
        """What outlives this process, by partition."""
        ...

    def apply(self, entries: Sequence[StreamEntry], *, position: int, partition: int) -> None:
        """Applies messages of one partition in order, all or none; `position` is that of the last, or of poison without any."""
        ...

    def tick(self) -> None:
        """Called between messages."""
        ...


class IndexTarget(Target):
    """An `IndexWriter` as a target: messages are raw items, deletions and tombstones."""

    def __init__(self, writer: IndexWriter):
        self.writer = writer

    @property
    def positions(self) -> Mapping[int, int]:
        return self.writer.positions

    @property
    def saved(self) -> Mapping[int, int]:
        return self.writer.saved_positions

    def tick(self) -> None:
        """Saves a snapshot where one is due by time."""
        self.writer.tick()

    def apply(self, entries: Sequence[StreamEntry], *, position: int, partition: int) -> None:
        changes, kind, encoder = [], self.writer.index.kind, self.writer.index.trained.need_encoder("IndexTarget")
        for change in joined([entry.change for entry in entries]):  # all are read before one is applied
            if change.table is None:
                raw_keys(change.deleted, "ids", like=kind)
                changes.append((None, change.deleted))
            else:
                items = encoder.items(change.table)
                kind = raw_keys(items[0], "ids", like=kind).kind
                changes.append((items, None))
        self.writer.update(changes, position=position, partition=partition)


class SinkTarget(Target):
    """A feature store: a user's value holds its position, nothing else is saved.

    Messages are applied together, each event with the position of its message: a kill in the middle leaves users who have the
    first of their events, and the sink skips these when they come again.

    Args:
      sink: `ValkeyFeatureWriter` or `MemoryFeatures`.
      positions: to start after, by partition; messages from before the last of a user are skipped by the sink.
    """

    def __init__(self, sink: EventSink, *, positions: Mapping[int, int] | None = None):
        self._sink = sink
        self._positions = positions_by_partition(positions)

    @property
    def positions(self) -> Mapping[int, int]:
        return dict(self._positions)

    @property
    def saved(self) -> Mapping[int, int]:
        return self.positions

    def apply(self, entries: Sequence[StreamEntry], *, position: int, partition: int) -> None:
        """As `Target.apply`; where it raises, some users may have their events, which are skipped when they come again."""
        for table, at in tables_of(entries):
            self._sink.update(table, position=at, partition=partition)
        self._positions[partition] = max(position, self._positions.get(partition, position))

    def tick(self) -> None:
        """Nothing to save."""


def tables_of(entries: Sequence[StreamEntry]) -> Iterator[tuple[Any, np.ndarray]]:
    """The events of messages: tables of one schema each, and the position of each event's message."""
    changes, messages = [entry.change for entry in entries], [entry.message for entry in entries]
    expect(all(change.table is not None for change in changes), "message", "events", "a deletion")
    positions, done = np.array([message.position for message in messages], np.int64), 0
    counts = [change.table.num_rows for change in changes]
    at = np.repeat(positions, counts)
    for part in joined(changes):
        some = slice(done, done + part.table.num_rows)
        yield part.table, at[some]
        done = some.stop


class Follower:
    """Follows a stream from where its target is. One thread runs it; `metrics` may be read from any.

    What is in the target is in exactly once: a snapshot holds the positions up to which it holds the stream, and after a kill
    the follower reads on from there. A message that cannot be applied is rejected (`stream.reject`, a dead-letter topic),
    counted and passed; the others of its batch are applied.

    Args:
      max_batch: messages that are applied together.
      changed: called after each batch that was applied, such as to hand the new index to an engine.
      store: where each saved snapshot of a writer is published, if any, and the one that it starts from.
      max_rejected: messages in a row that may be rejected before the follower stops: then the stream, or the model, is not the
        one that was meant.

    Attributes:
      counters: messages polled, applied, repeated, rejected; batches; snapshots published; failed saves, publications, commits.

    Example:
      >>> from aif_jax.connectors import EventLayout, MemoryFeatures, MemoryStream, encode
      >>> stream, sink = MemoryStream(), MemoryFeatures(EventLayout())
      >>> _ = stream.send(encode({"user": [7], "item": [1], "time": [1_600_000_000]})), stream.send(b"poison")
      >>> follower = Follower(stream, SinkTarget(sink))
      >>> follower.step(), follower.counters["rejected"], sink.update({"user": [7], "item": [1], "time": [1]}, position=0)
      (2, 1, 0)
    """

    def __init__(
        self, stream: UpdateStream, target: Target, *, max_batch: int = 1000, changed: Callable[[], Any] | None = None,
        store: SnapshotStore | None = None, max_rejected: int = 1000,
    ):  # fmt: skip
        expect(max_batch >= 1, "max_batch", "at least 1", max_batch)
        expect(max_rejected >= 1, "max_rejected", "at least 1", max_rejected)
        self.stream, self.target, self.counters = stream, target, Counter()
        self._max_batch, self._changed, self._store = max_batch, changed, store
        self._max_rejected, self._rejected_in_a_row = max_rejected, 0
        self._age: dict[int, float] = {}
        self._committed: dict[int, int] | None = None  # what it starts from is published too
        self._published: Any = None
        stream.begin(target.positions)

    def run(self, stop: Callable[[], bool], *, seconds: float = 0.1) -> None:
        """Steps until `stop()`, asked at least every `seconds`; raises what `step` raises."""
        while not stop():
            self.step(seconds)

    def step(self, seconds: float = 0.0) -> int:
        """Applies what comes within `seconds`; returns the number of messages.

        Raises:
          StreamError, and what the broker's client raises: the broker is gone, or nothing fits; a new follower goes on.
          WriterConflict: another writer owns the directory.
          OSError: a message could not be rejected; it was not passed then.
        """
        messages = self.stream.poll(seconds, self._max_batch)
        self.counters["messages"] += len(messages)
        parts: defaultdict[int, list[Message]] = defaultdict(list)
        for message in messages:
            parts[message.partition].append(message)
        for partition, some in parts.items():
            self._take(partition, some)
        if messages and self._changed is not None:
            self._changed()
        try:
            self.target.tick()
        except OSError as error:
            self._not_saved(error)
        self.flush()
        return len(messages)

    def metrics(self) -> dict[str, Any]:
        """Counters; gauges of lag (messages not polled yet), age and positions, with names for `prometheus_text`.

        Age is that of the oldest message of the last batch, from its write to its application, in seconds.
        """
        gauges: dict[str, float] = {"stream_lag": sum(self.stream.lag().values())}
        gauges["stream_age_seconds"] = max(dict(self._age).values(), default=0.0)
        gauges |= {f"stream_position_{partition}": at for partition, at in self.target.positions.items()}
        return {"counters": {f"stream_{name}": count for name, count in dict(self.counters).items()}, "gauges": gauges}

    def _take(self, partition: int, messages: list[Message]) -> None:
        """Applies messages of one partition together, or where that fails one by one."""
        last = self.target.positions.get(partition)
        new = [message for message in messages if last is None or message.position > last]
        self.counters["repeated"] += len(messages) - len(new)
        if not new:
            return
        entries = []
        for message in new:
            with self._rejecting(message):
                entries.append(StreamEntry(message, decode(message)))
        try:
            if entries:
                self._apply(entries, entries[-1].message.position, partition)
        except POISON as error:
            logger.info("partition %d: a batch of %d messages is applied one by one: %s", partition, len(entries), error)
            for entry in entries:
                with self._rejecting(entry.message):
                    self._apply([entry], entry.message.position, partition)
        self._apply([], new[-1].position, partition)  # past poison that came last
        self.counters["batches"] += 1
        if written := [message.time for message in new if message.time is not None]:
            self._age[partition] = max(0.0, time.time() - min(written))

    def _apply(self, entries: list[StreamEntry], position: int, partition: int) -> None:
        before = self.target.positions.get(partition)
        if before is not None and before >= position and not entries:
            return
        try:
            self.target.apply(entries, position=position, partition=partition)
        except OSError as error:
            if self.target.positions.get(partition, position - 1) < position:
                raise  # not applied
            self._not_saved(error)
        self.counters["applied"] += len(entries)
        self._rejected_in_a_row = 0 if entries else self._rejected_in_a_row

    @contextlib.contextmanager
    def _rejecting(self, message: Message):
        """Rejects the message where the block raises what no retry would mend."""
        try:
            yield
        except POISON as error:
            reason = f"{type(error).__name__}: {error}"
            self.stream.reject(message, reason)
            self.counters["rejected"] += 1
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row >= self._max_rejected:
                text = f"expected messages of this model, got {self._rejected_in_a_row} in a row that do not fit; {reason}"
                raise StreamError(f"{text}. Check the stream and the columns; max_rejected sets the limit") from error
            logger.warning("message %d of partition %d rejected: %s", message.position, message.partition, reason)

    def _not_saved(self, error: OSError) -> None:
        """Counts a save that failed: the update is in all the same, and a later save tries again."""
        self.counters["failed_saves"] += 1
        logger.warning("a snapshot was not saved, tried again later: %s", error)

    def flush(self) -> None:
        """Publishes and commits what is saved, such as by the end of a writer."""
        saved = dict(self.target.saved)
        if saved == self._committed:
            return
        writer = getattr(self.target, "writer", None)
        if self._store is not None and isinstance(writer, IndexWriter) and saved != self._published:
            try:
                self._store.publish(snapshots(writer.directory)[-1])
                self.counters["published"] += 1
                self._published = saved
            except (OSError, ValueError) as error:
                self.counters["failed_publications"] += 1
                logger.warning("a snapshot was not published, tried again with the next: %s", error)
        self.stream.commit(saved)
        self._committed = saved
