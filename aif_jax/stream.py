"""Events of one user as a stream: how they are kept in eight bytes each, and merged by time. Pure functions for use inside jit.

Times are stamps, uint32 seconds (`times.stamps`), so that ages are exact over a whole life; time 0 stands for no event.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect
from aif_jax.schema import Schema
from aif_jax.types import Array, Behaviours, Events, Kept

FULL_NOW = np.uint32(2**32 - 1)
"""The request's time where a history comes with ages alone."""
OLDEST = float(2**32 - 2**9)  # the largest age that a stamp before FULL_NOW can have, in float32


def check(schema: Schema) -> None:
    """Raises ValueError for a schema whose items and actions are too many for a code."""
    pairs = schema.item_attribute("item").size * schema.actions
    expect(pairs <= 2**32, "schema", "at most 2^32 pairs of item and action in a model that streams", pairs)


def empty(length: int) -> Kept:
    """No events, in `length` places."""
    return Kept(code=jnp.zeros(length, jnp.uint32), time=jnp.zeros(length, jnp.uint32))


def pack(schema: Schema, events: Events) -> Kept:
    """Events [E] as they are kept, in their order."""
    item, action, time = (jnp.asarray(leaf) for leaf in (events.item, events.action, events.time))
    item = jnp.where((item >= 0) & (item < schema.item_attribute("item").size), item, 0)
    action = jnp.where((action >= 0) & (action < schema.actions), action, 0)
    code = item.astype(jnp.uint32) * np.uint32(schema.actions) + action.astype(jnp.uint32)
    return Kept(code=jnp.where(time > 0, code, np.uint32(0)), time=time)


def unpack(schema: Schema, kept: Kept) -> Events:
    """The events [R] that `pack` packed."""
    code = jnp.asarray(kept.code)
    item, action = code // np.uint32(schema.actions), code % np.uint32(schema.actions)
    return Events(item=item.astype(jnp.int32), action=action.astype(jnp.int32), time=jnp.asarray(kept.time))


def ordered(events: Events) -> Events:
    """Events [E] by time, the oldest first, those of one moment in their order; places without an event come first."""
    columns = [jnp.asarray(leaf) for leaf in (events.time, events.item, events.action)]
    time, item, action = jax.lax.sort(columns, num_keys=1, is_stable=True)
    return Events(item=item, action=action, time=time)


def merge(kept: Kept, new: Kept) -> Kept:
    """The most recent of the kept events [R] and new ones [E] that come in order, the oldest first.

    Of one moment, what came last counts as the most recent.
    """
    # Places by counting: with few new events it takes a fraction of the time of a sort.
    time, new_time, count = jnp.asarray(kept.time), jnp.asarray(new.time), new.time.shape[0]
    later = (time[None, :] > new_time[:, None]).sum(1, dtype=jnp.int32) + jnp.arange(count - 1, -1, -1, dtype=jnp.int32)
    place = jnp.where(new_time > 0, later, time.shape[0])
    at = jnp.arange(time.shape[0], dtype=jnp.int32)
    is_new = place[None, :] == at[:, None]
    before = at - (place[None, :] < at[:, None]).sum(1, dtype=jnp.int32)

    def merged(old: Array, added: Array) -> jax.Array:
        old = jnp.asarray(old).at[before].get(mode="promise_in_bounds")
        return jnp.where(is_new, added[None, :], 0).sum(1, dtype=old.dtype) + jnp.where(is_new.any(1), 0, old)

    return Kept(code=merged(kept.code, new.code), time=merged(time, new.time))


def age(now: Array, time: Array) -> jax.Array:
    """Seconds from stamps to `now`, float32; 0 for those that are not earlier, or no time."""
    now, time = jnp.asarray(now), jnp.asarray(time)
    return jnp.where((time > 0) & (time < now), now - time, np.uint32(0)).astype(jnp.float32)


def history(schema: Schema, kept: Kept, now: Array) -> Behaviours:
    """Kept events [R] as a history at the time of a request."""
    events = unpack(schema, kept)
    return Behaviours(item=events.item, action=events.action, age=age(now, events.time), mask=events.time > 0)


def events_of(past: Behaviours) -> Events:
    """A history [L] as a stream, the oldest event first, as of `FULL_NOW`."""
    seconds = jnp.clip(jnp.asarray(past.age), 0.0, OLDEST).astype(jnp.uint32)
    time = jnp.where(jnp.asarray(past.mask), FULL_NOW - seconds, np.uint32(0))
    item, action = jnp.asarray(past.item), jnp.asarray(past.action)
    return Events(item=jnp.flip(item), action=jnp.flip(action), time=jnp.flip(time))
