"""Co-engagement: a dot product of PureSVD factors of the history and the candidate."""

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, ItemView, UserView, block, expect
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.trees import take
from aif_jax.types import ItemFeatures, ItemRow, Params, UserState


@block
class PureSvd(Block):
    """Adds a dot product of PureSVD factors to the logit: what history and candidate share with other users' histories.

        logit += sum_n n ** -decay v_n . v_c    v_n: factor [R] of the n-th last event, v_c of the candidate; first objective

    V [N, R] are the leading right singular vectors of the matrix of users and items of the training events. They are fitted
    after training and never before: an event of a training sample is in them, and a model that could read it there would trust
    them too much. They are zeros until `Run.with_svd` or you give others, and zeros for items without a training event.

    - Paper: PureSVD (Cremonesi, Koren, Turrin 2010, doi:10.1145/1864708.1864721); the decay is ours, as a whole history says
      less of what comes next.
    - Cost: real time [C, R] x [R], independent of L; a row holds R numbers.
    - When: other users' histories predict the next item, and candidates come from the whole catalogue.

    Attributes:
      width: R, numbers of a factor.
      length: how many of the last events count.
      decay: how fast older ones count less, by their place.
    """

    per_item = ("table",)
    width: int = 64
    length: int = 512
    decay: float = 0.7

    def __post_init__(self):
        expect(self.width >= 1, self, "width", "at least 1", self.width)
        expect(self.length >= 1, self, "length", "at least 1", self.length)
        expect(self.decay >= 0, self, "decay", "at least 0", self.decay)

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        return {"table": jnp.zeros((config.schema.table_sizes["item"], self.width), jnp.float32)}

    def user(self, params: Params, user: UserView) -> dict[str, jax.Array]:
        events = take(user.long, slice(self.length))
        mask, factors = jnp.asarray(events.mask), layers.lookup(params["table"], jnp.asarray(events.item))
        place = jnp.arange(1, mask.shape[0] + 1).astype(jnp.float32)  # counted in integers: an export's length is a symbol
        return {"sum": jnp.where(mask, place**-self.decay, 0.0) @ factors}

    def item(self, params: Params, item: ItemView) -> dict[str, jax.Array]:
        return {"factor": layers.lookup(params["table"], jnp.asarray(item.features.ids["item"]))}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        return HeadInputs(offset=jnp.asarray(rows.blocks[self.name]["factor"]) @ jnp.asarray(state.blocks[self.name]["sum"]))
