"""The interaction component: one UserState x [C] ItemRows -> logits [C], the critical path.

Everything that depends on one side alone was prepared there; what is left is a handful of products over C. Source: the real-
time part of AIF (arXiv 2511.12934).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from aif_jax import head, memory, sim, simtier
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
    made = head.init(key, blocks(config), config.head_hidden)
    return made | ({"matching": head.matching_init(config.width)} if config.matching else {})


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
    pairs = head.product(own, jnp.asarray(state.vector), jnp.asarray(rows.vector))
    if state.bridge is not None:
        pairs.append((jnp.asarray(rows.bridge), state.bridge @ kernels["bridge"]))
    if state.tiers is not None:
        pairs.append((tier_block(state, rows, config=config), kernels["tiers"]))
    for field, cache in state.sim.items():
        flags = kernels[f"sim_{field}_flags"]
        once += sim.missing() @ flags
        pairs.append((sim.own_slot(cache, jnp.asarray(rows.sim[field])), sim.slot_flags(cache) @ flags))
    for kind, history in state.memory.items():
        once += memory.mean(history) @ kernels[f"{kind}_mean"]
    first = once[None, :] + head.total(pairs)
    for kind, history in state.memory.items():
        query = rows.signature if kind == "lsh" else rows.memory_query
        first += memory.deviation(history, jnp.asarray(query), kernels[f"{kind}_deviation"])
    for field, cache in state.sim.items():
        first += sim.lookup(cache, jnp.asarray(rows.query), jnp.asarray(rows.sim[field]), kernels[f"sim_{field}"])
    logits = head.finish(own, first)
    return logits + matching(own, state, rows) if config.matching else logits


def matching(params: Params, state: UserState, rows: ItemRow) -> jax.Array:
    """What the candidate's vector has in common with the user's vector, with what BEA and with what the learned memory read.

    Args:
      params: of the interaction component.
      state: of one user.
      rows: [C].

    Returns:
      float32 [C], to be added to the logits.
    """
    item = jnp.asarray(rows.vector)
    found = head.matching(params, jnp.asarray(state.vector), item)
    if state.bridge is not None:  # (w V) . i in the order that needs no [C, D] array
        found += (jnp.asarray(rows.bridge) * (item @ (jnp.asarray(state.bridge).T / math.sqrt(item.shape[-1])))).sum(-1)
    if "learned" in state.memory:
        common = memory.match(state.memory["learned"], jnp.asarray(rows.memory_query), item)
        found += common / math.sqrt(item.shape[-1])
    return found


def tier_block(state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """log1p tier counts of every candidate, float32 [C, G * T]: exact, or read from the table by bridge codes."""
    if isinstance(state.tiers, TierHistory):
        counts = simtier.histogram(jnp.asarray(rows.signature), state.tiers, tiers=config.tiers, groups=config.tier_groups)
        return jnp.log1p(counts.astype(jnp.float32)).reshape(counts.shape[0], config.tier_groups * config.tiers)
    table = jnp.asarray(state.tiers)
    return (table[jnp.asarray(rows.codes)] * jnp.asarray(rows.code_weights)[..., None]).sum(1)
