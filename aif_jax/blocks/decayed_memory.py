"""Linear attention over a whole life, updated by every event."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import layers, stream
from aif_jax.blocks.block import EventView, UserView, block, expect
from aif_jax.blocks.linear_memory import Memory, Summed
from aif_jax.config import Config
from aif_jax.types import Array, Params, record

MINUTE, YEAR = 60.0, 365.25 * 86400
NOTHING = -1e30  # the logarithm of an empty sum


@record
class Decayed:
    """What a life leaves behind."""

    means: Array  # float32 [K + 1, D] decayed means, the last one without keys
    log_sums: Array  # float32 [K + 1] logarithm of the weights that they are over, at `time`
    time: Array  # uint32 [] of the latest event, 0 for none


@block
class DecayedMemory(Memory):
    """`LinearMemory` over a user's whole life: every event updates it in constant time and memory.

    Ages enter the embeddings of `LinearMemory`, so each request must sum the history again. Here every entry forgets at a
    learned rate instead, with event values v and keys g_k:

        R_k(t) = sum_j exp(g_k(e_j) - rate_k (t - t_j)) v(e_j) / sum_j exp(g_k(e_j) - rate_k (t - t_j))

    The age factors out of both sums and cancels between them, so R_k only changes with an event. Kept are the means R [K, D]
    and the logarithm of the sums below them, merged as a streaming softmax is, so nothing overflows over any span. A further
    entry without keys is the plain decayed mean. Rates are ln 2 over a half-life, which is learned as a factor of its start
    value.

    - Paper: linear attention as in `LinearMemory`; the merge is online softmax (arXiv 1805.02867); learned decays are ours.
    - Cost: K x D per event; real time [C, D] x [D, H], as `LinearMemory`, independent of the history's length.
    - When: users whose history is a stream (`presets.streaming`), instead of `LinearMemory`.

    Attributes:
      width: K, the keys.
      shortest, longest: half-lives at the start, in seconds; those of the K entries are log-spaced between them.
      learned: whether training changes them.
      dot_product: adds the dot product of what is read and the item vector to the logit.
    """

    width: int = 64
    shortest: float = 10 * MINUTE
    longest: float = 8 * YEAR
    learned: bool = True
    dot_product: bool = False
    streams = True

    def __post_init__(self):
        super().__post_init__()
        good = 0 < self.shortest <= self.longest < math.inf
        expect(good, self, "shortest", f"above 0 and at most longest={self.longest}", self.shortest)

    def init(self, key: jax.Array, config: Config) -> Params:
        return super().init(key, config) | ({"log_factor": jnp.zeros(self.width + 1, jnp.float32)} if self.learned else {})

    def half_lives(self, params: Params) -> jax.Array:
        """float32 [K + 1] seconds; the last one is of the mean without keys."""
        start = np.append(np.geomspace(self.shortest, self.longest, self.width), self.longest).astype(np.float32)
        factor = jnp.exp(params["log_factor"].astype(jnp.float32)) if self.learned else jnp.ones(len(start))
        return jnp.asarray(start) * factor

    def empty(self, config: Config) -> Decayed:
        entries = self.width + 1
        return Decayed(
            means=jnp.zeros((entries, config.width), jnp.float32),
            log_sums=jnp.full(entries, NOTHING, jnp.float32),
            time=jnp.uint32(0),
        )

    def update(self, params: Params, memory: Decayed, events: EventView) -> Decayed:
        values, before = events.embedded.astype(jnp.float32), jnp.asarray(memory.time)
        rate = math.log(2) / self.half_lives(params)
        now = jnp.maximum(before, events.events.time.max(initial=0))
        keys = layers.dense(params["key"], events.embedded).astype(jnp.float32).T
        keys = jnp.concatenate([keys, jnp.zeros_like(keys[:1])])
        age, there = stream.age(now, events.events.time)[None, :], events.mask[None, :]
        aged = jnp.where(there, keys - rate[:, None] * age, NOTHING)
        old = jnp.maximum(jnp.asarray(memory.log_sums) - rate * stream.age(now, before), NOTHING)
        largest = jax.lax.stop_gradient(jnp.maximum(old, aged.max(1, initial=NOTHING)))
        weights = jnp.where(there, jnp.exp(aged - largest[:, None]), 0.0)
        kept = jnp.exp(old - largest)
        total = kept + weights.sum(1)
        means = (kept[:, None] * jnp.asarray(memory.means) + weights @ values) / total[:, None]
        return Decayed(means=means, log_sums=largest + jnp.log(total), time=now)

    def user(self, params: Params, user: UserView) -> Summed:
        memory, dtype = user.memory[self.name], params["key"]["kernel"].dtype
        means = jnp.asarray(memory.means).astype(dtype)
        return Summed(moments=means[:-1], total=means[-1], count=(jnp.asarray(memory.time) > 0).astype(dtype))
