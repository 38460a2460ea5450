"""COLD's input: the features of user and item side by side."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, HeadInputs, ItemView, UserView, block
from aif_jax.config import Config
from aif_jax.types import ItemRow, Params, UserState


@block
class Concatenation(Block):
    """COLD's input: user features, item features, and the product of the short history's mean and the item, for one MLP.

    - Formula: head input [user; item; mean(short history) * item embedding], F numbers for each pair.
    - Paper: COLD (arXiv 2007.16122), without its feature selection.
    - Cost: real time [C, F] x [F, H]; a row holds the item's share of F.
    - When: as a baseline: `Config(towers=None, blocks=(Concatenation(),))` is COLD; it needs no towers.
    """

    def widths(self, config: Config) -> dict[str, int]:
        schema, width = config.schema, config.width
        content = schema.content if config.item_content else 0
        return {
            "user": (len(schema.user_attributes) + 2) * width + schema.user_floats,
            "item": len(schema.item_attributes) * width + schema.item_floats + content,
            "product": width,
        }

    def user(self, params: Params, user: UserView) -> dict[str, jax.Array]:
        schema, features = user.config.schema, user.features
        profile = layers.embed_attributes(user.params["embedding"], schema.user_attributes, features.ids)
        embedded = user.embeddings[: user.config.short_length]
        short = layers.masked_mean(embedded, jnp.asarray(user.short.mask))
        long = layers.masked_mean(user.embedded, jnp.asarray(user.long.mask))
        return {"features": jnp.concatenate([*profile, jnp.asarray(features.floats), short, long]), "short": short}

    def item(self, params: Params, item: ItemView) -> dict[str, jax.Array]:
        schema, features = item.config.schema, item.features
        vectors = layers.embed_attributes(item.params["embedding"], schema.item_attributes, features.ids)
        behaviour = [v for a, v in zip(schema.item_attributes, vectors, strict=True) if a.name in schema.behaviour_fields]
        content = [jnp.asarray(features.content)] if item.config.item_content and schema.content else []
        return {
            "features": jnp.concatenate([*vectors, jnp.asarray(features.floats), *content]),
            "embedding": jnp.stack(behaviour).sum(0),
        }

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        user, item = jax.tree.map(jnp.asarray, (state.blocks[self.name], rows.blocks[self.name]))
        return HeadInputs(
            once=user["features"] @ kernels["user"],
            pairs=((item["features"], kernels["item"]), (user["short"][None, :] * item["embedding"], kernels["product"])),
        )
