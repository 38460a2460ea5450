"""Sizes and blocks that the models of `question` share."""

from __future__ import annotations

import dataclasses
from typing import Any

from aif_jax.blocks import Bea, DotProduct, LinearMemory, Sim, SimTier

SIZES: dict[str, Any] = dict(width=32, short_length=32, long_length=128, towers=(64,), head=(64, 32))
SMOKE: dict[str, Any] = dict(width=8, short_length=8, long_length=32, towers=(16,), head=(16, 8))
BEA, SIM, DOT = Bea(bridges=10, dot_product=True), Sim("each"), DotProduct()
"""`SIM` stands for a cache of every SIM field of the data set."""
LEARNED = LinearMemory(dot_product=True)
WINDOWED = dataclasses.replace(SimTier(tiers=16, bits=128), length=512)
