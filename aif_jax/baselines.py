"""Baselines in the same frame: same features, same training, same serving, other components.

- two_tower: the dot product of the user and the item vector; nothing else in real time.
- cold: one MLP over concatenated features of the pair, everything in real time (COLD, arXiv 2007.16122, without its
  feature selection).
- exact: the sequential ceiling. Softmax target attention over the whole long history, tiers from float cosine
  similarities, full cross-attention in place of BEA; what a team would serve sequentially without AIF's approximations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from aif_jax import head, item, layers, sim, user
from aif_jax.config import Config
from aif_jax.types import Array, ItemFeatures, ItemRow, Params, SimCache, UserFeatures, UserState, record

Pair = tuple[Callable, Callable]
LONG_BLOCKS_OFF: dict = dict(bridges=0, memory=(), sim_fields=(), simtier="off")


# two_tower


def two_tower_user(params: Params, features: UserFeatures, *, config: Config, candidates: int | None = None) -> UserState:
    """UserState with the user vector alone."""
    return user.apply(params, features, config=config.replace(**LONG_BLOCKS_OFF), candidates=candidates)


def two_tower_item(params: Params, features: ItemFeatures, *, config: Config) -> ItemRow:
    """ItemRow with the item vector alone."""
    return item.apply(params, features, config=config.replace(**LONG_BLOCKS_OFF))


def two_tower_interaction_init(key: jax.Array, config: Config) -> Params:
    """An item popularity direction [D] and a bias []."""
    return {"popularity": jax.random.normal(key, (config.width,)) * 0.02, "bias": jnp.zeros(())}


def two_tower_interaction(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """u . i / sqrt D + popularity . i + bias -> logits [C]."""
    own = params["interaction"]
    return jnp.asarray(rows.vector) @ (state.vector / math.sqrt(config.width) + own["popularity"]) + own["bias"]


# cold


@record
class ColdState:
    """Concatenated user features."""

    features: Array  # float32 [F]
    history: Array  # float32 [D] mean behaviour embedding


@record
class ColdRow:
    """Concatenated item features."""

    features: Array  # float32 [F']
    item: Array  # float32 [D] sum of the embeddings that behaviours carry too
    side: dict[str, Array]  # float32 [] each


def cold_user_init(key: jax.Array, config: Config) -> Params:
    """No parameters: cold embeds and concatenates."""
    return {}


def cold_user(params: Params, features: UserFeatures, *, config: Config, candidates: int | None = None) -> ColdState:
    """Profile embeddings, floats, mean of the short and of the long history."""
    embedding, fields = params["embedding"], config.schema.behaviour_fields
    parts = layers.embed_attributes(embedding, config.schema.user_attributes, features.ids)
    short = layers.masked_mean(layers.embed_behaviours(embedding, fields, features.short), jnp.asarray(features.short.mask))
    long = layers.masked_mean(layers.embed_behaviours(embedding, fields, features.long), jnp.asarray(features.long.mask))
    return ColdState(features=jnp.concatenate([*parts, jnp.asarray(features.floats), short, long]), history=short)


def cold_item(params: Params, features: ItemFeatures, *, config: Config) -> ColdRow:
    """Attribute embeddings, floats and content."""
    embedding, schema = params["embedding"], config.schema
    vectors = layers.embed_attributes(embedding, schema.item_attributes, features.ids)
    behaviour = [v for a, v in zip(schema.item_attributes, vectors, strict=True) if a.name in schema.behaviour_fields]
    content = [jnp.asarray(features.content)] if config.item_content and schema.content else []
    return ColdRow(
        features=jnp.concatenate([*vectors, jnp.asarray(features.floats), *content]),
        item=jnp.stack(behaviour).sum(0),
        side={name: jnp.asarray(features.side[name]) for name in schema.side},
    )


def cold_interaction_init(key: jax.Array, config: Config) -> Params:
    """The MLP over [user features, item features, history * item]."""
    schema, width = config.schema, config.width
    content = schema.content if config.item_content else 0
    blocks = {
        "user": (len(schema.user_attributes) + 2) * width + schema.user_floats,
        "item_features": len(schema.item_attributes) * width + schema.item_floats + content,
        "product": width,
    }
    return head.init(key, blocks, config.head_hidden)


def cold_interaction(params: Params, state: ColdState, rows: ColdRow, *, config: Config) -> jax.Array:
    """One MLP over the concatenation of every pair -> logits [C]."""
    candidates = rows.item.shape[0]
    blocks = {
        "user": jnp.broadcast_to(state.features, (candidates, state.features.shape[0])),
        "item_features": jnp.asarray(rows.features),
        "product": jnp.asarray(state.history)[None, :] * rows.item,
    }
    return head.concatenated(params["interaction"], blocks)


# exact


@record
class ExactState:
    """The whole of a user's histories, nothing folded."""

    vector: Array  # float32 [D]
    short: Array  # float32 [S, D] Z'
    short_mask: Array  # bool [S]
    long: Array  # float32 [L, D]
    long_mask: Array  # bool [L]
    content: Array  # float32 [L, E] content embeddings of the long history, unit length
    group: Array  # int32 [L] histogram of each behaviour
    sim: dict[str, SimCache]


@record
class ExactRow:
    """An item with its float content."""

    row: ItemRow
    cross_query: Array  # float32 [D] query of the full cross-attention
    target_query: Array  # float32 [D] query of target attention over the long history
    content: Array  # float32 [E], unit length


