"""Update streams: ordered messages by partition and position, whatever broker keeps them; the protocol, and one in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from aif_jax.checks import expect
from aif_jax.store.snapshots import positions_by_partition


class StreamError(RuntimeError):
    """A stream that cannot be followed: messages that were not applied yet are gone, or the broker refuses."""


class Message(NamedTuple):
    """One message."""

    partition: int
    position: int  # rises within a partition, with gaps
    key: bytes | None
    value: bytes | None  # what `encode` made; None deletes the item that the key names
    time: float | None = None  # when it was written, seconds since 1970
    by_broker: bool = False  # whether `time` is of the broker's clock, and not of the producer's


class UpdateStream(Protocol):
    """A stream that one thread follows."""

    def begin(self, positions: Mapping[int, int]) -> None:
        """Starts after these positions, by partition; partitions without one from their first message.

        Raises StreamError where messages after a position are gone, TypeError and ValueError for what is no position.
        """
        ...

    def poll(self, seconds: float, max_messages: int) -> list[Message]:
        """At most `max_messages` messages, in the order of each partition; none where nothing comes within `seconds`."""
        ...

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tells the broker what is applied and saved, for those who watch; a follower starts from its own positions."""
        ...

    def reject(self, message: Message, reason: str) -> None:
        """Puts a message that cannot be applied where a person finds it; raises where that fails."""
        ...

    def lag(self) -> dict[int, int]:
        """Messages that were not polled yet, by partition."""
        ...

    def close(self) -> None:
        """Leaves the broker."""
        ...


class MemoryStream:
    """A stream within a process, for tests and where there is no broker; one thread writes, one follows.

    Args:
      partitions: of the stream.
      clock: seconds since 1970, when a message is written.

    Example:
      >>> stream = MemoryStream()
      >>> stream.send(b"first"), stream.send(b"second")
      (0, 1)
      >>> stream.begin({0: 0})
      >>> [message.value for message in stream.poll(0, 10)]
      [b'second']
    """

    def __init__(self, *, partitions: int = 1, clock: Callable[[], float] = time.time):
        expect(partitions >= 1, "partitions", "at least 1", partitions)
        self.rejected: list[tuple[Message, str]] = []
        self.committed: dict[int, int] = {}
        self._clock = clock
        self._messages: list[list[Message]] = [[] for _ in range(partitions)]
        self._next = [0] * partitions  # places in the lists

    def send(self, value: bytes | None, *, key: bytes | None = None, partition: int = 0, gap: int = 0) -> int:
        """Adds a message, `gap` positions further than the next one; returns its position."""
        messages = self._messages[partition]
        position = (messages[-1].position + 1 if messages else 0) + gap
        messages.append(Message(partition, position, key, value, self._clock(), by_broker=True))
        return position

    def send_many(self, values: Sequence[bytes], *, partition: int = 0) -> list[int]:
        """Adds messages; returns their positions."""
        return [self.send(value, partition=partition) for value in values]

    def begin(self, positions: Mapping[int, int]) -> None:
        """As `UpdateStream.begin`."""
        positions = positions_by_partition(positions)
        for partition, messages in enumerate(self._messages):
            last = positions.get(partition, -1)
            self._next[partition] = sum(message.position <= last for message in messages)

    def poll(self, seconds: float, max_messages: int) -> list[Message]:
        """As `UpdateStream.poll`."""
        until = time.monotonic() + seconds
        while True:
            found: list[Message] = []
            for partition, messages in enumerate(self._messages):
                start = self._next[partition]
                part = messages[start : start + max_messages - len(found)]
                self._next[partition] += len(part)
                found += part
            if found or time.monotonic() >= until:
                return found
            time.sleep(0.002)

    def commit(self, positions: Mapping[int, int]) -> None:
        """As `UpdateStream.commit`."""
        self.committed |= positions

    def reject(self, message: Message, reason: str) -> None:
        """Keeps the message in `rejected`."""
        self.rejected.append((message, reason))

    def lag(self) -> dict[int, int]:
        """As `UpdateStream.lag`."""
        return {partition: len(messages) - self._next[partition] for partition, messages in enumerate(self._messages)}

    def close(self) -> None:
        """Nothing to leave."""
