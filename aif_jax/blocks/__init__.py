"""Approximations of user x item features, one file each; a list of them is a model, see `aif_jax.config`.

| block | approximates | in real time |
|---|---|---|
| `MatchingStatistics` | nothing: counts of the user's events with the candidate's values | a binary search for each field |
| `Bea` | cross-attention over the short history | [C, M] x [M, H] |
| `Sim` | SIM, hard search by a field | a softmax over P cached events |
| `SimTier` | tier histograms of cosine similarities, by signatures | C x L comparisons of bits |
| `SimTierCodes` | the same by a codebook | a gather |
| `LinearMemory` | target attention over the long history, with trained keys | [C, K] x [K, H] |
| `DecayedMemory`, `DecayedSim` | `LinearMemory` and `Sim` over a whole life: every event updates them | the same |
| `LshDin` | DIN with similarities of signatures | [C, K] x [K, H] |
| `DotProduct` | nothing: the two-tower's term | [C, D] x [D] |
| `CrossAttention`, `TargetAttention`, `CosineTiers` | nothing: what the others approximate | C x L x D |
| `Concatenation` | nothing: COLD's input | [C, F] x [F, H] |
| `PureSvd` | co-engagement by the factors of a singular value decomposition | [C, R] x [R] |
| `ItemOffset` | nothing: a constant of each item | a gather |
"""

from aif_jax.blocks.bea import Bea
from aif_jax.blocks.block import Block, EventView, Fitted, HeadInputs, ItemView, UserView, block
from aif_jax.blocks.concatenation import Concatenation
from aif_jax.blocks.decayed_memory import DecayedMemory
from aif_jax.blocks.decayed_sim import DecayedSim
from aif_jax.blocks.dot_product import DotProduct
from aif_jax.blocks.exact import CosineTiers, CrossAttention, TargetAttention
from aif_jax.blocks.item_offset import ItemOffset, popularity_offset, with_item_offset
from aif_jax.blocks.linear_memory import LinearMemory
from aif_jax.blocks.lsh_din import LshDin
from aif_jax.blocks.matching import MatchingStatistics
from aif_jax.blocks.pure_svd import PureSvd, with_pure_svd
from aif_jax.blocks.signatures import Signatures
from aif_jax.blocks.sim import Sim
from aif_jax.blocks.simtier import SimTier
from aif_jax.blocks.simtier_codes import SimTierCodes

__all__ = [
    "Block", "block", "HeadInputs", "UserView", "EventView", "ItemView", "Fitted", "Signatures",
    "MatchingStatistics",
    "Bea", "Sim", "SimTier", "SimTierCodes", "LinearMemory", "LshDin", "DotProduct", "DecayedMemory", "DecayedSim",
    "CrossAttention", "TargetAttention", "CosineTiers", "Concatenation",
    "ItemOffset", "popularity_offset", "with_item_offset", "PureSvd", "with_pure_svd",
]  # fmt: skip
