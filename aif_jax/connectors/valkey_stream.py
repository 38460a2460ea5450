"""`ValkeyStream`: Streams of Valkey or Redis as an update stream; each key is a partition.

An entry's id MILLISECONDS-NUMBER becomes the position MILLISECONDS * 2^21 + NUMBER, which rises as the ids do and fits 64 bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from aif_jax.checks import expect
from aif_jax.connectors.streams import Message, StreamError
from aif_jax.store.snapshots import positions_by_partition

BITS = 21  # of the number within a millisecond
COUNTED = 10_000  # entries of a partition that `lag` counts at most
COUNT = "return #redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])"
"""Counted by the server, so that the entries do not travel."""


class ValkeyStream:
    """Streams, one for each partition; `send` writes, the rest follows.

    Args:
      client: `redis.Redis` or `valkey.Valkey`, not decoding responses; its `socket_timeout` is above the seconds of a poll.
      keys: of the streams, in the order of the partitions, always the same.
      most_kept: entries that each stream keeps, about, when `send` writes; None keeps all.

    Raises:
      ValueError: no key, or one that comes twice.
    """

    def __init__(self, client: Any, keys: Sequence[str], *, most_kept: int | None = None):
        expect(keys and len(set(keys)) == len(keys), "keys", "at least one key, each once", keys)
        expect(most_kept is None or most_kept >= 1, "most_kept", "None or at least 1", most_kept)
        self._client, self._keys, self._most_kept = client, list(keys), most_kept
        self._last = ["0-0"] * len(keys)  # id of the last entry that was read
        self._count = client.register_script(COUNT)

    def __repr__(self) -> str:
        return f"ValkeyStream({self._keys})"

    def send(self, value: bytes | None, *, key: bytes | None = None, partition: int = 0) -> int:
        """Writes a message; returns its position. No value deletes the item that the key names."""
        fields: dict[Any, Any] = {} if value is None else {b"value": value}
        fields |= {b"key": b"" if key is None else key}
        return position_of(self._client.xadd(self._keys[partition], fields, maxlen=self._most_kept, approximate=True))

    def send_many(self, values: Sequence[bytes], *, partition: int = 0) -> list[int]:
        """Writes messages in one round trip; returns their positions."""
        pipe = self._client.pipeline(transaction=False)
        for value in values:
            fields: dict[Any, Any] = {b"value": value, b"key": b""}
            pipe.xadd(self._keys[partition], fields, maxlen=self._most_kept, approximate=True)
        return list(map(position_of, pipe.execute()))

    def begin(self, positions: Mapping[int, int]) -> None:
        """As `UpdateStream.begin`."""
        positions = positions_by_partition(positions)
        unknown = [partition for partition in positions if not 0 <= partition < len(self._keys)]
        expect(not unknown, "positions", f"partitions of {len(self._keys)} keys", unknown)
        for partition, key in enumerate(self._keys):
            if partition in positions:
                self._last[partition] = id_of(positions[partition])
                if self._trimmed(key, positions[partition]):
                    raise StreamError(f"stream {key!r}: messages after {self._last[partition]} are gone; rebuild the snapshot")
            else:
                self._last[partition] = "0-0"

    def poll(self, seconds: float, max_messages: int) -> list[Message]:
        """As `UpdateStream.poll`."""
        places: Any = dict(zip(self._keys, self._last, strict=True))
        block = max(1, round(seconds * 1000)) if seconds > 0 else None
        found = self._client.xread(places, count=max(1, max_messages // len(self._keys)), block=block)
        messages = []
        for key, entries in found.items() if isinstance(found, dict) else found or ():
            partition = self._keys.index(key.decode() if isinstance(key, bytes) else key)
            entries = entries[0] if isinstance(found, dict) and entries and isinstance(entries[0], list) else entries
            for entry, fields in entries:
                position = position_of(entry)
                written = (position >> BITS) / 1000
                messages.append(Message(partition, position, fields.get(b"key") or None, fields.get(b"value"), written, True))
                self._last[partition] = entry.decode()
        return messages

    def commit(self, positions: Mapping[int, int]) -> None:
        """Nothing to tell: the positions are with the follower."""

    def reject(self, message: Message, reason: str) -> None:
        """Writes the message to the stream KEY.rejected, with its place and the reason."""
        fields: dict[Any, Any] = {b"key": message.key or b"", b"reason": reason, b"id": id_of(message.position)}
        fields |= {} if message.value is None else {b"value": message.value}
        self._client.xadd(f"{self._keys[message.partition]}.rejected", fields)

    def lag(self) -> dict[int, int]:
        """As `UpdateStream.lag`, at most 10,000 for each partition."""
        pipe = self._client.pipeline(transaction=False)
        for key, last in zip(self._keys, self._last, strict=True):
            self._count(keys=[key], args=[f"({last}", COUNTED], client=pipe)
        return dict(enumerate(pipe.execute()))

    def close(self) -> None:
        """Leaves the client open: it is the caller's."""

    def _trimmed(self, key: str, position: int) -> bool:
        """Whether an entry after a position may be gone: the entry of the position itself is, and so are others."""
        if not self._client.exists(key):
            return True
        info = self._client.xinfo_stream(key)
        if position_of(info["last-generated-id"]) < position:
            return True  # made anew
        removed = info["entries-added"] > info["length"]
        first = info["first-entry"]
        before = first is not None and position_of(first[0]) <= position
        return removed and not before and position_of(info["last-generated-id"]) > position


def position_of(entry: bytes | str) -> int:
    """The position of an entry's id. ValueError for one with too many in its millisecond."""
    milliseconds, number = map(int, (entry.decode() if isinstance(entry, bytes) else entry).split("-"))
    expect(number < 1 << BITS, "stream", f"fewer than {1 << BITS} entries in a millisecond", f"{entry!r}")
    return (milliseconds << BITS) + number


def id_of(position: int) -> str:
    """The id of the entry at a position."""
    return f"{position >> BITS}-{position & (1 << BITS) - 1}"


def now() -> int:
    """The position that an entry written now would have at least: to start a stream behind what a build has read."""
    return time.time_ns() // 10**6 << BITS
