"""Content similarity in another form than SimTier's: a block of the study alone."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import HeadInputs, block
from aif_jax.blocks.simtier import SimTier, log_counts
from aif_jax.blocks.tier_histogram import by_bits, histogram
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
