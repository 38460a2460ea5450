"""`ValkeyStates`: user states in Valkey or Redis, the second level of the state cache that replicas share."""

from __future__ import annotations

import asyncio
import hashlib
import struct
import zlib
from collections import Counter
from typing import Any

from aif_jax.checks import expect
from aif_jax.serving.users import StateKey

HEAD = struct.Struct("<4sI16s")  # magic, CRC-32 of key and body, digest of the key
MAGIC = b"AUS1"


class ValkeyStates:
    """A `StateStore` of an engine: what one replica computed, another reads in place of fetching features and computing again.

    A server that is slow, gone or holds damaged bytes costs time and nothing else: the engine computes the state itself.

    Args:
      client: `redis.asyncio.Redis` or `valkey.asyncio.Valkey`, not decoding responses.
      seconds: that a state lives; the engine's `max_stale` bounds its use too.
      timeout: seconds for one read or write.
      most_bytes: of a state; a larger one is not kept. The server's `maxmemory` bounds all together.
      prefix: of every key.

    Attributes:
      counters: hits, misses, damaged, timeouts, failed, written, too_large.
    """

    def __init__(
        self,
        client: Any,
        *,
        seconds: float = 600.0,
        timeout: float = 0.05,
        most_bytes: int = 1 << 20,
        prefix: str = "aif-state",
    ):
        for name, value in (("seconds", seconds), ("timeout", timeout), ("most_bytes", most_bytes)):
            expect(value > 0, name, "more than 0", value)
        self.counters: Counter[str] = Counter()
        self._client, self._timeout, self._most, self._prefix = client, timeout, most_bytes, prefix
        self._lives = max(1, round(seconds * 1000))

    async def get(self, key: StateKey) -> bytes | None:
        """The bytes of a state, or None; raises nothing."""
        value = await self._tried(self._client.get(self._key(key)))
        if value is None:
            self.counters["misses"] += 1
            return None
        body = value[HEAD.size :]
        if len(value) < HEAD.size or value[: HEAD.size] != self._head(key, body):
            self.counters["damaged"] += 1
            return None
        self.counters["hits"] += 1
        return body

    async def put(self, key: StateKey, state: bytes) -> None:
        """Keeps the bytes of a state for a while; raises nothing."""
        if len(state) > self._most:
            self.counters["too_large"] += 1
            return
        if await self._tried(self._client.set(self._key(key), self._head(key, state) + state, px=self._lives)):
            self.counters["written"] += 1

    async def _tried(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                return await call
        except TimeoutError:
            self.counters["timeouts"] += 1
        except Exception:  # whatever a client raises: the engine goes on without
            self.counters["failed"] += 1
        return None

    def _key(self, key: StateKey) -> str:
        return f"{self._prefix}:{key.version[:16]}:{_digest(key).hex()}"

    def _head(self, key: StateKey, body: bytes) -> bytes:
        digest = _digest(key)
        return HEAD.pack(MAGIC, zlib.crc32(body, zlib.crc32(digest)), digest)


def _digest(key: StateKey) -> bytes:
    """16 bytes that differ for two users, versions of features or models; the integer 7 and the string "7" are two."""
    return hashlib.sha256(repr((key.user, key.feature_version, key.version)).encode()).digest()[:16]
