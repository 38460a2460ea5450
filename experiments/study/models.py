"""Sizes, blocks and training recipe that the models of `question` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from aif_jax.blocks import Bea, DotProduct, LinearMemory, Sim, SimTier
from aif_jax.blocks.block import HeadInputs, block
from aif_jax.blocks.simtier import log_counts
from aif_jax.blocks.tier_histogram import by_bits, histogram
from aif_jax.train import losses
from aif_jax.types import ItemRow, Params, UserState

SIZES: dict[str, Any] = dict(width=32, short_length=32, long_length=128, towers=(64,), head=(64, 32))
SMOKE: dict[str, Any] = dict(width=8, short_length=8, long_length=32, towers=(16,), head=(16, 8))
BEA, SIM, DOT = Bea(bridges=10, dot_product=True), Sim("each"), DotProduct()
"""`SIM` stands for a cache of every SIM field of the data set."""
LEARNED = LinearMemory(dot_product=True)
WINDOWED = dataclasses.replace(SimTier(tiers=16, bits=128), length=512)
RECIPE = "listwise + pointwise"
LOSS = losses.listwise_softmax + losses.pointwise_bce
"""A softmax over a list says nothing about the level of the list's scores, which GAUC, pooling all requests of a user, and
log-loss depend on; the pointwise part fixes it."""


def shorter(longest: int) -> tuple[int, ...]:
    """Lengths of histories below the longest one that batches may have: each is half of the next."""
    return tuple(longest >> n for n in (4, 3, 2, 1) if longest >> n >= 64)


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
