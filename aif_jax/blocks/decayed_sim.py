"""SIM over a whole life: a cache of values kept by decayed counts."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import stream
from aif_jax.blocks.block import EventView, UserView, block, expect
from aif_jax.blocks.sim import Cached, SimCache
from aif_jax.config import Config
from aif_jax.types import Array, Kept, Params, record

DAY = 86400.0
LEAST = 1e-6  # a decayed count that still says that the value is cached


@record
class Values:
    """The cached values of one user and their last events."""

    value: Array  # int32 [Q] the field's value, 0 where the slot is empty
    count: Array  # float32 [Q] decayed events since it came in, as of the latest of them
    code: Array  # uint32 [Q, P] its last events, see `stream.pack`
    time: Array  # uint32 [Q, P] the most recent first, 0 for none


@block
class DecayedSim(Cached):
    """`Sim` over a user's whole life: every event updates a bounded cache of Q values of a field.

        count_v(t) = sum over events j of value v since it entered the cache: 2 ** -((t - t_j) / half_life)

    An event of a cached value adds 1 to its count and to its last P events. An event of another value replaces the value with
    the smallest count, and starts at 1. So values that come once replace each other, an interest that rests stays as long as
    its decayed count is above theirs, and a new one that comes back grows. In real time it is `Sim`.

    - Paper: SIM (arXiv 2006.05639); least frequently used with aging is a classic of caches. The space-saving algorithm
      (Metwally et al. 2005), where a new value inherits the count that it replaces, ranked worse, see
      experiments/notes/study_notes.md.
    - Cost: Q comparisons per event; real time a softmax over P cached events for each candidate.
    - When: users whose history is a stream, instead of `Sim`.

    Attributes:
      field: one of the schema's behaviour fields, such as "category".
      slots: Q, cached values.
      length: P, behaviours cached for each value.
      half_life: half-life of the counts, in seconds.
    """

    field: str = "category"
    slots: int = 16
    length: int = 8
    half_life: float = 365 * DAY
    streams = True

    def __post_init__(self):
        super().__post_init__()
        expect(0 < self.half_life < math.inf, self, "half_life", "a finite number of seconds above 0", self.half_life)

    def check(self, config: Config) -> None:
        super().check(config)
        stream.check(config.schema)

    def empty(self, config: Config) -> Values:
        kept = jnp.zeros((self.slots, self.length), jnp.uint32)
        return Values(value=jnp.zeros(self.slots, jnp.int32), count=jnp.zeros(self.slots), code=kept, time=kept)

    def update(self, params: Params, memory: Values, events: EventView) -> Values:
        kept = stream.pack(events.config.schema, events.events)
        value = jnp.where(events.mask, events.field(self.field), 0)

        def step(values: Values, event: tuple[jax.Array, ...]) -> tuple[Values, None]:
            return self._add(values, *event), None

        given: Any = (value, kept.code, kept.time)
        return jax.lax.scan(step, jax.tree.map(jnp.asarray, memory), given)[0]

    def user(self, params: Params, user: UserView) -> SimCache:
        values: Values = user.memory[self.name]
        code, time = jnp.asarray(values.code), jnp.asarray(values.time)
        events = stream.history(user.config.schema, Kept(code=code.reshape(-1), time=time.reshape(-1)), user.now)
        filled, age = jnp.asarray(values.value) > 0, stream.age(user.now, time[:, 0])
        count = jnp.asarray(values.count) * self._left(age)
        return SimCache(
            value=jnp.where(filled, jnp.asarray(values.value), -1),
            entries=user.embed(events).reshape(*time.shape, -1),
            mask=time > 0,
            count=jnp.where(filled, jnp.maximum(count, LEAST), 0.0),
            age=age,
        )

    def _add(self, values: Values, value: jax.Array, code: jax.Array, time: jax.Array) -> Values:
        """The cache after one event; one without a value changes nothing."""
        latest = values.time[:, 0]
        counts = jnp.where(values.value > 0, values.count * self._left(stream.age(time, latest)), -1.0)
        slot = jnp.argmin(jnp.where(values.value == value, -2.0, counts))  # the value's own, or the one with the least
        before = jax.tree.map(lambda leaf: leaf[slot], values)
        known = before.value == value
        late = self._left(stream.age(latest[slot], time))  # what is left of an event that comes late, 1 of others
        times, codes = (jnp.where(known, leaf, np.uint32(0)) for leaf in (before.time, before.code))
        place, moved = (times > time).sum(), jnp.arange(self.length)
        times, codes = (
            jnp.where(moved < place, old, jnp.where(moved == place, new, jnp.roll(old, 1)))
            for old, new in ((times, time), (codes, code))
        )
        after = Values(value=value, count=jnp.where(known, counts[slot] + late, 1.0), code=codes, time=times)
        return jax.tree.map(lambda leaf, new, old: leaf.at[slot].set(jnp.where(value > 0, new, old)), values, after, before)

    def _left(self, age: jax.Array) -> jax.Array:
        """The share of a count that is left after some seconds."""
        return jnp.exp2(-age / self.half_life)
