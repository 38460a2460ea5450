"""`Follower`: applies an update stream to an index, exactly once, poison messages aside."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from aif_jax.connectors.kafka import KafkaStream
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.connectors.streams import Message, StreamError, decode, joined
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.index.ids import kind_of, raw_keys
from aif_jax.index.writer import snapshots
from aif_jax.readers import encode_items

POISON = (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError)
"""Errors that mark a poison message, which is rejected and counted; others stop the follower."""
MAX_BATCH = 1000  # messages that are applied together
RETRY = 30.0  # seconds between two tries to publish a snapshot
MAX_REJECTED = 1000  # in a row; with more the stream, or the model, is not the one that was meant
logger = logging.getLogger(__name__)


class Follower:
    """Follows a stream of items from where its index is. One thread runs it; `metrics` may be read from any.

    Messages are raw items, deletions and tombstones. What is in the index is in exactly once: a snapshot holds the positions up
    to which it holds the stream, and after a kill the follower reads on from there. A message that cannot be applied is
    rejected (`stream.reject`, a dead-letter topic), counted and passed; the others of its batch are applied.

    Args:
      writer: writes the index; its model has an encoder.
      store: where each saved snapshot is published, if any, and the one that it starts from.

    Attributes:
      counters: messages polled, applied, repeated, rejected; batches; snapshots published; failed saves, publications.
    """

    def __init__(self, stream: KafkaStream, writer: IndexWriter, *, store: SnapshotStore | None = None):
        self.stream, self.writer, self.counters = stream, writer, Counter()
        self._encoder = writer.index.trained.need_encoder("Follower")
        self._store, self._rejected_in_a_row = store, 0
        self._age: dict[int, float] = {}
        self._committed: dict[int, int] | None = None  # what it starts from is published too
        self._next_flush = 0.0  # on the clock of time.monotonic
        stream.begin(writer.positions)

    def step(self, seconds: float = 0.0) -> int:
        """Apply what comes within `seconds`; returns the number of messages: if any, `writer.index` is for the engine.

        Raises:
          StreamError, and what the broker's client raises: the broker is gone, or nothing fits; a new follower goes on.
          WriterConflict: another writer owns the directory.
          OSError: a message could not be rejected; it was not passed then.
        """
        messages = self.stream.poll(seconds, MAX_BATCH)
        self.counters["messages"] += len(messages)
        for partition in dict.fromkeys(message.partition for message in messages):
            self._take(partition, [message for message in messages if message.partition == partition])
        try:
            self.writer.tick()
        except OSError as error:  # the updates are in all the same, and a later save tries again
            self.counters["failed_saves"] += 1
            logger.warning("a snapshot was not saved, tried again later: %s", error)
        if time.monotonic() >= self._next_flush:
            self.flush()
        return len(messages)

    def metrics(self) -> dict[str, Any]:
        """Return counters; gauges of lag (messages not polled yet), age and positions, with names for `prometheus_text`.

        Age is that of the oldest message of the last batch, from its write to its application, in seconds.
        """
        gauges: dict[str, float] = {"stream_lag": sum(self.stream.lag.values())}
        gauges["stream_age_seconds"] = max(dict(self._age).values(), default=0.0)
        gauges |= {f"stream_position_{partition}": at for partition, at in self.writer.positions.items()}
        return {"counters": {f"stream_{name}": count for name, count in dict(self.counters).items()}, "gauges": gauges}

    def _take(self, partition: int, messages: list[Message]) -> None:
        """Apply messages of one partition together, or where that fails one by one."""
        last = self.writer.positions.get(partition)
        new = [message for message in messages if last is None or message.position > last]
        self.counters["repeated"] += len(messages) - len(new)
        if not new:
            return
        readable = []
        for message in new:
            with self._rejecting(message):
                readable.append((message, decode(message)))
        try:
            if readable:
                self._apply([change for _, change in readable], readable[-1][0].position, partition)
        except POISON as error:
            logger.info("partition %d: a batch of %d messages is applied one by one: %s", partition, len(readable), error)
            for message, change in readable:
                with self._rejecting(message):
                    self._apply([change], message.position, partition)
        self._apply([], new[-1].position, partition)  # past poison that came last
        self.counters["batches"] += 1
        if written := [message.time for message in new if message.time is not None]:
            self._age[partition] = max(0.0, time.time() - min(written))

    def _apply(self, changes: list[Any], position: int, partition: int) -> None:
        """Apply messages of one partition in order, all or none; `position` is that of the last, or of poison without any."""
        updates, kind = [], self.writer.index.kind
        for change in joined(changes):  # all are read before one is applied
            deletes = isinstance(change, list)
            arguments = (change,) if deletes else encode_items(change, self._encoder)
            kind = kind_of(raw_keys(arguments[0], "ids", like=kind)) or kind
            updates.append((ItemIndex.delete if deletes else ItemIndex.upsert, arguments))

        def applied(index: ItemIndex) -> ItemIndex:
            for update, arguments in updates:
                index = update(index, *arguments)
            return index

        self.writer.update(applied, position=position, partition=partition)
        self.counters["applied"] += len(changes)
        self._rejected_in_a_row = 0 if changes else self._rejected_in_a_row

    @contextlib.contextmanager
    def _rejecting(self, message: Message) -> Iterator[None]:
        """Reject the message where the block raises what no retry would mend."""
        try:
            yield
        except POISON as error:
            reason = f"{type(error).__name__}: {error}"
            self.stream.reject(message, reason)
            self.counters["rejected"] += 1
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row >= MAX_REJECTED:
                text = f"expected messages of this model, got {self._rejected_in_a_row} in a row that do not fit; {reason}"
                raise StreamError(f"{text}. Check the stream and the columns") from error
            logger.warning("message %d of partition %d rejected: %s", message.position, message.partition, reason)

    def flush(self) -> bool:
        """Publish what is saved, such as by the end of the writer, and commit it; False where it failed: `step` tries again."""
        saved = dict(self.writer.saved_positions)
        if saved == self._committed:
            return True
        if self._store is not None:
            try:
                self._store.publish(snapshots(self.writer.directory)[-1])
                self.counters["published"] += 1
            except (OSError, ValueError) as error:
                self.counters["failed_publications"] += 1
                self._next_flush = time.monotonic() + RETRY
                logger.warning("a snapshot was not published, tried again in %.0f s: %s", RETRY, error)
                return False
        self.stream.commit(saved)
        self._committed = saved
        return True
