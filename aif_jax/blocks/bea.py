"""Bridge Embedding Approximation: learned bridges between the short history and the candidates."""

import math

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, ItemView, UserView, block, expect
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import ItemRow, Params, UserState


@block
class Bea(Block):
    """Bridge Embedding Approximation (BEA) of the cross-attention over the short history.

    Full user x item cross-attention, softmax(q Z'^T / sqrt D) Z' with a query q for every candidate, costs C x S in real time.
    M learned bridge embeddings B [M, D] between the two sides split it:

        user side (asynchronous)   V = softmax(B Z'^T / sqrt D) Z'    [M, D]
        item side (nearline)       w = softmax(q B^T / sqrt D)        [M]
        real time                  w V                                [D]

    The head's kernel W is multiplied once a request, not once a candidate: (w V) W = w (V W).

    - Paper: the BEA of AIF (arXiv 2511.12934); these formulas are ours, see docs/fidelity.md.
    - Cost: real time [C, M] x [M, H], independent of S; a row holds M numbers.
    - When: always; 10 bridges are enough.

    Attributes:
      bridges: M, the bridges.
      dot_product: adds the dot product of w V and the item vector to the logit.
    """

    bridges: int = 10
    dot_product: bool = False

    def __post_init__(self):
        expect(self.bridges >= 1, self, "bridges", "at least 1", self.bridges)

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width}

    def init(self, key: jax.Array, config: Config) -> Params:
        bridges, query = jax.random.split(key)
        return {
            "bridges": jax.random.normal(bridges, (self.bridges, config.width), jnp.float32),
            "query": layers.dense_init(query, config.width, config.width),
        }

    def user(self, params: Params, user: UserView) -> jax.Array:
        """Return V float32 [M, D]; zeros for an empty history."""
        return layers.attention(params["bridges"], user.sequence, user.sequence, jnp.asarray(user.short.mask))

    def item(self, params: Params, item: ItemView) -> jax.Array:
        """Return w float32 [M], which sums to 1."""
        query = layers.dense(params["query"], item.vector)
        return jax.nn.softmax(query @ params["bridges"].T / math.sqrt(query.shape[-1]))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        values, weights = jnp.asarray(state.blocks[self.name]), jnp.asarray(rows.blocks[self.name])
        item = jnp.asarray(rows.vector)  # (w V) . i in the order that needs no [C, D] array
        logit = (weights * (item @ (values.T / math.sqrt(item.shape[-1])))).sum(-1) if self.dot_product else 0.0
        return HeadInputs(pairs=((weights, values @ kernels["read"]),), logit=logit)
