"""The interaction component: one UserState x [C] ItemRows -> logits [C], the critical path; a handful of products over C."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import head
from aif_jax.blocks.block import own
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
    terms = [block.score(own(params, block), state, rows, head.kernels(params["head"], block.name)) for block in config.blocks]
    if config.towers is not None and config.head:
        terms.insert(0, head.towers(params["head"], jnp.asarray(state.vector), jnp.asarray(rows.vector)))
    return head.logits(params["head"], terms)
