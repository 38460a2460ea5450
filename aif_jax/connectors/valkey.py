"""Valkey or Redis as a feature store: raw values in JSON, which programs in any language write.

PREFIX:{i:7}:profile    JSON object: raw values of user 7 by column of the users file
PREFIX:{i:7}:events     list of the last events, one JSON object each: raw values by column of the events file, without the user

Times are integers in `Columns.time_unit`. A user whose id is text has `s:` in place of `i:`: 7 and "7" are two users.
"""

import json
from typing import Any

from aif_jax.checks import expect
from aif_jax.connectors.features import FeatureSource, Record
from aif_jax.encoding.columns import Columns


class ValkeyFeatures(FeatureSource):
    """A `FeatureSource` that takes one round trip for a user.

    Args:
      client: `redis.asyncio.Redis` or `valkey.asyncio.Valkey`, not decoding responses, with the timeouts that suit you and a
        `max_connections` of the users read at once, in redis 100 if not set (hiredis makes it faster). Its errors come through.
      columns: names of the columns of events.
      length: events that are handed over, the last that were appended; None: all, which the trimming of the list bounds.
    """

    def __init__(self, client: Any, columns: Columns | None = None, *, length: int | None = None, prefix: str = "aif"):
        expect(length is None or length >= 1, "length", "at least 1, or None", length)
        self._client, self.columns, self.length, self._prefix = client, columns or Columns(), length, prefix

    async def get(self, user: int | str) -> Record | None:
        """Read a user, as `FeatureSource.get`. Raises ValueError that names the key of what is no JSON of this store."""
        name = f"{self._prefix}:{{{'s' if isinstance(user, str) else 'i'}:{user}}}"  # in braces: one node of a cluster has both
        keys = f"{name}:profile", f"{name}:events"
        async with self._client.pipeline(transaction=True) as pipe:  # so that both are of one moment
            pipe.get(keys[0]).lrange(keys[1], -(self.length or 0), -1)
            answers = await pipe.execute(raise_on_error=False)
        for answer, key in zip(answers, keys, strict=True):
            if isinstance(answer, Exception):
                expect("WRONGTYPE" not in str(answer), key, "a value of this store", f"another: {answer}")
                raise answer
        profile, events = answers
        if profile is None and not events:
            return None
        try:
            known = None if profile is None else {} | json.loads(profile)  # of an object alone
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{keys[0]}: expected a JSON object, got {profile!r:.80}: {error}") from error
        return Record(known, self._events(events, keys[1]) if events else None)

    def _events(self, events: list[bytes], key: str) -> dict[str, list[Any]]:
        names = [name for name in self.columns.of("events", position=False) if name != self.columns.user]
        try:
            listed = json.loads(b"[" + b",".join(events) + b"]")
            expect(len(listed) == len(events), "events", "one JSON object each", listed)
            columns = {name: [event[name] for event in listed] for name in names}
            for name, values in columns.items():
                kinds = set(map(type, values))
                good = kinds == {int} or (kinds in ({str}, {bool}) and name != self.columns.time)
                expect(good, f"column {name!r}", "integers, text or booleans, of one kind; times are integers", values)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            got = f"others, the last {events[-1][:80]!r}: {error!r:.200}"
            raise ValueError(f"{key}: expected JSON objects with {names}, got {got}") from error
        return columns
