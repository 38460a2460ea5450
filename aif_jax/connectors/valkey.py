"""Valkey or Redis as a feature store and an update stream.

Features: one read for attributes and events, one atomic append for new events, trimmed to a length.

PREFIX:{i:7}:a    magic, length, CRC-32, JSON of the attributes
PREFIX:{i:7}:e    a header of 64 bytes (magic, layout, events so far, position, partition), then packed events

Streams: each partition is a stream, and the position of an entry is its id, milliseconds and a number within them.

An update stream, or the client of a server, from a URL, for command lines.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from aif_jax.checks import expect, needs_extra
from aif_jax.connectors.kafka import KafkaStream
from aif_jax.connectors.records import NONE, EventLayout, FeatureSource, Record, UserId, by_user, check_partition
from aif_jax.connectors.streams import Message, StreamError, UpdateStream
from aif_jax.store.folders import redacted
from aif_jax.store.snapshots import integer, positions_by_partition

ATTRIBUTES, EVENTS = b"AUA1", b"AUE1"  # magic of values
JSON_HEAD = struct.Struct("<4sII")  # magic, length, CRC-32
HEAD = 64  # bytes: magic 4, layout 8, events so far 20, position 20, partition 11, ";"
APPEND = """
local head = redis.call('GETRANGE', KEYS[1], 0, 63)
local length, size, most = redis.call('STRLEN', KEYS[1]), tonumber(ARGV[6]), tonumber(ARGV[7])
local count, position, partition = 0, '00000000000000000000', ARGV[3]
if head ~= '' then
  if #head < 64 or string.sub(head, 1, 12) ~= ARGV[1] or (length - 64) % size ~= 0 then return {-3, head} end
  count, position, partition = tonumber(string.sub(head, 13, 32)), string.sub(head, 33, 52), string.sub(head, 53, 63)
end
if ARGV[2] ~= '' then
  if position ~= '00000000000000000000' then
    if partition ~= ARGV[3] then return {-2, partition} end
    if ARGV[2] <= position then return {-1, position} end
  end
  position, partition = ARGV[2], ARGV[3]
end
head = ARGV[1] .. string.format('%020.0f', count + tonumber(ARGV[5])) .. position .. partition .. ';'
if length == 0 or length - 64 + #ARGV[4] > (most + math.floor(most / 8)) * size then
  local all = (length > 64 and redis.call('GETRANGE', KEYS[1], 64, -1) or '') .. ARGV[4]
  redis.call('SET', KEYS[1], head .. string.sub(all, -most * size))
else
  redis.call('SETRANGE', KEYS[1], 0, head)
  redis.call('APPEND', KEYS[1], ARGV[4])
end
if ARGV[8] ~= '0' then redis.call('PEXPIRE', KEYS[1], ARGV[8]) end
return {count + tonumber(ARGV[5]), position}
"""
"""Appends events of one user unless the position was passed; -1 passed, -2 another partition, -3 no value of this layout.

