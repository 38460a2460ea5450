"""Pre-ranking with AIF (arXiv 2511.12934) in JAX: user, item and interaction as three pure functions.

Public names stand in the order in which a request meets them.
"""

from aif_jax import lsh
from aif_jax.config import Config, demo_schema, paper, tiny
from aif_jax.data.schema import Attribute, Schema, Vocabulary
from aif_jax.data.validate import check_item_features, check_user_features
from aif_jax.model import Component, PreRanker, assemble, build
from aif_jax.types import Behaviours, ItemFeatures, ItemRow, UserFeatures, UserState

__version__ = "0.1.0"

__all__ = [
    "Attribute", "Schema", "Vocabulary", "check_user_features", "check_item_features",
    "Config", "tiny", "paper", "demo_schema",
    "Behaviours", "UserFeatures", "ItemFeatures", "UserState", "ItemRow",
    "lsh", "Component", "PreRanker", "assemble", "build",
]  # fmt: skip
