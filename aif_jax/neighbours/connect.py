"""Streams and servers from a URL, for command lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aif_jax.folders import redacted
from aif_jax.neighbours.kafka import KafkaStream
from aif_jax.neighbours.streams import UpdateStream
from aif_jax.neighbours.valkey_stream import ValkeyStream

FORMS = "kafka://HOST:PORT/TOPIC or redis://HOST:PORT/KEY[,KEY...]"
SOCKET_SECONDS = 30.0


def open_stream(url: str, options: Mapping[str, Any] | None = None) -> UpdateStream:
    """The stream at a URL.

    Args:
      url: `kafka://HOST:PORT[,HOST:PORT...]/TOPIC`, or `redis://[USER:PASSWORD@]HOST:PORT/KEY[,KEY...]` (also `rediss:`),
        whose keys are the partitions in their order.
      options: of the client: settings of Kafka by their names, or arguments of `redis.Redis`.

    Raises:
      ValueError: a URL of another form; a password in it is not shown.
      ImportError: the client is missing.
    """
    parts = urlsplit(url)
    names = parts.path.strip("/")
    if not names or not parts.hostname or "/" in names:
        raise ValueError(f"stream: expected {FORMS}, got {redacted(url)!r}")
    if parts.scheme == "kafka":
        return KafkaStream(parts.netloc, names, options=options)
    if parts.scheme in ("redis", "rediss", "valkey"):
        scheme = "rediss" if parts.scheme == "rediss" else "redis"
        settings: dict[str, Any] = {"socket_timeout": SOCKET_SECONDS, **(options or {})}
        return ValkeyStream(open_server(f"{scheme}://{parts.netloc}", **settings), names.split(","))
    raise ValueError(f"stream: expected {FORMS}, got {redacted(url)!r}")


def open_server(url: str, **options: Any) -> Any:
    """A client of the Valkey or Redis server at `redis://[USER:PASSWORD@]HOST:PORT[/DATABASE]` (also `rediss:`, `unix:`).

    Args:
      url: of the server.
      options: arguments of `redis.Redis`.

    Raises:
      ImportError: the client is missing.
    """
    try:
        import redis
    except ImportError as error:
        raise ImportError("servers of Valkey and Redis need redis: pip install 'aif_jax[remote]'") from error
    return redis.Redis.from_url(url, **options)
