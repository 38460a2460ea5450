"""The interaction component: one UserState x [C] ItemRows -> logits [C], the critical path.

Everything that depends on one side alone was prepared there; what is left is a handful of products over C. Source: the real-
time part of AIF (arXiv 2511.12934).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import bridge, head, memory, sim, simtier
from aif_jax.config import Config
from aif_jax.types import ItemRow, Params, TierHistory, UserState


def blocks(config: Config) -> dict[str, int]:
    """Widths of the head's input blocks, by name, in order."""
    width = config.width
    widths = {"user": width, "item": width, "product": width}
    if config.bridges:
        widths["bridge"] = width
    for kind in config.memory:
        widths |= {f"{kind}_mean": width, f"{kind}_deviation": width}
    for field in config.sim_fields:
        widths |= {f"sim_{field}": width, f"sim_{field}_flags": sim.FLAGS}
    if config.simtier != "off":
        widths["tiers"] = config.tier_groups * config.tiers
    return widths


def init(key: jax.Array, config: Config) -> Params:
    """Parameters of the head."""
    return head.init(key, blocks(config), config.head_hidden)


def apply(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """Logits of one user's candidates, float32 [C]; a logit depends on its own row alone.

    Args:
      params: of the whole model; only `interaction` is read.
      state: of one user.
      rows: [C].
      config: static.
    """
    own = params["interaction"]
    kernels = own["first"]["kernels"]
    once = own["first"]["bias"] + state.vector @ kernels["user"]
    for kind, history in state.memory.items():
        once += memory.mean(history) @ kernels[f"{kind}_mean"]
    first = once[None, :] + head.product(own, jnp.asarray(state.vector), jnp.asarray(rows.vector))
    if state.bridge is not None:
        first += bridge.combine(jnp.asarray(rows.bridge), state.bridge @ kernels["bridge"])
    for kind, history in state.memory.items():
        query = rows.signature if kind == "lsh" else rows.memory_query
        first += memory.deviation(history, jnp.asarray(query), kernels[f"{kind}_deviation"])
    for field, cache in state.sim.items():
        value = jnp.asarray(rows.sim[field])
        first += sim.lookup(cache, jnp.asarray(rows.query), value, kernels[f"sim_{field}"])
        first += sim.flags(cache, value) @ kernels[f"sim_{field}_flags"]
    if state.tiers is not None:
        first += tier_block(state, rows, config=config) @ kernels["tiers"]
    return head.finish(own, first)


def tier_block(state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """log1p tier counts of every candidate, float32 [C, G * T]: exact, or read from the table by bridge codes."""
    if isinstance(state.tiers, TierHistory):
        counts = simtier.histogram(jnp.asarray(rows.signature), state.tiers, tiers=config.tiers, groups=config.tier_groups)
        return jnp.log1p(counts.astype(jnp.float32)).reshape(counts.shape[0], config.tier_groups * config.tiers)
    table = jnp.asarray(state.tiers)
    return (table[jnp.asarray(rows.codes)] * jnp.asarray(rows.code_weights)[..., None]).sum(1)
