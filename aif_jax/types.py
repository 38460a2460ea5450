"""Every type that crosses a boundary between components, each field with its shape.

Shape letters, the same everywhere:

| letter | meaning | letter | meaning |
|---|---|---|---|
| B | requests in a batch | W | uint32 words of a signature, K / 32 |
| C | candidates of one request | M | bridge embeddings |
| N | rows of the item vocabulary | T | objectives; tiers in SimTier |
| S | short history | Q | cached values of a field (categories) |
| L | long history | P | behaviours cached per value |
| D | width | R | codes of a codebook |
| K | signature bits, keys of linear attention | E | content embedding |
| H | first hidden layer of the head | G | histograms of a candidate |

User and item types describe ONE user and ONE item; callers add leading axes with `jax.vmap`. Ids are int32 rows of a vocabulary
of the `Schema`; row 0 is "unknown or padding" everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, dataclass_transform

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = dict[str, Any]
"""Nested dict of arrays: `embedding`, `user`, `item`, `blocks`, `head`, and `fitted`, which is never trained."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def record(cls):
    """A frozen dataclass that is a JAX pytree; fields made by `static` belong to the tree's structure."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(made)
    return jax.tree_util.register_dataclass(
        made,
        data_fields=[field.name for field in fields if not field.metadata.get("static")],
        meta_fields=[field.name for field in fields if field.metadata.get("static")],
    )


def static(default: Any) -> Any:
    """A field of a `record` that is compared and hashed with the tree's structure and is no leaf."""
    return dataclasses.field(default=default, metadata={"static": True})


@record
class Behaviours:
    """Events of one user, most recent first: position 0 is the latest event, padding follows the last one.

    What the catalogue knows of an event's item (category, signature) does not travel with it: it is looked up by item id.
    """

    item: Array  # int32 [L] row of the item
    action: Array  # int32 [L] behaviour type or rating bucket, 0 unknown
    age: Array  # float32 [L] seconds from the event to the request, >= 0
    mask: Array  # bool [L] true where there is an event


@record
class Events:
    """Events of one user in a stream: any order, time 0 where there is none."""

    item: Array  # int32 [E] row of the item
    action: Array  # int32 [E]
    time: Array  # uint32 [E] from `times.stamps`


@record
class Kept:
    """Events that are kept of one user, eight bytes each: the most recent first, time 0 where there is none."""

    code: Array  # uint32 [R] item and action in one number, see `stream.pack`
    time: Array  # uint32 [R]


@record
class UserMemory:
    """A user's whole history in bounded memory, nearline: every event updates it, nothing is computed again.

    Made by `model.new_user` and `model.update_user` with the parameters of one model version.
    """

    recent: Kept  # [R] the last events
    count: Array  # int32 [] events so far
    blocks: dict[str, Any]  # by block: what its `update` returned


@record
class Streamed:
    """A history as the state of a stream, in the place of `Behaviours` in `UserFeatures`."""

    memory: Any  # UserMemory, or `Packed` as a `UserTable` stores it
    since: Events  # [E] events that the memory does not hold yet
    now: Array  # uint32 [] time of the request, from `times.stamps`
    version: str = static("")  # of the model that made the memory, "" where none is known


@record
class UserFeatures:
    """What is known of one user when the request arrives. The layout depends on the schema alone, see `features.py`.

    A model reads the first `short_length` and the first `long_length` places of a history that comes as `Behaviours` [L]; a
    `Streamed` one holds the user's whole life.
    """

    ids: dict[str, Array]  # int32 [] each (or [n] for a multi-valued attribute)
    floats: Array  # float32 [schema.user_floats]
    history: Any  # Behaviours or Streamed
    encoding: str = static("")  # version of the encoder that made them, "" where none is known


@record
class ItemFeatures:
    """What is known of one item of the catalogue."""

    ids: dict[str, Array]  # int32 [] each (or [n] for a multi-valued attribute): "item", "category", ...
    floats: Array  # float32 [schema.item_floats]
    content: Array | None = None  # float32 [E]; None without content, or where training leaves out what no tower reads
    side: dict[str, Array] = dataclasses.field(default_factory=dict)  # float32 [] each, carried along: "bid", ...
    encoding: str = static("")  # version of the encoder that made them, "" where none is known


@record
class UserState:
    """Everything the interaction needs of a user; the user function computes it off the critical path."""

    vector: Array  # float32 [D], [0] without towers
    blocks: dict[str, Any]  # by block: what its `user` returned


@record
class ItemRow:
    """Everything the interaction needs of an item; one row of the index table."""

    vector: Array  # float32 [D], [0] without towers
    fitted: dict[str, Array]  # by fitted table: the item's value, such as its signature uint32 [W]
    blocks: dict[str, Any]  # by block: what its `item` returned
    side: dict[str, Array]  # float32 [] each: bid, ...
