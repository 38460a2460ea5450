"""The parts that a block reads and returns, made by hand for tests of one block."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.blocks import Block, UserView
from tests import demo


def config(block: Block, **changes: Any) -> aif.Config:
    """A config with one block."""
    return demo.config(blocks=(block,), **changes)


def user(config: aif.Config, mask: Any, *, candidates: int | None = None, **history: Any) -> UserView:
    """The view of a user of whom the mask of the history and some of its fields are known."""
    mask = jnp.asarray(mask)
    nothing = {"item": np.zeros(mask.shape, np.int32), "action": np.zeros(mask.shape, np.int32)}
    events = aif.Behaviours(**(nothing | {"age": np.zeros(mask.shape, np.float32)} | history), mask=mask)
    features = aif.UserFeatures(ids={}, floats=np.zeros(0, np.float32), history=events)
    return UserView(config=config, params={}, features=features, candidates=candidates, history=events)


def state(block: Block, half: Any) -> aif.UserState:
    """The state with one block's user half."""
    return aif.UserState(vector=jnp.zeros(0), blocks={block.name: half})


def rows(block: Block, half: Any) -> aif.ItemRow:
    """Rows [C] with one block's item half."""
    return aif.ItemRow(vector=jnp.zeros(0), fitted={}, blocks={block.name: half}, side={})
