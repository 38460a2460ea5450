"""Every type that crosses a boundary between components, each field with its shape; the letters are in docs/glossary.md.

User and item types describe ONE user and ONE item; callers add leading axes with `jax.vmap`. Ids are int32 indices into a
vocabulary of the `Schema`; index 0 is "unknown or padding" everywhere.
"""

from typing import Any, TypeAlias, dataclass_transform

import jax
import numpy as np
from flax import struct

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = dict[str, Any]
"""Nested dict of arrays: `embedding`, `user`, `item`, `blocks`, `head`, and `fitted`, which is never trained."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(struct.field,))
def record(cls):
    """Make a class a frozen dataclass of keyword arguments that is a JAX pytree, see `flax.struct`."""
    return struct.dataclass(cls, kw_only=True)


@record
class Behaviours:
    """Events of one user, most recent first: position 0 is the latest event, padding follows the last one.

    What the catalogue knows of an event's item (category, signature) does not travel with it: it is looked up by item id.

    Attributes:
      item: int32 [L] index of the item in the vocabulary; 0 is unknown.
      action: int32 [L] behaviour type or rating bucket; 0 is unknown.
      age: float32 [L] seconds from the event to the request, at least 0.
      mask: bool [L] true where there is an event.
    """

    item: Array
    action: Array
    age: Array
    mask: Array


@record
class UserFeatures:
    """Features of ONE user when the request arrives; callers batch with `jax.vmap`. The layout depends on the schema alone.

    Made by an `Encoder` from raw data, in training by `Dataset.user_features`; `check_user_features` checks your own. A model
    reads the first `short_length` and the first `long_length` places of the history.

    Attributes:
      ids: int32 [] for each user attribute of the schema; int32 [n] for a multi-valued one.
      floats: float32 [schema.user_floats].
      history: `Behaviours`.
      encoding: version of the encoder that made the features; "" if unknown.
    """

    ids: dict[str, Array]
    floats: Array
    history: Behaviours
    encoding: str = struct.field(pytree_node=False, default="")


@record
class ItemFeatures:
    """Features of ONE item; a catalogue has a leading axis [N], candidates [C].

    Attributes:
      ids: int32 [] for each item attribute of the schema, "item" among them; int32 [n] for a multi-valued one.
      floats: float32 [schema.item_floats].
      content: float32 [E]; None without content, and in training unless the item tower reads it.
      side: float32 [] by name, carried into the index and not read by the model: a bid, a price.
      encoding: version of the encoder that made the features; "" if unknown.
    """

    ids: dict[str, Array]
    floats: Array
    content: Array | None = None
    side: dict[str, Array] = struct.field(default_factory=dict)
    encoding: str = struct.field(pytree_node=False, default="")


@record
class UserState:
    """Output of `PreRanker.user`: everything that the interaction reads of a user, computed off the critical path.

    Attributes:
      vector: float32 [D].
      blocks: what `Block.user` returned, by name of the block.
    """

    vector: Array
    blocks: dict[str, Any]


@record
class ItemRow:
    """Output of `PreRanker.item`: everything that the interaction reads of an item; one row of the item index.

    Attributes:
      vector: float32 [D].
      fitted: the item's value in each fitted table, such as its signature uint32 [W].
      blocks: what `Block.item` returned, by name of the block.
      side: float32 [] by name, from `ItemFeatures.side`.
    """

    vector: Array
    fitted: dict[str, Array]
    blocks: dict[str, Any]
    side: dict[str, Array]
