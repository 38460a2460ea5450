"""Full attention over the histories, which AIF approximates: its real-time cost grows with C x L."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, ItemView, UserView, block
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import Array, ItemRow, Params, UserState, record


@record
class Sequence:
    """A history that candidates attend over."""

    values: Array  # float32 [S, D]
    mask: Array  # bool [S]


@dataclasses.dataclass(frozen=True)
class _Attention(Block):
    dot_product: bool = False

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width}

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"query": layers.dense_init(key, config.width, config.width)}

    def item(self, params: Params, item: ItemView) -> jax.Array:
        return layers.dense(params["query"], item.vector)

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        history, query = state.blocks[self.name], jnp.asarray(rows.blocks[self.name])
        values, mask, item = jnp.asarray(history.values), jnp.asarray(history.mask), jnp.asarray(rows.vector)
        read = layers.attention(query, values, values, mask)
        once = layers.masked_mean(values, mask) @ kernels["mean"] if "mean" in kernels else 0.0
        logit = (item * read).sum(-1) / math.sqrt(item.shape[-1]) if self.dot_product else 0.0
        return HeadInputs(once=once, rest=read @ kernels["read"], logit=logit)


@block
class CrossAttention(_Attention):
    """Softmax attention of every candidate over the short history; `Bea` approximates it.

    - Formula: softmax(q Z'^T / sqrt D) Z', with an item query q [D] and the projected short history Z' [S, D].
    - Paper: scaled dot-product attention (arXiv 1706.03762), which AIF (2511.12934) replaces by BEA.
    - Cost: real time C x S x D.
    - When: to measure what `Bea` loses (`presets.full_attention`); a team would serve it sequentially.

    Attributes:
      dot_product: adds the dot product of the attention output and the item vector to the logit.
    """

    def user(self, params: Params, user: UserView) -> Sequence:
        return Sequence(values=user.sequence, mask=jnp.asarray(user.short.mask))


@block
class TargetAttention(_Attention):
    """Softmax attention of every candidate over the long history, plus its mean; `LinearMemory` and `LshDin` approximate it.

    - Formula: softmax(q E^T / sqrt D) E, with an item query q [D] and behaviour embeddings E [L, D].
    - Paper: target attention, DIN (arXiv 1706.06978), here with a softmax.
    - Cost: real time C x L x D.
    - When: to measure what linear attention loses (`presets.full_attention`).

    Attributes:
      dot_product: see `CrossAttention`.
    """

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width, "mean": config.width}

    def user(self, params: Params, user: UserView) -> Sequence:
        return Sequence(values=user.embedded, mask=jnp.asarray(user.long.mask))
