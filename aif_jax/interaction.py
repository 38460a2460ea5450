"""The interaction component: one UserState x [C] ItemRows -> logits [C], the critical path; a handful of products over C."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import head
from aif_jax.blocks.block import HeadInputs, own
from aif_jax.config import Config
from aif_jax.types import ItemRow, Params, UserState


def widths(config: Config) -> dict[str, dict[str, int]]:
    """Widths of the head's inputs, by block and name, in order; "tower" has the user vector, the item vector, their product."""
    towers = {} if config.towers is None else {"tower": {name: config.width for name in ("user", "item", "product")}}
    return towers | {block.name: block.widths(config) for block in config.blocks}


def init(key: jax.Array, config: Config) -> Params:
    """Parameters of the head."""
    return head.init(key, widths(config), config.head, config.outputs)


def apply(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> jax.Array:
    """Logits of one user's candidates, float32 [C], or [C, T] for T objectives; a logit depends on its own row alone."""
    return head.logits(params["head"], list(_terms(params, state, rows, config).values()))


def contributions(params: Params, state: UserState, rows: ItemRow, *, config: Config) -> dict[str, jax.Array]:
    """What each block adds to the logits, float32 [C] or [C, T] by name: the logit less the logit without the block's terms.

    "tower" is the share of user and item vector. The head is not linear, so the contributions need not add up to the logit.

    Example:
      >>> import numpy as np, aif_jax as aif
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema, width=4))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> params = model.init(jax.random.key(0), catalogue)
      >>> state = model.user(params, aif.empty_user(schema, length=256))
      >>> rows = jax.vmap(model.item, (None, 0))(params, aif.empty_items(schema, 2))
      >>> {name: part.shape for name, part in contributions(params, state, rows, config=model.config).items()}
      {'dot_product': (2,)}
    """
    named = _terms(params, state, rows, config)
    whole = head.logits(params["head"], list(named.values()))
    if len(named) == 1:
        return {name: whole for name in named}
    rest = {name: [term for other, term in named.items() if other != name] for name in named}
    return {name: whole - head.logits(params["head"], terms) for name, terms in rest.items()}


def _terms(params: Params, state: UserState, rows: ItemRow, config: Config) -> dict[str, HeadInputs]:
    """What towers and blocks give to the head, by name."""
    terms: dict[str, HeadInputs] = {}
    if config.towers is not None and config.head:
        terms["tower"] = head.towers(params["head"], jnp.asarray(state.vector), jnp.asarray(rows.vector))
    for block in config.blocks:
        terms[block.name] = block.score(own(params, block), state, rows, head.kernels(params["head"], block.name))
    return terms
