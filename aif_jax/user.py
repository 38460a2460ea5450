"""The user component: one user's features -> UserState, off the critical path.

Paper: online asynchronous inference. Profile u and short sequence Z are projected to width D, u' = u W_p and Z' = Z W_z;
self-attention softmax(Z' Z'^T / sqrt D) Z' with a feed-forward network and masked pooling gives one vector, cross-attention
softmax(u' Z'^T / sqrt D) Z' another; an MLP over [u', both] gives the user vector. Beside it stand the user halves of the
three approximations: bridge values, folded long memories and tier tables, SIM caches.

Source: AIF (arXiv 2511.12934). Recency enters by age and position embeddings, residuals and layer norm are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import bridge, layers, memory, sim, simtier
from aif_jax.config import Config
from aif_jax.layers import embed_behaviours
from aif_jax.types import Behaviours, Memory, Params, TierHistory, UnfoldedMemory, UserFeatures, UserState


def init(key: jax.Array, config: Config) -> Params:
    """Parameters of the user component (embedding tables and bridges are shared and stand apart)."""
    schema, width = config.schema, config.width
    keys = iter(jax.random.split(key, 7))
    profile_width = len(schema.user_attributes) * width + schema.user_floats
    params: Params = {"sequence": layers.dense_init(next(keys), width, width)}
    if profile_width:
        params["profile"] = layers.dense_init(next(keys), profile_width, width)
    else:
        params["profile_constant"] = jax.random.normal(next(keys), (width,)) * width**-0.5
    if config.sequence:
        params["position"] = 0.02 * jax.random.normal(next(keys), (config.short_length, width))
        params["norm"] = layers.layer_norm_init(next(keys), width)
        params["feed_forward"] = layers.mlp_init(next(keys), width, (2 * width, width))
    params["tower"] = layers.mlp_init(next(keys), (3 if config.sequence else 2) * width, (*config.tower_hidden, width))
    if "learned" in config.memory and config.architecture == "aif":
        params["memory_key"] = layers.dense_init(next(keys), width, config.memory_width)
    return params


def apply(params: Params, features: UserFeatures, *, config: Config, candidates: int | None = None) -> UserState:
    """UserState of ONE user.

    Args:
      params: of the whole model.
      features: of one user.
      config: static.
      candidates: how many candidates the state will score, where that is known (training); None folds everything, as in
        serving. The scores are the same, the cheaper form of the long memory is picked.
    """
    sequence = short_sequence(params, features.short, config=config)
    mask = jnp.asarray(features.short.mask)
    return UserState(
        vector=vector(params, features, sequence, config=config),
        bridge=bridge.user_half(params["bridge"], sequence, mask) if config.bridges else None,
        **long_term(params, features.long, config=config, candidates=candidates),
    )


def short_sequence(params: Params, short: Behaviours, *, config: Config) -> jax.Array:
    """Z' [S, D]: the projected short history, with its position from the most recent event where `sequence` is on."""
    embedded = embed_behaviours(params["embedding"], config.schema.behaviour_fields, short)
    if config.sequence:
        embedded = embedded + params["user"]["position"][: embedded.shape[0]]
    return layers.dense(params["user"]["sequence"], embedded)


def vector(params: Params, features: UserFeatures, sequence: jax.Array, *, config: Config) -> jax.Array:
    """The user vector [D] from profile and short sequence Z' [S, D]."""
    own, mask = params["user"], jnp.asarray(features.short.mask)
    profile = layers.embed_attributes(params["embedding"], config.schema.user_attributes, features.ids)
    if config.schema.user_floats:
        profile.append(jnp.asarray(features.floats))
    projected = layers.dense(own["profile"], jnp.concatenate(profile)) if profile else own["profile_constant"]
    if not config.sequence:
        return layers.mlp(own["tower"], jnp.concatenate([projected, layers.masked_mean(sequence, mask)]))
    attended = layers.layer_norm(own["norm"], sequence + layers.attention(sequence, sequence, sequence, mask))
    pooled = layers.masked_mean(attended + layers.mlp(own["feed_forward"], attended), mask)
    crossed = layers.attention(projected, sequence, sequence, mask)
    return layers.mlp(own["tower"], jnp.concatenate([projected, pooled, crossed]))


def long_term(params: Params, long: Behaviours, *, config: Config, candidates: int | None = None) -> dict:
    """The long-history fields of UserState: `memory`, `tiers`, `sim`."""
    mask = jnp.asarray(long.mask)
    if not (config.memory or config.sim_fields or config.simtier != "off"):
        return {"memory": {}, "tiers": None, "sim": {}}
    embedded = embed_behaviours(params["embedding"], config.schema.behaviour_fields, long)
    memories: dict[str, Memory | UnfoldedMemory] = {}
    for kind in config.memory:
        keys = jnp.asarray(long.signature) if kind == "lsh" else layers.dense(params["user"]["memory_key"], embedded)
        shares = kind == "learned" and config.memory_keys == "softmax"
        key_width = config.signature_bits if kind == "lsh" else config.memory_width
        if candidates is not None and memory.cheaper_unfolded(candidates, key_width):
            keys = memory.softmax_keys(keys, mask) if shares else keys
            memories[kind] = UnfoldedMemory(keys=keys, values=embedded, mask=mask)
        else:
            memories[kind] = (memory.fold_softmax if shares else memory.fold)(keys, embedded, mask)
    return {
        "memory": memories,
        "tiers": _tiers(params, long, config=config),
        "sim": {
            field: sim.user_half(
                jnp.asarray(long.ids[field]),
                embedded,
                jnp.asarray(long.age),
                mask,
                slots=config.sim_slots,
                length=config.sim_length,
                size=config.schema.item_attribute(field).size,
            )
            for field in config.sim_fields
        },
    }


def tier_group(long: Behaviours, *, config: Config) -> jax.Array:
    """Which of the G histograms of SimTier a behaviour counts in, int32 [L]: that of its action, of its window, of both.

    An unknown action counts as action 0. The groups of the most recent window come first, those of the others follow.
    """
    action = jnp.asarray(long.action)
    known = (action >= 0) & (action < config.schema.actions)
    group = jnp.where(known, action, 0) if config.tiers_by_action else jnp.zeros_like(action)
    windows = jnp.array(config.tier_windows, group.dtype)
    window = (jnp.arange(action.shape[0], dtype=group.dtype)[:, None] >= windows).sum(1, dtype=group.dtype)
    return group + window * (config.tier_groups // (len(config.tier_windows) + 1))


def _tiers(params: Params, long: Behaviours, *, config: Config) -> TierHistory | jax.Array | None:
    if config.simtier == "off":
        return None
    group, mask = tier_group(long, config=config), jnp.asarray(long.mask)
    if config.uses_code_centres:
        frozen = params["frozen"]
        code = layers.embedding_lookup(jnp.asarray(frozen["item_codes"]), jnp.asarray(long.ids["item"]))
        return simtier.centre_table(frozen["code_tiers"], code, group, mask, tiers=config.tiers, groups=config.tier_groups)
    history = TierHistory(signature=jnp.asarray(long.signature), group=group, mask=mask)
    if config.simtier == "exact":
        return history
    return simtier.code_table(params["frozen"]["codes"], history, tiers=config.tiers, groups=config.tier_groups)
