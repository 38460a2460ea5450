"""The item component: one item's features -> ItemRow, nearline over the catalogue. Source: AIF (arXiv 2511.12934)."""

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import ItemView, expect_arrays, own
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.types import ItemFeatures, ItemRow, Params


def init(key: jax.Array, config: Config, *, network: layers.Module | None = None) -> Params:
    """Return parameters of the item tower; `network`: a Flax module from inputs [w] to the item vector [D], or None."""
    schema, width = config.schema, config.width
    content, tower = jax.random.split(key)
    inputs = len(schema.item_attributes) * width + schema.item_floats
    params: Params = {}
    if config.reads_content:
        params["content"] = layers.dense_init(content, schema.content, width)
        inputs += width
    trained = layers.init_module(network or layers.MLP((*config.towers, width)), tower, inputs)
    return params | ({"tower": trained} if trained else {})


def apply(params: Params, features: ItemFeatures, *, config: Config, network: layers.Module | None = None) -> ItemRow:
    """Return the ItemRow of ONE item. Raises ValueError if the item tower reads content and there is none."""
    there = not config.reads_content or features.content is not None
    expect(there, "item", f"content float32 [{config.schema.content}], which the model reads", None)
    inputs = layers.embed_attributes(params["embedding"], config.schema.item_attributes, features.ids)
    if config.schema.item_floats:
        inputs.append(jnp.asarray(features.floats))
    if config.reads_content:
        inputs.append(layers.dense(params["item"]["content"], jnp.asarray(features.content)))
    network, trained = network or layers.MLP((*config.towers, config.width)), params.get("item", {}).get("tower", {})
    made = layers.apply_module(network, trained, jnp.concatenate(inputs))
    expect(made.shape == (config.width,), "item tower", f"a vector [{config.width}], of `Config.width`", list(made.shape))
    view = ItemView(config=config, params=params, features=features, vector=made)
    return ItemRow(
        vector=made,
        fitted=expect_arrays({table.name: table.item(own(params, table), features) for table in config.tables}, "item"),
        blocks=expect_arrays({block.name: block.item(own(params, block), view) for block in config.blocks}, "item"),
        side={name: jnp.asarray(features.side[name]) for name in config.schema.side},
    )
