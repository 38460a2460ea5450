"""The user component: one user's features -> UserState, off the critical path.

Profile u and short sequence Z are projected to width D, u' = u W_p and Z' = Z W_z; self-attention softmax(Z' Z'^T / sqrt D) Z'
with a feed-forward network and masked pooling gives one vector, cross-attention softmax(u' Z'^T / sqrt D) Z' another; an MLP
over [u', both] gives the user vector. Source: AIF (arXiv 2511.12934), but for age and position embeddings and layer norm.
"""

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import UserView, expect_arrays, own
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.types import Params, UserFeatures, UserState


def init(key: jax.Array, config: Config, *, network: layers.Module | None = None) -> Params:
    """Return parameters of the user tower, whose short sequence blocks read too; `network`: a Flax module, or None."""
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
        params["norm"] = layers.init_module(layers.NORM, next(keys), width)
        params["feed_forward"] = layers.init_module(layers.MLP((2 * width, width)), next(keys), width)
    trained = layers.init_module(network or layers.MLP((*config.towers, width)), next(keys), (2 + config.sequence) * width)
    return params | ({"tower": trained} if trained else {})


def apply(
    params: Params,
    features: UserFeatures,
    *,
    config: Config,
    candidates: int | None = None,
    network: layers.Module | None = None,
) -> UserState:
    """Return UserState of ONE user; `candidates`: how many it will score, where that is known, see `UserView`."""
    view = UserView(config=config, params=params, features=features, candidates=candidates)
    blocks = expect_arrays({block.name: block.user(own(params, block), view) for block in config.blocks}, "user")
    tower, sequence, mask = params["user"], view.sequence, jnp.asarray(view.short.mask)
    profile = layers.embed_attributes(params["embedding"], config.schema.user_attributes, features.ids)
    if config.schema.user_floats:
        profile.append(jnp.asarray(features.floats))
    projected = layers.dense(tower["profile"], jnp.concatenate(profile)) if profile else tower["profile_constant"]
    if config.sequence:
        attended = sequence + layers.attention(sequence, sequence, sequence, mask)
        attended = layers.apply_module(layers.NORM, tower["norm"], attended)
        pooled = layers.masked_mean(attended + layers.mlp(tower["feed_forward"], attended), mask)
        inputs = projected, pooled, layers.attention(projected, sequence, sequence, mask)
    else:
        inputs = projected, layers.masked_mean(sequence, mask)
    network = network or layers.MLP((*config.towers, config.width))
    vector = layers.apply_module(network, tower.get("tower", {}), jnp.concatenate(inputs))
    expect(vector.shape == (config.width,), "user tower", f"a vector [{config.width}], of `Config.width`", list(vector.shape))
    return UserState(vector=vector, blocks=blocks)
