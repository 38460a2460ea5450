"""`KafkaStream`: a topic of a broker of the Kafka protocol as an update stream, by confluent-kafka.

An index holds every partition, so its follower reads all of them from the positions in its snapshot.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

from aif_jax.checks import expect, needs_extra
from aif_jax.connectors.streams import MAX_BYTES, Message, StreamError
from aif_jax.index.item_index import positions_by_partition
from aif_jax.store.folders import redacted

logger = logging.getLogger(__name__)
SECONDS = 30.0  # for what the broker is asked at the start
REFRESH = 30.0  # seconds between two looks for new partitions

OWN = {  # settings of the consumer
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",  # messages that are gone must not be passed in silence
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
}
PRODUCED = {"enable.idempotence": True, "delivery.timeout.ms": 20_000, "message.max.bytes": MAX_BYTES + (1 << 20)}
"""Settings of the producer of rejected messages, where the options have no others."""


class KafkaStream:
    """A topic; only committed messages of transactions are read. Rejected ones go to the topic of its name with ".rejected".

    One thread follows it. A stream of another broker is a class with the same methods, and `lag`: messages that the last poll
    left, by partition; gaps of offsets before them count too.

    Args:
      url: `kafka://HOST:PORT[,HOST:PORT...]/TOPIC`, a topic keyed by item id: one partition has all messages of an item.
      options: further settings of the client by their Kafka names, such as `{"security.protocol": "SASL_SSL", ...}`; they
        appear in no message.

    Raises ValueError for a URL of another form, whose password is not shown, or an option of `OWN`; ImportError.
    """

    def __init__(self, url: str, *, options: Mapping[str, Any] | None = None):
        parts = urlsplit(url)
        topic = parts.path.strip("/")
        if parts.scheme != "kafka" or not topic or not parts.hostname or {*"/?#"} & {*topic} or {*"@?#"} & {*url}:
            raise ValueError(f"stream: expected kafka://HOST:PORT/TOPIC, got {redacted(url)!r}; give other settings as options")
        with needs_extra("streams of Kafka need confluent-kafka", "kafka"):
            import confluent_kafka
        self._client, self._topic, self._rejected = confluent_kafka, topic, f"{topic}.rejected"
        self._options = {"bootstrap.servers": parts.netloc, **(options or {})}
        wrong = sorted(OWN.keys() & self._options.keys())
        expect(not wrong, "stream options", f"others than {', '.join(OWN)}, which a follower needs as they are", wrong)
        self._consumer = confluent_kafka.Consumer({"group.id": "aif-jax"} | self._options | OWN)
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
        self._next, self.lag = {}, {}
        for partition in partitions:
            first, end = self._consumer.get_watermark_offsets(self._place(partition), SECONDS)
            position = positions.get(partition, first - 1)
            there, got = first <= position + 1 <= end, f"{first} to {end - 1}; rebuild the snapshot"
            place = f"partition {partition} of topic {self._topic!r}"
            expect(there, place, f"messages after {position}", got, error=StreamError)
            self._next[partition], self.lag[partition] = position + 1, end - position - 1
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
                if error.code() == self._client.KafkaError._PARTITION_EOF:  # past what ends transactions, which is no message
                    self._next[cast(int, found.partition())] = cast(int, found.offset())
                    continue
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
        self.lag = self.lag | {p: max(0, ends[p] - place) for p, place in self._next.items() if ends[p] >= 0}
        return messages

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the broker what is applied and saved, as its group ("aif-jax"), for those who watch; nobody reads it back."""
        if positions:
            places = [self._place(partition, position + 1) for partition, position in positions.items()]
            self._consumer.commit(offsets=places, asynchronous=True)

    def reject(self, message: Message, reason: str) -> None:
        """Write the message to the topic of rejected ones, place and reason as headers. Raises OSError where it cannot.

        Of one that is too large for that topic: key and headers alone, with its `size`.
        """
        if self._producer is None:
            self._producer = self._client.Producer(PRODUCED | self._options)
        note = {"reason": reason.encode(), "partition": b"%d" % message.partition, "offset": b"%d" % message.position}
        error = self._produced(message.value, message.key, note)
        if error is not None and error.code() == self._client.KafkaError.MSG_SIZE_TOO_LARGE:
            error = self._produced(None, message.key, note | {"size": b"%d" % len(message.value or b"")})
        if error is not None:
            raise OSError(f"topic {self._rejected!r}: a rejected message was not written: {error}")

    def _produced(self, value: bytes | None, key: bytes | None, note: dict[str, bytes]) -> Any:
        """Write a rejected message; returns the client's error, or None."""
        answers: list[Any] = []
        try:
            self._producer.produce(self._rejected, value, key, headers=note, on_delivery=lambda error, _: answers.append(error))
            self._producer.flush(SECONDS)
        except self._client.KafkaException as error:
            return error.args[0]
        return answers[0] if answers else self._client.KafkaError(self._client.KafkaError._TIMED_OUT)

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
        try:
            added = [partition for partition in self._partitions() if partition not in self._next]
        except self._client.KafkaException as error:  # the broker is away: the client goes on by itself
            return logger.warning("topic %r: no look for new partitions, tried again later: %s", self._topic, error)
        if added:
            self._next |= dict.fromkeys(added, 0)
            self._consumer.incremental_assign([self._start(partition, None) for partition in added])

    def _start(self, partition: int, position: int | None) -> Any:
        return self._place(partition, self._client.OFFSET_BEGINNING if position is None else position + 1)

    def _place(self, partition: int, *offset: int) -> Any:
        return self._client.TopicPartition(self._topic, partition, *offset)
