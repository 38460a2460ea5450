"""The bias of the position at which a candidate was shown: trained, and left out in serving."""

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, block, expect
from aif_jax.config import Config
from aif_jax.types import Params


@block
class PositionBias(Block):
    """Adds a trained bias of the position in the shown list to the logit, in training alone.

    Users click what stands first, whatever it is. Without the bias a model of impressions learns the order of the system that
    wrote the log. Serving and evaluation score every candidate as if it were shown first. Held-out clicks depend on it
    too, so GAUC may fall where the order gets better: `keep_best=None` takes the last checkpoint.

    - Formula: training logit = logit + b_p with p = min(position, `positions`), b_1 = 0; 0 for a candidate without a known one.
    - Paper: the bias tower of Zhao et al. 2019 (RecSys, "Recommending what video to watch next"); PAL (Guo et al. 2019, RecSys)
      multiplies probabilities instead.
    - Cost: none in serving.
    - When: task `Impressions`, with positions by `Columns.position`. Negatives of `NextItem` were never shown: it learns that.

    Attributes:
      positions: display positions with a bias each; later ones share the last.
    """

    positions: int = 20

    def __post_init__(self):
        expect(self.positions >= 2, self, "positions", "at least 2", self.positions)

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"bias": jnp.zeros((self.positions - 1, *((config.outputs,) if config.outputs > 1 else ())), jnp.float32)}

    def training_logit(self, params: Params, display_positions: jax.Array) -> jax.Array:
        """Return b_p for positions int32 [B, C], 0 if unknown: float32 [B, C] or, with T objectives, [B, C, T]."""
        bias = jnp.pad(params["bias"], [(2, 0)] + [(0, 0)] * (params["bias"].ndim - 1))
        return bias[jnp.minimum(display_positions, self.positions)]
