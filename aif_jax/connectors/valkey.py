"""Valkey or Redis as a feature store: raw values in JSON, which programs in any language write and read.

PREFIX:{i:7}:profile    JSON object: raw values of user 7 by column of the users file
PREFIX:{i:7}:events     list of the last events, one JSON object each: raw values by column of the events file, without the user
PREFIX:{i:7}:count      events so far, those among them that were trimmed

Times are integers in `Columns.time_unit`. A user whose id is text has `s:` in place of `i:`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aif_jax.checks import expect
from aif_jax.connectors.features import FeatureSource, Record, UserId, by_user, in_columns
from aif_jax.encoding.columns import Columns

FOREIGN = ("WRONGTYPE", "not an integer")  # in the server's error about a value that is not of this store


class ValkeyFeatures(FeatureSource):
    """The read path: a `FeatureSource` in one round trip for a user.

    Args:
      client: `redis.asyncio.Redis` or `valkey.asyncio.Valkey`, not decoding responses, with the timeouts that suit you (hiredis
        makes it faster). Its errors come through.
      columns: names of the columns of events.
      length: events that are handed over, the last that were appended.
    """

    def __init__(self, client: Any, columns: Columns | None = None, *, length: int = 4096, prefix: str = "aif"):
        expect(length >= 1, "length", "at least 1", length)
        self._client, self.columns, self.length, self._prefix = client, columns or Columns(), length, prefix

    async def get(self, user: UserId) -> Record | None:
        """Read a user, as `FeatureSource.get`. Raises ValueError that names the key of what is no JSON of this store."""
        keys = keys_of(self._prefix, user)
        async with self._client.pipeline(transaction=True) as pipe:  # so that the version is that of the events
            pipe.get(keys[0]).lrange(keys[1], -self.length, -1).get(keys[2])
            profile, events, count = expect_own(await pipe.execute(raise_on_error=False), keys)
        if profile is None and not events:
            return None
        known = None if profile is None else _profile(profile, keys[0])
        if count is not None and not count.isdigit():
            raise ValueError(f"{keys[2]}: expected the number of events so far, got {count[:80]!r}")
        columns = self._events(events, keys[1]) if events else None
        return Record(known, columns, None if count is None else int(count))

    def _events(self, events: list[bytes], key: str) -> dict[str, list[Any]]:
        try:
            listed = json.loads(b"[" + b",".join(events) + b"]")
            expect(len(listed) == len(events), "events", "one JSON object each", listed)
            columns = in_columns(listed, self.columns)
            for name, values in columns.items():
                kinds = set(map(type, values))
                good = kinds == {int} or (kinds == {str} and name != self.columns.time)
                expect(good, f"column {name!r}", "integers or text, of one kind; times are integers", values)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            expected = f"JSON objects with {list(self.columns.of('events'))[1:]}"
            raise ValueError(f"{key}: expected {expected}, got others, the last {events[-1][:80]!r}: {error!r:.200}") from error
        return columns


class ValkeyFeatureWriter:
    """The write path: an append is one atomic step of the server for each user.

    Args:
      client: `redis.Redis` or `valkey.Valkey`.
      columns: names of the columns of events, and their time unit.
      length: events kept of a user, the last that came.

    Raises ValueError for a length below 1.
    """

    def __init__(self, client: Any, columns: Columns | None = None, *, length: int = 4096, prefix: str = "aif"):
        expect(length >= 1, "length", "at least 1", length)
        self._client, self.columns, self.length, self._prefix = client, columns or Columns(), length, prefix

    def put_user(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keep raw values of a user by column of the users file. TypeError or ValueError for values that JSON cannot hold."""
        self._client.set(keys_of(self._prefix, user)[0], json.dumps(dict(attributes), allow_nan=False))

    def append(self, events: Any) -> None:
        """Append raw events of some users by column of the events file, one round trip for each user.

        An append whose answer was lost may be in: one that is tried again may append its events twice.

        Raises:
          TypeError, ValueError: as `by_user`, before anything is written.
          ValueError: a value at a user's key is not of this store; users before that one have their events.
        """
        for user, some in by_user(events, self.columns):
            _, listed, count = keys_of(self._prefix, user)
            with self._client.pipeline(transaction=True) as pipe:
                pipe.rpush(listed, *(json.dumps(event, separators=(",", ":")) for event in some[-self.length :]))
                pipe.ltrim(listed, -self.length, -1)
                pipe.incrby(count, len(some))
                expect_own(pipe.execute(raise_on_error=False), (listed, listed, count))


def keys_of(prefix: str, user: UserId) -> tuple[str, str, str]:
    """Return keys of profile, events and count, on one node of a cluster; the integer 7 and the string "7" are two users."""
    name = f"{prefix}:{{{'s' if isinstance(user, str) else 'i'}:{user}}}"
    return f"{name}:profile", f"{name}:events", f"{name}:count"


def expect_own(answers: Sequence[Any], keys: Sequence[str]) -> Sequence[Any]:
    """Return the answers of commands on `keys`; ValueError names a key with a foreign value, else the first error."""
    for answer, key in zip(answers, keys, strict=True):
        if isinstance(answer, Exception):
            if any(text in str(answer) for text in FOREIGN):
                raise ValueError(f"{key}: expected a value of this store, got another: {answer}") from answer
            raise answer
    return answers


def _profile(value: bytes, key: str) -> Mapping[str, Any]:
    try:
        profile = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected a JSON object, got {value[:80]!r}: {error}") from error
    expect(isinstance(profile, dict), key, "a JSON object", repr(value[:80]))
    return profile
