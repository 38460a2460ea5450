"""Named models: `aif` is the one that the study recommends, `paper` has the paper's blocks alone, the others are baselines.

Every preset takes a schema and changes to any field of `Config`.
"""

import logging
from typing import Any

from aif_jax import blocks
from aif_jax.config import Config
from aif_jax.heads import LogitSum, Mlp
from aif_jax.schema import Schema

__all__ = ["aif", "paper", "two_tower", "two_tower_matching", "full_attention", "PRESETS"]

logger = logging.getLogger(__name__)
LONG_LENGTH = 512


def aif(schema: Schema, **changes: Any) -> Config:
    """Return the AIF model: the block list that the study recommends; README's figures are of this one.

    Matching statistics of every behaviour field over the long history, BEA over the short one, linear attention with softmax
    keys over the long one, and dot products added to the logit. In real time only the matching statistics grow with
    `long_length`: by their binary searches and, up to L = C, by products with the head's kernel. SIM and SimTier are left
    out: next to matching statistics SIM added little, SimTier lost quality on Taobao, and both cost most (docs/results.md).

    Args:
      schema: the features.
      changes: fields of `Config`.

    Example:
      >>> from aif_jax import Attribute, Schema
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
      >>> [block.name for block in aif(schema).blocks]
      ['matching_statistics', 'bea', 'linear_memory', 'dot_product']
    """
    short, long = blocks.Bea(dot_product=True), blocks.LinearMemory(dot_product=True)
    return _config(schema, changes, long_length=LONG_LENGTH, blocks=(_matching(schema), short, long, blocks.DotProduct()))


def paper(schema: Schema, **changes: Any) -> Config:
    """Return the paper's blocks alone, at sizes in the range that its setting names: BEA, SIM, DIN on LSH, SimTier, L=4,096."""
    content = (blocks.LshDin(), blocks.SimTier()) if schema.content else ()
    if not content:
        logger.warning("presets.paper: the schema has no content embedding, so the model goes without LshDin, SimTier")
    sizes = dict(width=64, short_length=64, long_length=4096, towers=(256, 128), head=Mlp((128, 64)))
    return _config(schema, changes, **sizes, blocks=(blocks.Bea(), blocks.Sim(slots=32, length=16), *content))


def two_tower(schema: Schema, **changes: Any) -> Config:
    """Return the dot product of user and item vector, and nothing else in real time; it reads the short history alone."""
    short = changes.get("short_length", Config.short_length)
    return _config(schema, changes, head=LogitSum(), long_length=short, blocks=(blocks.DotProduct(),))


def two_tower_matching(schema: Schema, **changes: Any) -> Config:
    """Return a two-tower model with matching statistics and a head: what a good team builds in a week, the baseline to beat."""
    return _config(schema, changes, long_length=LONG_LENGTH, blocks=(_matching(schema), blocks.DotProduct()))


def full_attention(schema: Schema, **changes: Any) -> Config:
    """Return attention over both whole histories, and matching statistics: the expensive model to compare with."""
    attention = (blocks.CrossAttention(dot_product=True), blocks.TargetAttention(dot_product=True))
    return _config(schema, changes, long_length=LONG_LENGTH, blocks=(_matching(schema), *attention, blocks.DotProduct()))


PRESETS = {each.__name__: each for each in (aif, paper, two_tower, two_tower_matching, full_attention)}
"""Presets by name, for command lines."""


def _matching(schema: Schema) -> blocks.MatchingStatistics:
    return blocks.MatchingStatistics(schema.behaviour_fields)


def _config(schema: Schema, changes: dict[str, Any], **defaults: Any) -> Config:
    return Config(schema=schema, **(defaults | changes))
