"""The parts that a block reads and returns, made by hand for tests of one block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import heads
from aif_jax.blocks import Block, HeadInputs, ItemView, UserView
from aif_jax.blocks.block import own
from aif_jax.types import Params
from tests import demo


def config(block: Block, **changes: Any) -> aif.Config:
    """A config with one block."""
    return demo.config(blocks=(block,), **changes)


def user(config: aif.Config, mask: Any, *, sequence: Any = None, candidates: int | None = None, **history: Any) -> UserView:
    """The view of a user of whom the mask of the history and the projected short sequence [S, D] are known."""
    mask = jnp.asarray(mask)
    fields = {
        "item": np.zeros(mask.shape, np.int32),
        "action": np.zeros(mask.shape, np.int32),
        "age": np.zeros(mask.shape, np.float32),
    }
    features = aif.UserFeatures(ids={}, floats=np.zeros(0, np.float32), history=aif.Behaviours(**(fields | history), mask=mask))
    nothing = jnp.zeros((mask.shape[0], config.width))
    sequence = nothing if sequence is None else jnp.asarray(sequence)
    return _seen(config, {}, features, candidates=candidates, embeddings=nothing, sequence=sequence)


def view(config: aif.Config, params: Params, features: aif.UserFeatures) -> UserView:
    """The view of a user whose projected short sequence is zero."""
    return _seen(config, params, features, sequence=jnp.zeros((config.short_length, config.width)))


def _seen(config: aif.Config, params: Params, features: aif.UserFeatures, *, candidates: Any = None, **made: Any) -> UserView:
    """A view with some of what it would compute from the parameters."""
    view = UserView(config=config, params=params, features=features, candidates=candidates, history=features.history)
    view.__dict__.update(made)  # where a `cached_property` keeps its value
    return view


def item(config: aif.Config, vector: Any) -> ItemView:
    """The view of an item of whom the vector [D] is known."""
    return ItemView(config=config, params={}, features=demo.items(1), vector=jnp.asarray(vector))


def state(block: Block, half: Any, *, vector: Any = ()) -> aif.UserState:
    """The state with one block's user half."""
    return aif.UserState(vector=jnp.asarray(vector, jnp.float32), blocks={block.name: half})


def rows(block: Block, half: Any = None, *, vector: Any = (), fitted: Any = None) -> aif.ItemRow:
    """Rows [C] with one block's item half."""
    return aif.ItemRow(vector=jnp.asarray(vector, jnp.float32), fitted=fitted or {}, blocks={block.name: half}, side={})


def first_layer(terms: HeadInputs, item: Any = None) -> Any:
    """What the terms add to the head's first layer, [C, H] or, where it is the same for every candidate, [1, H]."""
    if np.ndim(terms.item):
        terms = terms._replace(pairs=(*terms.pairs, (jnp.asarray(item), terms.item)))
    total = jnp.expand_dims(jnp.asarray(terms.once), 0) if np.ndim(terms.once) else jnp.zeros((1, 1))
    for part in (*(left @ right for left, right in terms.pairs), *([terms.rest] if np.ndim(terms.rest) else [])):
        shape = np.broadcast_shapes(total.shape, part.shape)
        total = jnp.broadcast_to(total, shape) + jnp.broadcast_to(part, shape)
    return total


def head_inputs(block: Block, model: aif.PreRanker, params: Params, features: aif.UserFeatures, items: aif.ItemFeatures) -> Any:
    """The block's user half, the rows of the items and the block's inputs of the head, computed as the model does."""
    of_block = own(params, block)
    half, made = block.user(of_block, view(model.config, params, features)), jax.vmap(model.item, (None, 0))(params, items)
    return half, made, first_layer(block.score(of_block, state(block, half), made, identity(block, model.config)), made.vector)


def identity(block: Block, config: aif.Config) -> dict[str, Any]:
    """Kernels under which the first layer is the block's inputs, next to each other."""
    return heads.identity(block.widths(config))