Positions are compared as text of 20 digits: numbers of Lua have 53 bits.
"""


class ValkeyFeatures(FeatureSource):
    """The read path: a `FeatureSource` over values that `ValkeyFeatureWriter` wrote; one round trip for a user.

    Args:
      client: `redis.asyncio.Redis` or `valkey.asyncio.Valkey`, not decoding responses, with the timeouts that suit you (hiredis
        makes it faster). Its errors come through.
      length: events that are handed over, the last that were appended.
    """

    def __init__(self, client: Any, layout: EventLayout, *, length: int = 4096, prefix: str = "aif"):
        expect(length >= 1, "length", "at least 1", length)
        self._client, self.layout, self.length, self._prefix = client, layout, length, prefix

    async def get(self, user: UserId) -> Record | None:
        """As `FeatureSource.get`. Raises ValueError that names the key for a value that is torn, altered or foreign."""
        keys = keys_of(self._prefix, user)
        attributes, events = await self._client.mget(keys)
        if attributes is None and events is None:
            return None
        known = None if attributes is None else _attributes(attributes, keys[0])
        if events is None:
            return Record(known)
        head = head_of(events, self.layout, keys[1])
        packed = self.layout.checked(memoryview(events)[HEAD:], keys[1])  # type: ignore[arg-type]
        return Record(known, self.layout.columns_of(packed[-self.length :]), head[0])


class ValkeyFeatureWriter:
    """The write path: an `EventSink` over the same values; an append is one atomic step of the server for each user.

    Args:
      client: `redis.Redis` or `valkey.Valkey`, not decoding responses.
      length: events kept of a user, the last that came; up to an eighth more stay until they are trimmed.
      seconds: after which a user without new events is forgotten; None keeps them.

    Raises:
      ValueError: numbers out of range.
    """

    def __init__(
        self, client: Any, layout: EventLayout,
        *, user: str = "user", length: int = 4096, prefix: str = "aif", seconds: float | None = None,
    ):  # fmt: skip
        expect(length >= 1, "length", "at least 1", length)
        expect(seconds is None or seconds > 0, "seconds", "None or more than 0", seconds)
        self._client, self.layout, self.length, self._prefix, self._user = client, layout, length, prefix, user
        self._lives = 0 if seconds is None else max(1, round(seconds * 1000))
        self._append = client.register_script(APPEND)

    def put_user(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keeps raw values of a user by column of the users file. TypeError for values that JSON cannot hold."""
        body = json.dumps(dict(attributes), allow_nan=False).encode()
        value = JSON_HEAD.pack(ATTRIBUTES, len(body), zlib.crc32(body)) + body
        self._client.set(keys_of(self._prefix, user)[0], value, px=self._lives or None)

    def update(self, events: Any, *, position: int | np.ndarray | None = None, partition: int = 0) -> int:
        """As `EventSink.update`, one round trip for all users and positions.

        Raises:
          ValueError: events that do not fit the layout, a user whose events came by another partition, a value at a user's key
            that is not of this layout. Other users' events are in then; the same call does not double them with a position.
        """
        head, where = EVENTS + self.layout.digest.encode(), f"{integer(partition, 'partition'):011d}"
        parts = list(by_user(events, self._user, self.layout, position))
        pipe = self._client.pipeline(transaction=False)
        for user, at, packed in parts:
            place, data = "" if at == NONE else f"{at - NONE:020d}", packed[-self.length :].tobytes()
            values = [head, place, where, data, len(packed), self.layout.nbytes, self.length, self._lives]
            self._append(keys=keys_of(self._prefix, user)[1:], args=values, client=pipe)
        answers: list[Any] = pipe.execute() if parts else []
        new = 0
        for (user, at, packed), (code, detail) in zip(parts, answers, strict=True):
            if code == -2:
                check_partition(user, (0, int(detail)), at, partition)
            if code == -3:
                key = keys_of(self._prefix, user)[1]
                head_of(detail, self.layout, key)
                raise ValueError(f"{key}: expected whole events of {self.layout.nbytes} bytes, got a part of one")
            new += len(packed) if code >= 0 else 0
        return new


def keys_of(prefix: str, user: UserId) -> list[str]:
    """Keys of attributes and events, on one node of a cluster; the integer 7 and the string "7" are two users."""
    name = f"{prefix}:{{{'s' if isinstance(user, str) else 'i'}:{user}}}"
    return [f"{name}:a", f"{name}:e"]


def head_of(value: bytes, layout: EventLayout, key: str) -> tuple[int, int]:
    """Events so far, and the position of the last. Raises ValueError for a value that is torn, or not of this layout."""
    head = bytes(value[:HEAD])
    digits = head[12:52]
    good = len(head) == HEAD and head[:4] == EVENTS and digits.isdigit() and head[63:] == b";"
    if not good or head[4:12] != layout.digest.encode():
        expected = f"events of the layout {layout.digest}"
        raise ValueError(f"{key}: expected {expected}, got {len(value)} bytes that begin with {head[:12]!r}")
    return int(digits[:20]), int(digits[20:]) + NONE


def _attributes(value: bytes, key: str) -> Mapping[str, Any]:
    try:
        magic, length, checksum = JSON_HEAD.unpack_from(value)
        body = value[JSON_HEAD.size :]
        expect((magic, length, checksum) == (ATTRIBUTES, len(body), zlib.crc32(body)), key, "a whole record", value[:8])
        return json.loads(body)
    except (struct.error, ValueError) as error:
        raise ValueError(f"{key}: expected attributes with their checksum, got {len(value)} bytes: {value[:8]!r}...") from error


BITS = 21  # of the number within a millisecond
COUNTED = 10_000  # entries of a partition that `lag` counts at most
COUNT = "return #redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])"
"""Counted by the server, so that the entries do not travel."""


