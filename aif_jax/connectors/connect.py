"""An update stream, or the client of a server, from a URL, for command lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aif_jax.checks import expect, needs_extra
from aif_jax.connectors.kafka import KafkaStream
from aif_jax.connectors.streams import UpdateStream
from aif_jax.connectors.valkey import ValkeyStream
from aif_jax.store.folders import redacted

FORMS = "kafka://HOST:PORT/TOPIC or redis://HOST:PORT/KEY[,KEY...]"
SOCKET_SECONDS = 30.0


def open_client(url: str, options: Mapping[str, Any] | None = None) -> Any:
    """A `redis.Redis` of the server at a URL.

    Args:
      url: `redis://[USER:PASSWORD@]HOST:PORT[/DATABASE]` (also `rediss:`, `valkey:`).
      options: further arguments of `redis.Redis`.

    Raises:
      ValueError: a URL of another form; a password in it is not shown.
      ImportError: the client is missing.
    """
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if parts.scheme not in ("redis", "rediss", "valkey") or not parts.hostname or not (database or "0").isdecimal():
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
    if parts.scheme in ("redis", "rediss", "valkey"):
        return ValkeyStream(open_client(f"{parts.scheme}://{parts.netloc}", options), names.split(","))
    raise ValueError(f"stream: expected {FORMS}, got {redacted(url)!r}")
