"""`KafkaStream`: a topic of a broker of the Kafka protocol as an update stream, by confluent-kafka.

An index holds every partition, so its follower reads all of them from the positions in its snapshot.
"""

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aif_jax.checks import expect, needs_extra
from aif_jax.connectors.streams import Message, StreamError
from aif_jax.index.item_index import positions_by_partition
from aif_jax.store.folders import redacted

SECONDS = 30.0  # for what the broker is asked at the start
REFRESH = 30.0  # seconds between two looks for new partitions


class KafkaStream:
    """A topic; only committed messages of transactions are read. Rejected ones go to the topic of its name with ".rejected".

    One thread follows it. A stream of another broker is a class with the same methods, and `lag`: messages that the last poll
    left, by partition, as far as the broker told; gaps of offsets count too.

    Args:
      url: `kafka://HOST:PORT[,HOST:PORT...]/TOPIC`, a topic with the item's id as key, so that the messages of one come by one
        partition.
      options: further settings of the client by their Kafka names, such as `{"security.protocol": "SASL_SSL", ...}`; they
        appear in no message.

    Raises ValueError for a URL of another form, whose password is not shown, ImportError without confluent-kafka.
    """

    def __init__(self, url: str, *, options: Mapping[str, Any] | None = None):
        parts = urlsplit(url)
        topic = parts.path.strip("/")
        if parts.scheme != "kafka" or not topic or not parts.hostname or "/" in topic:
            raise ValueError(f"stream: expected kafka://HOST:PORT/TOPIC, got {redacted(url)!r}")
        with needs_extra("streams of Kafka need confluent-kafka", "kafka"):
            import confluent_kafka
        self._client, self._topic, self._rejected = confluent_kafka, topic, f"{topic}.rejected"
        self._options = {"bootstrap.servers": parts.netloc, **(options or {})}
        settings = {
            "group.id": "aif-jax",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # messages that are gone must not be passed in silence
            "isolation.level": "read_committed",
        }
        self._consumer = confluent_kafka.Consumer(self._options | settings)
        self._producer: Any = None
        self._next: dict[int, int] = {}  # offset that is read next, by partition
        self.lag: dict[int, int] = {}  # of the last poll: the client hangs where another thread asks it during one
        self._refreshed = 0.0

    def begin(self, positions: Mapping[int, int]) -> None:
        """Start after these positions, by partition; partitions without one from their first message.

        Raises StreamError where messages after a position are gone, or the topic; TypeError, ValueError for no positions.
        """
        positions, partitions = positions_by_partition(positions), self._partitions()
        gone = [partition for partition in positions if partition not in partitions]
        wanted, got = f"partitions {sorted(positions)}", f"no {gone}; rebuild the snapshot"
        expect(not gone, f"topic {self._topic!r}", wanted, got, error=StreamError)
        for partition, position in positions.items():
            first, end = self._consumer.get_watermark_offsets(self._place(partition), SECONDS)
            there, got = first <= position + 1 <= end, f"{first} to {end - 1}; rebuild the snapshot"
            place = f"partition {partition} of topic {self._topic!r}"
            expect(there, place, f"messages after {position}", got, error=StreamError)
        self._next = {partition: positions.get(partition, -1) + 1 for partition in partitions}
        self._consumer.assign([self._start(partition, positions.get(partition)) for partition in partitions])
        self._refreshed = time.monotonic()

    def poll(self, seconds: float, max_messages: int) -> list[Message]:
        """Return at most `max_messages` messages, in the order of each partition; none where nothing comes within `seconds`.

        Raises StreamError if messages are gone, KafkaException for a broker that refuses.
        """
        self._refresh()
        messages = []
        for found in self._consumer.consume(max_messages, seconds):
            if (error := found.error()) is not None:
                if error.code() == self._client.KafkaError._AUTO_OFFSET_RESET:
                    place = f"partition {found.partition()} of topic {self._topic!r}"
                    raise StreamError(f"{place}: the messages that come next are gone: {error.str()}; rebuild the snapshot")
                if error.retriable() or error.code() == self._client.KafkaError._ALL_BROKERS_DOWN:
                    continue  # the client tries again by itself
                raise self._client.KafkaException(error)
            kind, milliseconds = found.timestamp()
            written = milliseconds / 1000 if kind != self._client.TIMESTAMP_NOT_AVAILABLE else None
            partition, offset = found.partition(), found.offset()
            assert partition is not None and offset is not None  # of a message without an error
            self._next[partition] = offset + 1
            messages.append(Message(partition, offset, found.key(), found.value(), written))
        ends = {p: self._consumer.get_watermark_offsets(self._place(p), cached=True)[1] for p in self._next}
        self.lag = {p: max(0, ends[p] - max(place, 0)) if ends[p] >= 0 else 0 for p, place in self._next.items()}
        return messages

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the broker what is applied and saved, as the group "aif-jax", for those who watch; nobody reads it back."""
        if positions:
            places = [self._place(partition, position + 1) for partition, position in positions.items()]
            self._consumer.commit(offsets=places, asynchronous=True)

    def reject(self, message: Message, reason: str) -> None:
        """Write the message to the topic of rejected ones, place and reason as headers. Raises OSError where it cannot."""
        if self._producer is None:
            self._producer = self._client.Producer(self._options | {"enable.idempotence": True, "delivery.timeout.ms": 20_000})
        failed: list[Any] = []
        note = {"reason": reason.encode(), "partition": b"%d" % message.partition, "offset": b"%d" % message.position}
        self._producer.produce(
            self._rejected, message.value, message.key, headers=note, on_delivery=lambda error, _: failed.append(error)
        )
        if self._producer.flush(SECONDS) or any(failed):
            raise OSError(f"topic {self._rejected!r}: a rejected message was not written: {failed or 'no answer'}")

    def close(self) -> None:
        """Leave the broker."""
        self._consumer.close()

    def _partitions(self) -> list[int]:
        listed = self._consumer.list_topics(self._topic, SECONDS).topics.get(self._topic)
        if listed is None or listed.error is not None or not listed.partitions:
            reason = "none" if listed is None or listed.error is None else listed.error.str()
            raise StreamError(f"topic {self._topic!r}: expected a topic with partitions, got {reason}; create one")
        return sorted(listed.partitions)

    def _refresh(self) -> None:
        """Read partitions that were added."""
        if time.monotonic() - self._refreshed < REFRESH:
            return
        self._refreshed = time.monotonic()
        added = [partition for partition in self._partitions() if partition not in self._next]
        if added:
            self._next |= dict.fromkeys(added, 0)
            self._consumer.incremental_assign([self._start(partition, None) for partition in added])

    def _start(self, partition: int, position: int | None) -> Any:
        return self._place(partition, self._client.OFFSET_BEGINNING if position is None else position + 1)

    def _place(self, partition: int, *offset: int) -> Any:
        return self._client.TopicPartition(self._topic, partition, *offset)
