"""Pre-ranking with AIF (arXiv 2511.12934) in JAX: user, item and interaction as three pure functions.

Public names are in the order in which a request meets them.
"""

from aif_jax import blocks, presets
from aif_jax.catalogue import Catalogue
from aif_jax.config import Config
from aif_jax.features import check_item_features, check_user_features, empty_items, empty_user
from aif_jax.model import Component, PreRanker, assemble, build, fit_tables
from aif_jax.schema import Attribute, Schema
from aif_jax.types import Behaviours, ItemFeatures, ItemRow, UserFeatures, UserState

__version__ = "0.1.0"
