"""A block of your own, in one file: what a user of the package writes to add an approximation.

The long history as means under exponential decays whose rates are trained, and how unusual an item is for its category. It has
every part that a block can have: a fit, trained parameters, both halves, inputs of the head and a term of the logit.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.blocks import Block, HeadInputs, ItemView, UserView, block
from aif_jax.types import ItemRow, Params, UserState

DAY = 86400.0


@block
class Decay(Block):
    """Decayed means of the long history.

    Attributes:
      rates: how many decays.

    Raises:
      ValueError: fewer than one decay; a schema without content.
    """

    revision = 2
    per_item = ("unusual",)
    rates: int = 2

    def __post_init__(self):
        if self.rates < 1:
            raise ValueError(f"Decay.rates: expected at least 1, got {self.rates}")

    def check(self, config: aif.Config) -> None:
        if not config.schema.content:
            raise ValueError("Decay: expected schema.content > 0, got 0")

    def widths(self, config: aif.Config) -> dict[str, int]:
        return {"recent": self.rates * config.width, "unusual": 1}

    def fit(self, items: aif.ItemFeatures, config: aif.Config, *, seed: int) -> Params:
        """`unusual` float32 [N]: distance of an item's content from the mean of its category."""
        content, category = np.asarray(items.content), np.asarray(items.ids["category"])
        means = np.stack(
            [content[category == c].mean(0) if np.any(category == c) else content[0] for c in range(category.max() + 1)]
        )
        return {"unusual": jnp.asarray(np.linalg.norm(content - means[category], axis=1), jnp.float32)}

    def init(self, key: jax.Array, config: aif.Config) -> Params:
        return {"rate": jax.random.normal(key, (self.rates,)), "gate": jnp.zeros(self.rates)}

    def user(self, params: Params, user: UserView) -> jax.Array:
        """float32 [rates, D]; zeros for an empty history."""
        past = user.long
        days = jnp.where(past.mask, jnp.asarray(past.age), 0.0) / DAY
        weights = jnp.where(past.mask, jnp.exp(-jax.nn.softplus(params["rate"])[:, None] * days[None, :]), 0.0)
        return (weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)).astype(user.embedded.dtype) @ user.embedded

    def item(self, params: Params, item: ItemView) -> dict[str, jax.Array]:
        row = jnp.asarray(item.features.ids["item"])
        known = (row > 0) & (row < params["unusual"].shape[0])
        return {"unusual": params["unusual"].at[jnp.where(known, row, 0)].get(mode="promise_in_bounds")}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        means, row = jnp.asarray(state.blocks[self.name]), rows.blocks[self.name]
        logit = (jnp.asarray(rows.vector) @ means.T) @ params["gate"].astype(means.dtype)
        unusual = jnp.asarray(row["unusual"])[:, None]
        return HeadInputs(once=means.ravel() @ kernels["recent"], pairs=((unusual, kernels["unusual"]),), logit=logit)
