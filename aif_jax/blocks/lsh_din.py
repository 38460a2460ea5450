"""DIN on LSH: target attention whose weights are similarities of content signatures, in its linear form."""

import jax.numpy as jnp

from aif_jax.blocks.block import Block, UserView, block
from aif_jax.blocks.linear_memory import Summed, mean, scale, sum_events
from aif_jax.blocks.signatures import Signatures, signs
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import ItemRow, Params, UserState


@block
class LshDin(Block):
    """DIN on LSH: linear attention over the long history, weighted by the similarity of content signatures.

    With sim(i, j) = 1/2 + s_i . s_j / (2 K) for signs s in {-1, +1}^K, the similarity-weighted mean of a history is exactly

        o_i = (b / 2 + s_i A / (2 K)) / n,   A = sum_j m_j s_j v_j^T,   b = sum_j m_j v_j,   n = sum_j m_j

    so A [K, D] is summed on the user side, and the head receives mean and deviation apart, as in `LinearMemory`.

    - Paper: AIF's LSH-DIN (arXiv 2511.12934) after DIN (1706.06978); the linear form is ours.
    - Cost: user side K x D x L; real time [C, K] x [K, H], independent of L.
    - When: to reproduce the paper's model (`presets.paper`); no gain next to `LinearMemory`.

    Attributes:
      bits: K, bits of a signature.
    """

    bits: int = 64

    def __post_init__(self):
        Signatures(self.bits)

    @property
    def tables(self) -> tuple[Signatures, ...]:
        return (Signatures(self.bits),)

    def widths(self, config: Config) -> dict[str, int]:
        return {"mean": config.width, "deviation": config.width}

    def user(self, params: Params, user: UserView) -> Summed:
        return sum_events(signs(user.values(self.tables[0], user.long)).T, user.embedded, jnp.asarray(user.long.mask))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        history, query = state.blocks[self.name], jnp.asarray(rows.fitted[self.tables[0].name])
        read = jnp.asarray(history.moments) @ kernels["deviation"] * scale(history)
        return HeadInputs(once=mean(history) @ kernels["mean"], pairs=((signs(query), read),))
