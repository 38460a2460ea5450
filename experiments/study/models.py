"""Sizes, blocks and training recipe that the models of `question` share."""

from __future__ import annotations

import dataclasses
from typing import Any

from aif_jax import heads
from aif_jax.blocks import Bea, DotProduct, LinearMemory, Sim, SimTier
from aif_jax.train import losses

SIZES: dict[str, Any] = dict(width=32, short_length=32, long_length=128, towers=(64,), head=heads.Mlp((64, 32)))
SMOKE: dict[str, Any] = dict(width=8, short_length=8, long_length=32, towers=(16,), head=heads.Mlp((16, 8)))
BEA, SIM, DOT = Bea(bridges=10, dot_product=True), Sim("each"), DotProduct()
"""`SIM` stands for a cache of every SIM field of the data set."""
LEARNED = LinearMemory(dot_product=True)
WINDOWED = dataclasses.replace(SimTier(tiers=16, bits=128), length=512)
LOSS = losses.listwise_softmax + losses.pointwise_bce
"""A softmax over a list says nothing about the level of the list's scores, which GAUC, pooling all requests of a user, and
log-loss depend on; the pointwise part fixes it."""


def shorter(longest: int) -> tuple[int, ...]:
    """Lengths of histories below the longest one that batches may have: each is half of the next."""
    return tuple(longest >> n for n in (4, 3, 2, 1) if longest >> n >= 64)
