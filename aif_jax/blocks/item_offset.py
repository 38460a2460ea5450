"""A fitted constant of each item, added to its logit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import checks, layers
from aif_jax.blocks.block import Block, ItemView, block
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import ItemFeatures, ItemRow, Params, UserState

UNTRAINED = -100.0
"""The offset of items without a training event: below all others. Near -100 float32 has steps of 1e-5: their order is kept."""


@block
class ItemOffset(Block):
    """Adds a fitted offset of each item to the logit, zeros until `Run.with_popularity_correction` or you give others.

    Trained against negatives drawn with probability q, a score is log(P / q) up to a constant: right for candidates that are
    found by popularity, wrong for a whole catalogue, which needs log P. An item newer than the table has the offset of row 0.

    - Formula: logit += offset_i, of the first objective, such as log q_i = 0.75 log(count_i), see `popularity_offset`.
    - Paper: the correction of sampled softmax (Jean et al. 2015, arXiv 1412.2007).
    - Cost: a gather; a row holds one number.
    - When: candidates come from the whole catalogue and negatives were drawn by popularity.
    """

    per_item = ("table",)

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        return {"table": jnp.zeros(config.schema.table_sizes["item"], jnp.float32)}

    def item(self, params: Params, item: ItemView) -> dict[str, jax.Array]:
        return {"offset": layers.lookup(params["table"], jnp.asarray(item.features.ids["item"]))}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        return HeadInputs(offset=jnp.asarray(rows.blocks[self.name]["offset"]))


def popularity_offset(counts: Any, *, power: float = 0.75, untrained: float | None = UNTRAINED) -> np.ndarray:
    """Return log(count ** power) of items, float32 [N]: what brings log(P / q) to log P for negatives drawn by count ** power.

    Args:
      counts: [N] training events of each catalogue row; those of row 0, of items that nobody knew, do not count.
      untrained: the offset of items without an event, and of row 0, which items to come have; None gives them that of half an
        event, for models that score an unseen item by its content.

    Raises:
      TypeError, ValueError: counts that are not finite numbers of at least 0; a power below 0.

    Example:
      >>> popularity_offset([9, 1, 16, 0], power=0.5).round(2)
      array([-100.  ,    0.  ,    1.39, -100.  ], dtype=float32)
    """
    counts = np.asarray(counts, np.float64)
    checks.expect_array(counts, "counts", dtype=np.float64, shape=(None,))
    checks.expect_finite(counts, "counts", minimum=0)
    checks.expect(0 <= power < np.inf, "power", "a finite value of at least 0", power)
    counts = np.where(np.arange(len(counts)) > 0, counts, 0)
    offset = power * np.log(np.maximum(counts, 0.5))
    if untrained is not None:
        offset = np.where(counts > 0, offset, untrained)
    return offset.astype(np.float32)
