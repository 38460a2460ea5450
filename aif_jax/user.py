"""The user component: one user's features -> UserState, off the critical path.

Profile u and short sequence Z are projected to width D, u' = u W_p and Z' = Z W_z; self-attention softmax(Z' Z'^T / sqrt D) Z'
with a feed-forward network and masked pooling gives one vector, cross-attention softmax(u' Z'^T / sqrt D) Z' another; an MLP
over [u', both] gives the user vector. Source: AIF (arXiv 2511.12934); age and position embeddings, residuals, layer norm are
ours. With `Config.encoder_layers` a causal encoder as in SASRec (arXiv 1808.09781) is in the place of self-attention, and the
MLP reads its state at the latest event too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import UserView, own, recent
from aif_jax.config import Config
from aif_jax.types import Array, Behaviours, Params, UserFeatures, UserState


def init(key: jax.Array, config: Config) -> Params:
    """Parameters of the user tower, whose short sequence blocks read too."""
    if config.towers is None:
        return {}
    schema, width = config.schema, config.width
    keys = iter(jax.random.split(key, 6))
    params: Params = {"sequence": layers.dense_init(next(keys), width, width)}
    if config.sequence:
        params["position"] = 0.02 * jax.random.normal(next(keys), (config.short_length, width), jnp.float32)
    profile_width = len(schema.user_attributes) * width + schema.user_floats
    if profile_width:
        params["profile"] = layers.dense_init(next(keys), profile_width, width)
    else:
        params["profile_constant"] = jax.random.normal(next(keys), (width,), jnp.float32) * width**-0.5
    if config.sequence:
        params["norm"] = layers.layer_norm_init(next(keys), width)
        params["feed_forward"] = layers.mlp_init(next(keys), width, (2 * width, width))
    if config.encoder_layers:
        del params["feed_forward"]  # each layer has one
        params["encoder"] = layers.encoder_init(jax.random.fold_in(key, 1), width, config.encoder_layers)
    vectors = 2 + config.sequence + (config.encoder_layers > 0)
    params["tower"] = layers.mlp_init(next(keys), vectors * width, (*config.towers, width))
    return params


def apply(params: Params, features: UserFeatures, *, config: Config, candidates: int | None = None) -> UserState:
    """UserState of ONE user; `candidates`: how many it will score, where training knows it, see `UserView`."""
    history = recent(features.history, config.history_length)
    view = UserView(config=config, params=params, features=features, history=history, candidates=candidates)
    blocks = {block.name: block.user(own(params, block), view) for block in config.blocks}
    return UserState(vector=vector(params, view) if config.towers is not None else jnp.zeros(0), blocks=blocks)


def vector(params: Params, user: UserView) -> jax.Array:
    """The user vector [D] from profile and short sequence."""
    tower, config, sequence, mask = params["user"], user.config, user.sequence, jnp.asarray(user.short.mask)
    profile = layers.embed_attributes(params["embedding"], config.schema.user_attributes, user.features.ids)
    if config.schema.user_floats:
        profile.append(jnp.asarray(user.features.floats))
    projected = layers.dense(tower["profile"], jnp.concatenate(profile)) if profile else tower["profile_constant"]
    if not config.sequence:
        return layers.mlp(tower["tower"], jnp.concatenate([projected, layers.masked_mean(sequence, mask)]))
    if config.encoder_layers:
        encoded = causal(tower, sequence, mask, config=config)
        latest = jnp.where(mask[:1], encoded[0], 0.0)
        read = layers.masked_mean(encoded, mask), layers.attention(projected, encoded, encoded, mask), latest
        return layers.mlp(tower["tower"], jnp.concatenate([projected, *read]))
    attended = layers.layer_norm(tower["norm"], sequence + layers.attention(sequence, sequence, sequence, mask))
    pooled = layers.masked_mean(attended + layers.mlp(tower["feed_forward"], attended), mask)
    crossed = layers.attention(projected, sequence, sequence, mask)
    return layers.mlp(tower["tower"], jnp.concatenate([projected, pooled, crossed]))


def causal(tower: Params, sequence: jax.Array, mask: jax.Array, *, config: Config) -> jax.Array:
    """States [S, D] of the places of a short sequence Z' [S, D], each of the events up to its own; place 0 is the latest.

    With `Config.encoder_layers` the encoder of the tower; without, its self-attention and feed-forward network under a causal
    mask, with the same parameters.
    """
    place = jnp.arange(len(sequence))
    earlier = (place[None, :] >= place[:, None]) & mask[None, :]
    if config.encoder_layers:
        return layers.layer_norm(tower["norm"], layers.causal_encoder(tower["encoder"], sequence, earlier))
    attended = layers.layer_norm(tower["norm"], sequence + layers.attention(sequence, sequence, sequence, earlier))
    return attended + layers.mlp(tower["feed_forward"], attended)


def states(params: Params, history: Behaviours, *, config: Config) -> tuple[jax.Array, jax.Array]:
    """For `train.SequenceLoss`: `causal` states of ONE user's history [S], and its items as `targets`, both [S, D]."""
    tower, mask = params["user"], jnp.asarray(history.mask)
    items = layers.embed_items(params, config.schema, history.item)
    embedded = jnp.where(mask[:, None], items + layers.embed_context(params, history), 0.0) + tower["position"][: len(mask)]
    projected = layers.dense(tower["sequence"], embedded)
    return causal(tower, projected, mask, config=config), layers.dense(tower["sequence"], items)


def targets(params: Params, item: Array, *, config: Config) -> jax.Array:
    """What states are compared with: items [...] projected as behaviours are, [..., D]."""
    return layers.dense(params["user"]["sequence"], layers.embed_items(params, config.schema, item))