def exact_user(params: Params, features: UserFeatures, *, config: Config, candidates: int | None = None) -> ExactState:
    """Embeds both histories and looks up the float content of the long one."""
    state = user.apply(params, features, config=config.replace(bridges=0, memory=(), simtier="off"), candidates=candidates)
    long = features.long
    return ExactState(
        vector=state.vector,
        short=user.short_sequence(params, features.short, config=config),
        short_mask=jnp.asarray(features.short.mask),
        long=layers.embed_behaviours(params["embedding"], config.schema.behaviour_fields, long),
        long_mask=jnp.asarray(long.mask),
        content=_unit(layers.embedding_lookup(params["frozen"]["content"], jnp.asarray(long.ids["item"]))),
        group=user.tier_group(long, config=config),
        sim=state.sim,
    )


def exact_item_init(key: jax.Array, config: Config) -> Params:
    """The item component's parameters, and queries for cross-attention and target attention."""
    own, cross, target = jax.random.split(key, 3)
    queries = {"cross_query": cross, "target_query": target}
    made = {name: layers.dense_init(k, config.width, config.width) for name, k in queries.items()}
    return item.init(own, config.replace(bridges=0)) | made


def exact_item(params: Params, features: ItemFeatures, *, config: Config) -> ExactRow:
    """ItemRow with two more queries and the float content."""
    row = item.apply(params, features, config=config.replace(bridges=0, memory=(), simtier="off"))
    own = params["item"]
    return ExactRow(
        row=row,
        cross_query=layers.dense(own["cross_query"], jnp.asarray(row.vector)),
        target_query=layers.dense(own["target_query"], jnp.asarray(row.vector)),
        content=_unit(jnp.asarray(features.content)),
    )


def exact_interaction_init(key: jax.Array, config: Config) -> Params:
    """A head over the same kinds of blocks as AIF's."""
    width = config.width
    blocks = {"user": width, "item": width, "product": width, "cross": width, "target": width, "target_mean": width}
    for field in config.sim_fields:
        blocks |= {f"sim_{field}": width, f"sim_{field}_flags": sim.FLAGS}
    made = head.init(key, blocks | {"tiers": config.tier_groups * config.tiers}, config.head_hidden)
    return made | ({"matching": head.matching_init(config.width)} if config.matching else {})


def exact_interaction(params: Params, state: ExactState, rows: ExactRow, *, config: Config) -> jax.Array:
    """Attention of every candidate over both whole histories -> logits [C]."""
    own = params["interaction"]
    kernels = own["first"]["kernels"]
    attend = layers.attention
    long_mean = layers.masked_mean(jnp.asarray(state.long), jnp.asarray(state.long_mask))
    once = own["first"]["bias"] + state.vector @ kernels["user"] + long_mean @ kernels["target_mean"]
    first = once[None, :] + head.total(head.product(own, jnp.asarray(state.vector), jnp.asarray(rows.row.vector)))
    cross = attend(jnp.asarray(rows.cross_query), state.short, state.short, state.short_mask)  # type: ignore[arg-type]
    target = attend(jnp.asarray(rows.target_query), state.long, state.long, state.long_mask)  # type: ignore[arg-type]
    first += cross @ kernels["cross"] + target @ kernels["target"]
    for field, cache in state.sim.items():
        value = jnp.asarray(rows.row.sim[field])
        first += sim.lookup(cache, jnp.asarray(rows.row.query), value, kernels[f"sim_{field}"])
        first += sim.flags(cache, value) @ kernels[f"sim_{field}_flags"]
    first += float_tiers(jnp.asarray(rows.content), state, config=config) @ kernels["tiers"]
    logits = head.finish(own, first)
    if not config.matching:
        return logits
    item = jnp.asarray(rows.row.vector)
    read = (item * (cross + target)).sum(-1) / math.sqrt(config.width)
    return logits + head.matching(own, jnp.asarray(state.vector), item) + read


def float_tiers(content: jax.Array, state: ExactState, *, config: Config) -> jax.Array:
    """log1p counts of the behaviours by tier of (1 + cosine) / 2: content [C, E] -> float32 [C, G * T].

    Counted as a difference of cumulative counts, so that no [C, L, T] array is made.
    """
    similarity = (1.0 + content @ state.content.T) / 2.0
    at = jnp.clip((similarity * config.tiers).astype(jnp.int32), 0, config.tiers - 1)
    counts = []
    for group in range(config.tier_groups):
        kept = (jnp.asarray(state.long_mask) & (jnp.asarray(state.group) == group))[None, :]
        reached = [jnp.sum((at >= t) & kept, axis=1, dtype=jnp.int32) for t in range(config.tiers)]
        counts += [a - b for a, b in zip(reached, [*reached[1:], jnp.zeros_like(reached[0])], strict=True)]
    return jnp.log1p(jnp.stack(counts, -1).astype(jnp.float32))


def _unit(content: jax.Array) -> jax.Array:
    return content / jnp.maximum(jnp.linalg.norm(content, axis=-1, keepdims=True), 1e-6)


TWO_TOWER: dict[str, Pair] = {
    "user": (user.init, two_tower_user),
    "item": (item.init, two_tower_item),
    "interaction": (two_tower_interaction_init, two_tower_interaction),
}
COLD: dict[str, Pair] = {
    "user": (cold_user_init, cold_user),
    "item": (cold_user_init, cold_item),
    "interaction": (cold_interaction_init, cold_interaction),
}
EXACT: dict[str, Pair] = {
    "user": (user.init, exact_user),
    "item": (exact_item_init, exact_item),
    "interaction": (exact_interaction_init, exact_interaction),
}
