"""Rows in Valkey or Redis: shared by writers and by every replica that serves, kept there beyond the end of any process."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.user_table.rows import NONE, Stored, UserId

HEADER = struct.Struct("<4sIqiI")  # magic and format, words, position, partition, CRC-32 of all the rest
MAGIC = b"AUT1"
PUT = """
local before = redis.call('GETRANGE', KEYS[1], 8, 15)
if before == '' then before = ARGV[1] end
if before ~= ARGV[2] then return 0 end
local time, noted = redis.call('TIME'), redis.call('HGET', KEYS[2], ARGV[5])
local now, before = time[1] .. '.' .. string.format('%06d', time[2]), noted and string.match(noted, ' (%S+)$')
if before and tonumber(before) > tonumber(now) then now = before end
redis.call('HSET', KEYS[2], ARGV[5], ARGV[6] .. ' ' .. now)
if ARGV[4] == '0' then redis.call('SET', KEYS[1], ARGV[3]) return 1 end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""
"""Sets a row, and how far its partition is, if its position is the expected one; a missing row has the position of none.

Times are the server's, one clock for all writers, and never fall."""


class Progress(NamedTuple):
    """How far the rows of a partition are."""

    position: int  # of the last event of what was put last, `NONE` where events came without positions
    seconds: float  # when a row was last written, since 1970 by the server's clock; it never falls


class RemoteRows:
    """Rows of one model version as values of a Valkey or Redis server; one round trip for any number of users.

    Args:
      client: `redis.Redis` or `valkey.Valkey`, not decoding responses, with the timeouts and retries that suit you. Its
        errors come through.
      version: of the table: rows of two versions have different keys, so a new version is built next to the old one.
      width: words of a row, `UserTable.row_bytes / 4`.
      prefix: of every key.
      seconds: after which a row that is not written again is forgotten, so that old versions go away; None keeps it.

    Raises:
      ValueError: a value at a row's key that is torn, altered, or no row of this width.
    """

    def __init__(self, client: Any, *, version: str, width: int, prefix: str = "aif", seconds: float | None = None):
        expect(width >= 1, "width", "at least 1", width)
        expect(seconds is None or seconds > 0, "seconds", "None or more than 0", seconds)
        self._client, self._width = client, width
        self._prefix = f"{prefix}:{version[:32]}:"
        self._progress = f"{self._prefix}progress"
        self._lives = 0 if seconds is None else max(1, round(seconds * 1000))
        self._put = client.register_script(PUT)

    def key(self, user: UserId) -> str:
        """Where a user's row is; the integer 7 and the string "7" are two users."""
        return f"{self._prefix}{'s' if isinstance(user, str) else 'i'}:{user}"

    def get(self, users: Sequence[UserId]) -> Stored:
        """As `Rows.get`."""
        found = Stored(
            np.zeros((len(users), self._width), np.uint32), np.full(len(users), NONE), np.zeros(len(users), np.int32)
        )
        keys = [self.key(user) for user in users]
        for place, value in enumerate(self._client.mget(keys) if keys else ()):
            if value is not None:
                found.words[place], found.position[place], found.partition[place] = self._row(value, keys[place])
        return found

    def put(self, users: Sequence[UserId], rows: Stored, *, expected: np.ndarray) -> np.ndarray:
        """As `Rows.put`; each row is compared and set by the server."""
        pipe, none = self._client.pipeline(transaction=False), struct.pack("<q", NONE)
        furthest: dict[int, int] = {}  # of the rows so far: a writer that dies here has noted none that it had not sent
        for place, user in enumerate(users):
            words, position, partition = rows.words[place], int(rows.position[place]), int(rows.partition[place])
            before = struct.pack("<q", int(expected[place]))
            value = self._value(words, position, partition)
            furthest[partition] = max(furthest.get(partition, NONE), position)
            arguments = [none, before, value, self._lives, partition, furthest[partition]]
            self._put(keys=[self.key(user), self._progress], args=arguments, client=pipe)
        return np.array(pipe.execute(), bool) if len(users) else np.zeros(0, bool)

    def progress(self) -> dict[int, Progress]:
        """How far each partition is, for all writers together; {} before the first row."""
        found = {int(name): value.split() for name, value in self._client.hgetall(self._progress).items()}
        return {partition: Progress(int(position), float(seconds)) for partition, (position, seconds) in sorted(found.items())}

    def _value(self, words: np.ndarray, position: int, partition: int) -> bytes:
        body = words.astype("<u4").tobytes()
        head = HEADER.pack(MAGIC, len(words), position, partition, 0)
        return HEADER.pack(MAGIC, len(words), position, partition, zlib.crc32(body, zlib.crc32(head))) + body

    def _row(self, value: bytes, key: str) -> tuple[np.ndarray, int, int]:
        wanted = HEADER.size + 4 * self._width
        if len(value) != wanted or value[:4] != MAGIC:
            raise ValueError(
                f"{key}: expected a row of {wanted} bytes of this format, got {len(value)} bytes: {value[:8]!r}..."
            )
        magic, width, position, partition, checksum = HEADER.unpack_from(value)
        head, body = HEADER.pack(magic, width, position, partition, 0), value[HEADER.size :]
        if width != self._width or checksum != zlib.crc32(body, zlib.crc32(head)):
            raise ValueError(f"{key}: expected a row with the checksum {checksum}, got one that is torn or altered")
        return np.frombuffer(body, "<u4"), position, partition
