"""Features in Valkey or Redis: one read for attributes and events, one atomic append for new events, trimmed to a length.

PREFIX:{i:7}:a    magic, length, CRC-32, JSON of the attributes
PREFIX:{i:7}:e    a header of 64 bytes (magic, layout, events so far, position, partition), then packed events
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.packing import EventLayout
from aif_jax.connectors.records import Record, by_user, check_partition
from aif_jax.store.snapshots import integer
from aif_jax.user_table.rows import NONE, UserId

ATTRIBUTES, EVENTS = b"AUA1", b"AUE1"
JSON_HEAD = struct.Struct("<4sII")
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


class ValkeyFeatures:
    """The read path: a `FeatureSource` over values that `ValkeyFeatureWriter` wrote; one round trip for a user.

    Args:
      client: `redis.asyncio.Redis` or `valkey.asyncio.Valkey`, not decoding responses, with the timeouts that suit you (hiredis
        makes it faster). Its errors come through.
      layout: of the events, as the writer's.
      length: events that are handed over, the last that were appended.
      prefix: of every key, as the writer's.
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
      layout: of the events.
      user: column of the user's id.
      length: events kept of a user, the last that came; up to an eighth more stay until they are trimmed.
      prefix: of every key.
      seconds: after which a user without new events is forgotten; None keeps them.

    Raises:
      ValueError: numbers out of range.
    """

    def __init__(
        self,
        client: Any,
        layout: EventLayout,
        *,
        user: str = "user",
        length: int = 4096,
        prefix: str = "aif",
        seconds: float | None = None,
    ):
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
