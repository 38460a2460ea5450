"""The two-tower's dot product, added to the logit."""

import math

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, block
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import ItemRow, Params, UserState


@block
class DotProduct(Block):
    """The two-tower's dot product, added to the logit.

    - Formula: logit = u . i / sqrt D + p . i, user vector u [D], item vector i [D], a trained p [D], a direction of popularity.
    - Paper: an MLP learns a dot product only slowly (Rendle et al. 2020, arXiv 2005.09683).
    - Cost: real time [C, D] x [D].
    - When: always; with `head=LogitSum()` it is the two-tower model.
    """

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"popularity": jax.random.normal(key, (config.width,), jnp.float32) * 0.02}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        user = jnp.asarray(state.vector)
        return HeadInputs(logit=jnp.asarray(rows.vector) @ (user / math.sqrt(user.shape[-1]) + params["popularity"]))