class ValkeyStream(UpdateStream):
    """Streams, one for each partition; `send` writes, the rest follows.

    Args:
      client: `redis.Redis` or `valkey.Valkey`, not decoding responses; its `socket_timeout` is above the seconds of a poll.
      keys: keys of the streams, in the order of the partitions, always the same.

    Raises:
      ValueError: no key, or one that comes twice.
    """

    def __init__(self, client: Any, keys: Sequence[str]):
        expect(keys and len(set(keys)) == len(keys), "keys", "at least one key, each once", keys)
        self._client, self._keys = client, list(keys)
        self._last = ["0-0"] * len(keys)  # id of the last entry that was read
        self._count = client.register_script(COUNT)

    def __repr__(self) -> str:
        return f"ValkeyStream({self._keys})"

    def send(self, value: bytes | None, *, key: bytes | None = None, partition: int = 0) -> int:
        """Writes a message; returns its position. No value deletes the item that the key names."""
        fields: dict[Any, Any] = {} if value is None else {b"value": value}
        fields |= {b"key": b"" if key is None else key}
        return position_of(self._client.xadd(self._keys[partition], fields))

    def send_many(self, values: Sequence[bytes], *, partition: int = 0) -> list[int]:
        """Writes messages in one round trip; returns their positions."""
        pipe = self._client.pipeline(transaction=False)
        for value in values:
            pipe.xadd(self._keys[partition], {b"value": value, b"key": b""})
        return list(map(position_of, pipe.execute()))

    def begin(self, positions: Mapping[int, int]) -> None:
        positions = positions_by_partition(positions)
        unknown = [partition for partition in positions if not 0 <= partition < len(self._keys)]
        expect(not unknown, "positions", f"partitions of {len(self._keys)} keys", unknown)
        for partition, key in enumerate(self._keys):
            position = positions.get(partition)
            self._last[partition] = id_of(position or 0)
            if position is not None and self._trimmed(key, position):
                raise StreamError(f"stream {key!r}: messages after {self._last[partition]} are gone; rebuild the snapshot")

    def poll(self, seconds: float, max_messages: int) -> list[Message]:
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
                messages.append(Message(partition, position, fields.get(b"key") or None, fields.get(b"value"), written))
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
            return True  # made again
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


FORMS = "kafka://HOST:PORT/TOPIC or redis://HOST:PORT/KEY[,KEY...]"
SCHEMES = ("redis", "rediss", "valkey")
SOCKET_SECONDS = 30.0


def open_client(url: str, options: Mapping[str, Any] | None = None) -> Any:
    """A `redis.Redis` of the server at a URL, `redis://[USER:PASSWORD@]HOST:PORT[/DATABASE]` (also `rediss:`, `valkey:`).

    Raises ValueError for a URL of another form, without its password; ImportError without the client.
    """
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if parts.scheme not in SCHEMES or not parts.hostname or not (database or "0").isdecimal():
        raise ValueError(f"server: expected redis://HOST:PORT[/DATABASE], got {redacted(url)!r}")
    with needs_extra("Valkey and Redis need the client redis", "remote"):
        import redis
    scheme = "rediss" if parts.scheme == "rediss" else "redis"
    settings: dict[str, Any] = {"socket_timeout": SOCKET_SECONDS, **(options or {})}
    return redis.Redis.from_url(f"{scheme}://{parts.netloc}/{database}", **settings)


def open_stream(url: str, options: Mapping[str, Any] | None = None, *, group: str | None = None) -> UpdateStream:
    """The stream at a URL.

    Args:
      url: `kafka://HOST:PORT[,HOST:PORT...]/TOPIC`, or `redis://[USER:PASSWORD@]HOST:PORT/KEY[,KEY...]` (also `rediss:`),
        whose keys are the partitions in their order.
      options: keyword arguments of the client: settings of Kafka by their names, or arguments of `redis.Redis`.
      group: group of consumers that share the partitions, of Kafka.

    Raises:
      ValueError: a URL of another form, a group of another stream than Kafka's; a password in the URL is not shown.
      ImportError: the client is missing.
    """
    parts = urlsplit(url)
    names = parts.path.strip("/")
    if not names or not parts.hostname or "/" in names:
        raise ValueError(f"stream: expected {FORMS}, got {redacted(url)!r}")
    if parts.scheme == "kafka":
        return KafkaStream(parts.netloc, names, group=group, options=options)
    expect(group is None, "group", "None: only topics of Kafka have groups", group)
    if parts.scheme in SCHEMES:
        return ValkeyStream(open_client(f"{parts.scheme}://{parts.netloc}", options), names.split(","))
    raise ValueError(f"stream: expected {FORMS}, got {redacted(url)!r}")
