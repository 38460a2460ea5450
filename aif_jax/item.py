"""The item component: one item's features -> ItemRow, nearline over the catalogue.

Paper: nearline asynchronous inference into the N2O (nearline-to-online) table. An MLP over the attribute embeddings and the
projected content embedding gives the item vector; from it come the SIM query, the bridge weights and the learned long-memory
query; the signature comes from the content. Source: AIF (arXiv 2511.12934).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import bridge, layers, lsh, simtier
from aif_jax.config import Config
from aif_jax.types import ItemFeatures, ItemRow, Params


def init(key: jax.Array, config: Config) -> Params:
    """Parameters of the item component."""
    schema, width = config.schema, config.width
    keys = iter(jax.random.split(key, 5))
    inputs = len(schema.item_attributes) * width + schema.item_floats
    params: Params = {}
    if config.item_content and schema.content:
        params["content"] = layers.dense_init(next(keys), schema.content, width)
        inputs += width
    params["tower"] = layers.mlp_init(next(keys), inputs, (*config.tower_hidden, width))
    if config.architecture in ("aif", "exact"):
        if config.sim_fields:
            params["query"] = layers.dense_init(next(keys), width, width)
        if config.bridges:
            params["bridge_query"] = layers.dense_init(next(keys), width, width)
        if "learned" in config.memory and config.architecture == "aif":
            params["memory_query"] = layers.dense_init(next(keys), width, config.memory_width)
    return params


def apply(params: Params, features: ItemFeatures, *, config: Config) -> ItemRow:
    """ItemRow of ONE item.

    Args:
      params: of the whole model.
      features: of one item.
      config: static.
    """
    own = params["item"]
    made = vector(params, features, config=config)
    signature = codes = code_weights = None
    if config.uses_signatures:
        signature = (
            features.signature if features.signature is not None else lsh.sign(params["frozen"], jnp.asarray(features.content))
        )
        signature = jnp.asarray(signature)
    sizes = {"count": config.codes_per_item, "tiers": config.tiers}
    if config.uses_code_centres:
        if features.content is None:
            raise ValueError("item: codes_by='cosine' needs ItemFeatures.content, got None")
        codes, code_weights = simtier.nearest_centres(params["frozen"]["code_centres"], jnp.asarray(features.content), **sizes)
    elif config.simtier == "codes":
        codes, code_weights = simtier.nearest_codes(params["frozen"]["codes"], jnp.asarray(signature), **sizes)
    return ItemRow(
        vector=made,
        query=layers.dense(own["query"], made) if config.sim_fields else None,
        bridge=bridge.item_half(params["bridge"], layers.dense(own["bridge_query"], made)) if config.bridges else None,
        signature=signature,
        memory_query=layers.dense(own["memory_query"], made) if "learned" in config.memory else None,
        codes=codes,
        code_weights=code_weights,
        sim={field: jnp.asarray(features.ids[field]) for field in config.sim_fields},
        side={name: jnp.asarray(features.side[name]) for name in config.schema.side},
    )


def vector(params: Params, features: ItemFeatures, *, config: Config) -> jax.Array:
    """The item vector [D] from attributes, floats and content."""
    inputs = layers.embed_attributes(params["embedding"], config.schema.item_attributes, features.ids)
    if config.schema.item_floats:
        inputs.append(jnp.asarray(features.floats))
    if "content" in params["item"]:
        inputs.append(layers.dense(params["item"]["content"], jnp.asarray(features.content)))
    return layers.mlp(params["item"]["tower"], jnp.concatenate(inputs))
