"""Named models: `aif` is the one that the study recommends, `paper` has the paper's blocks alone, the others are baselines.

Every preset takes a schema and changes to any field of `Config`.
"""

from __future__ import annotations

import logging
from typing import Any

from aif_jax import blocks
from aif_jax.config import Config
from aif_jax.schema import Schema

__all__ = ["aif", "streaming", "paper", "two_tower", "cold", "exact", "PRESETS"]

logger = logging.getLogger(__name__)
LONG_LENGTH = 512
TIERS = 16
BITS = 128


def aif(
    schema: Schema, *, sim_fields: tuple[str, ...] = ("category",), tier_length: int | None = LONG_LENGTH, **changes: Any
) -> Config:
    """The AIF model: the block list that the study recommends; README's figures are of this one.

    BEA, SIM, linear attention with softmax keys, exact SimTier over the last `tier_length` behaviours, and dot products added
    to the logit: with a longer `long_length` the cost in real time stays the same, with a longer `tier_length` it grows.
    Without content in the schema SimTier is left out, and the logger "aif_jax.presets" says so.

    Args:
      schema: the features.
      sim_fields: behaviour fields with a SIM cache.
      tier_length: behaviours that SimTier reads, from the most recent; None for all of `long_length`.
      changes: fields of `Config`.

    Example:
      >>> from aif_jax import Attribute, Schema
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)), content=8)
      >>> [block.name for block in aif(schema).blocks]
      ['bea', 'sim_category', 'linear_memory', 'sim_tier', 'dot_product']
    """
    tiers = _with_content(schema, "aif", blocks.SimTier(tiers=TIERS, bits=BITS, length=tier_length))
    short, long = blocks.Bea(dot_product=True), blocks.LinearMemory(dot_product=True)
    parts = (short, *map(blocks.Sim, sim_fields), long, *tiers, blocks.DotProduct())
    return _config(schema, changes, long_length=LONG_LENGTH, blocks=parts)


def streaming(
    schema: Schema, *, sim_fields: tuple[str, ...] = ("category",), tier_length: int = LONG_LENGTH, **changes: Any
) -> Config:
    """`aif` for users whose history is a stream: linear attention and SIM hold a whole life and are updated by every event.

    SimTier (`tier_length`), BEA and the user tower read the last events, which are kept. `model.update_user` and
    `aif_jax.user_table` serve it; given whole histories, it reads the first `long_length` events.
    """
    tiers = _with_content(schema, "streaming", blocks.SimTier(tiers=TIERS, bits=BITS, length=tier_length))
    short, long = blocks.Bea(dot_product=True), blocks.DecayedMemory(dot_product=True)
    parts = (short, *map(blocks.DecayedSim, sim_fields), long, *tiers, blocks.DotProduct())
    return _config(schema, changes, long_length=LONG_LENGTH, blocks=parts)


def paper(schema: Schema, *, sim_fields: tuple[str, ...] = ("category",), **changes: Any) -> Config:
    """The paper's blocks alone, at sizes in the range that its setting names: BEA, SIM, DIN on LSH, SimTier, L=4,096."""
    content = _with_content(schema, "paper", blocks.LshDin(), blocks.SimTier())
    sizes = dict(width=64, short_length=64, long_length=4096, towers=(256, 128), head=(128, 64))
    caches = (blocks.Sim(field, slots=32, length=16) for field in sim_fields)
    return _config(schema, changes, **sizes, blocks=(blocks.Bea(), *caches, *content))


def two_tower(schema: Schema, **changes: Any) -> Config:
    """The dot product of user and item vector, and nothing else in real time; it reads the short history alone."""
    short = changes.get("short_length", Config.short_length)
    return _config(schema, changes, head=(), long_length=short, blocks=(blocks.DotProduct(),))


def cold(schema: Schema, **changes: Any) -> Config:
    """COLD (arXiv 2007.16122) without its feature selection: one MLP over concatenated features, everything in real time."""
    return _config(schema, changes, towers=None, long_length=LONG_LENGTH, blocks=(blocks.Concatenation(),))


def exact(schema: Schema, *, sim_fields: tuple[str, ...] = ("category",), **changes: Any) -> Config:
    """The sequential ceiling: attention over both whole histories, tiers of float cosines, no approximation."""
    tiers = _with_content(schema, "exact", blocks.CosineTiers(tiers=TIERS))
    attention = (blocks.CrossAttention(dot_product=True), blocks.TargetAttention(dot_product=True))
    parts = (*attention, *map(blocks.Sim, sim_fields), *tiers, blocks.DotProduct())
    return _config(schema, changes, long_length=LONG_LENGTH, blocks=parts)


PRESETS = {"aif": aif, "streaming": streaming, "paper": paper, "two_tower": two_tower, "cold": cold, "exact": exact}
"""Presets by name, for command lines."""


def _config(schema: Schema, changes: dict[str, Any], **defaults: Any) -> Config:
    return Config(schema=schema, **(defaults | changes))


def _with_content(schema: Schema, preset: str, *parts: Any) -> tuple[Any, ...]:
    """The blocks, or none where the schema has no content to fit them on."""
    if schema.content:
        return parts
    names = ", ".join(type(part).__name__ for part in parts)
    logger.warning("presets.%s: the schema has no content embedding, so the model goes without %s", preset, names)
    return ()
