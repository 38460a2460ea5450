"""Approximations of user x item features, one file each; a list of them is a model, see `aif_jax.config`."""

from aif_jax.blocks.bea import Bea
from aif_jax.blocks.block import Block, ItemView, UserView, block, with_table
from aif_jax.blocks.dot_product import DotProduct
from aif_jax.blocks.exact import CrossAttention, TargetAttention
from aif_jax.blocks.item_offset import ItemOffset, popularity_offset
from aif_jax.blocks.linear_memory import LinearMemory
from aif_jax.blocks.lsh_din import LshDin
from aif_jax.blocks.matching import MatchingStatistics
from aif_jax.blocks.position_bias import PositionBias
from aif_jax.blocks.pure_svd import PureSvd
from aif_jax.blocks.signatures import Signatures
from aif_jax.blocks.sim import Sim
from aif_jax.blocks.simtier import SimTier
from aif_jax.heads import HeadInputs

__all__ = [
    "Block", "block", "HeadInputs", "UserView", "ItemView", "Signatures",
    "MatchingStatistics",
    "Bea", "Sim", "SimTier", "LinearMemory", "LshDin", "DotProduct",
    "CrossAttention", "TargetAttention",
    "ItemOffset", "popularity_offset", "PureSvd", "with_table",
    "PositionBias",
]  # fmt: skip
