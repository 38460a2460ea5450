"""What a block reads of a user, made by hand for tests of one block."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.blocks import UserView


def user(config: aif.Config, mask: Any, *, candidates: int | None = None, **history: Any) -> UserView:
    """The view of a user of whom the mask of the history and some of its fields are known."""
    mask = jnp.asarray(mask)
    nothing = {"item": np.zeros(mask.shape, np.int32), "action": np.zeros(mask.shape, np.int32)}
    events = aif.Behaviours(**(nothing | {"age": np.zeros(mask.shape, np.float32)} | history), mask=mask)
    features = aif.UserFeatures(ids={}, floats=np.zeros(0, np.float32), history=events)
    return UserView(config=config, params={}, features=features, candidates=candidates)
