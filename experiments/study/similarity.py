"""Content similarity in other forms than SimTier's, to learn what its gain is made of: blocks of the study alone.

`UpperTiers` has tiers where similarities are. The others give the head log1p of sum_j n_j exp((cos(c, x_j) - 1) / t) for
several temperatures t, and the mean cosine. `KernelSums` takes the sums over the behaviours x_j themselves (n_j = 1),
`Prototypes` over a few centroids of the user's own history with their counts n_j, made in the user half, so that real time does
not grow with the history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, HeadInputs, UserView, block
from aif_jax.blocks.exact import UnitContent
from aif_jax.blocks.simtier import SimTier, log_counts
from aif_jax.blocks.tier_histogram import by_bits, histogram
from aif_jax.config import Config
from aif_jax.types import ItemRow, Params, UserState


@block
class UpperTiers(SimTier):
    """SimTier whose T tiers are equal parts of [.5, 1]; the lowest one holds everything below as well.

    Unrelated content differs in half of its bits, so the lower half of SimTier's tiers is all but empty. With T = 8 the counts
    of a candidate fit one word in place of two.
    """

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        kernel, signature = kernels["tiers"], jnp.asarray(rows.fitted[self.tables[0].name])
        counts = histogram(signature, state.blocks[self.name], tiers=self.tiers, groups=1, rule=upper_half)
        return HeadInputs(pairs=((log_counts(counts).astype(kernel.dtype), kernel),))


def upper_half(candidates: jax.Array, signature: jax.Array, tiers: int) -> jax.Array:
    """Tier of [.5, 1] by differing bits: uint32 [C, W], [n, W] -> uint32 [n, C]."""
    return jnp.maximum(by_bits(candidates, signature, 2 * tiers), tiers) - tiers


TEMPERATURES = (0.3, 0.1, 0.05, 0.02)
ROUNDS = 4  # of k-means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(Block):
    """What both blocks share: points [n, E] of unit length with weights [n] in the state, sums at score time.

    Attributes:
      learned: whether the temperatures are trained.
    """

    learned: bool = False

    @property
    def tables(self) -> tuple[UnitContent, ...]:
        return (UnitContent(),)

    def widths(self, config: Config) -> dict[str, int]:
        return {"sums": len(TEMPERATURES) + 1}

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"log_temperature": jnp.log(jnp.array(TEMPERATURES))} if self.learned else {}

    def points(self, content: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Points and weights of behaviours [L, E] under a mask [L]."""
        return content, mask.astype(content.dtype)

    def user(self, params: Params, user: UserView) -> dict[str, jax.Array]:
        points, weights = self.points(user.values(self.tables[0], user.long), jnp.asarray(user.long.mask))
        temperature = jnp.exp(params["log_temperature"]) if self.learned else jnp.array(TEMPERATURES)
        return {"points": points, "weights": weights, "temperature": temperature}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        own, kernel = state.blocks[self.name], kernels["sums"]
        content, weights = jnp.asarray(rows.fitted[self.tables[0].name]), jnp.asarray(own["weights"])
        cosine = content @ jnp.asarray(own["points"]).T
        temperature = jnp.asarray(own["temperature"])
        sums = jnp.stack([jnp.exp((cosine - 1) / temperature[i]) @ weights for i in range(len(TEMPERATURES))], -1)
        mean = (cosine @ weights) / jnp.maximum(weights.sum(), 1)
        return HeadInputs(rest=jnp.concatenate([jnp.log1p(sums), mean[:, None]], -1).astype(kernel.dtype) @ kernel)


@block
class KernelSums(Sums):
    """Sums over the long history itself."""


@block
class Prototypes(Sums):
    """Sums over centroids of the long history: spherical k-means that begins with events spread evenly over it.

    Attributes:
      count: P, centroids.
    """

    count: int = 64

    def points(self, content: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        events = jnp.maximum(mask.sum(), 1)
        first = jnp.arange(self.count) * jnp.maximum(events, self.count) // self.count  # the events are the first places
        centroids = jnp.where((first < events)[:, None], content[first], 0)
        member = jnp.zeros((content.shape[0], self.count), content.dtype)
        for _ in range(ROUNDS):
            nearest = jnp.argmax(jnp.where(centroids.any(1), content @ centroids.T, -jnp.inf), -1)
            member = jax.nn.one_hot(nearest, self.count, dtype=content.dtype) * mask.astype(content.dtype)[:, None]
            sums = member.T @ content
            centroids = sums / jnp.maximum(jnp.linalg.norm(sums, axis=-1, keepdims=True), 1e-6)
        return centroids, member.sum(0)
