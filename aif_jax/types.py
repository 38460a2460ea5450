"""Every type that crosses a boundary between components, each field with its shape.

Shape letters, the same everywhere:

| letter | meaning | letter | meaning |
|---|---|---|---|
| B | requests in a batch | W | uint32 words of a signature, K / 32 |
| C | candidates of one request | M | bridge embeddings |
| N | catalogue rows | T | similarity tiers |
| S | short history | Q | cached values of a field (categories) |
| L | long history | P | behaviours cached per value |
| D | width | R | bridge codes |
| K | signature bits | E | content embedding |

User and item types describe ONE user and ONE item; callers add leading axes with `jax.vmap`. Ids are int32 positions in a
vocabulary of the `Schema`; id 0 is "unknown or padding" everywhere. A block that its config switches off leaves `None`
(or an empty dict) in its place, so that nothing is computed, stored or sent for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, dataclass_transform

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = dict[str, Any]
"""Nested dict of arrays: `embedding`, `user`, `item`, `bridge`, `interaction`, and `frozen` (signature matrix, codes), which
is never trained."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def record(cls):
    """A frozen dataclass that is a JAX pytree (all fields are data)."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@record
class Behaviours:
    """Events of one user, most recent first: position 0 is the latest event, padding stands at the end."""

    ids: dict[str, Array]  # int32 [S] each: "item", "category" and the schema's other behaviour fields
    action: Array  # int32 [S] behaviour type or rating bucket, 0 unknown
    age: Array  # float32 [S] seconds from the event to the request, >= 0
    mask: Array  # bool [S] true where there is an event
    signature: Array | None = None  # uint32 [S, W] content signature of the item


@record
class UserFeatures:
    """What is known of one user when the request arrives."""

    ids: dict[str, Array]  # int32 [] each (or [n] for a multi-valued attribute)
    floats: Array  # float32 [schema.user_floats]
    short: Behaviours  # [S]
    long: Behaviours  # [L]


@record
class ItemFeatures:
    """What is known of one item of the catalogue."""

    ids: dict[str, Array]  # int32 [] each (or [n] for a multi-valued attribute): "item", "category", ...
    floats: Array  # float32 [schema.item_floats]
    content: Array | None = None  # float32 [E]
    signature: Array | None = None  # uint32 [W]; computed from `content` where it is None
    side: dict[str, Array] = dataclasses.field(default_factory=dict)  # float32 [] each, carried along: "bid", ...


@record
class Memory:
    """A long history folded by linearity: its cost in real time does not depend on L."""

    moments: Array  # float32 [K, D]  sum_j m_j key_j value_j^T
    total: Array  # float32 [D]     sum_j m_j value_j
    count: Array  # float32 []      sum_j m_j


@record
class UnfoldedMemory:
    """The same history left as it is: cheaper than `Memory` when a user has few candidates, as in pointwise training."""

    keys: Array  # uint32 [L, W] signatures, or float32 [L, K] learned keys
    values: Array  # float32 [L, D]
    mask: Array  # bool [L]


@record
class SimCache:
    """SIM pre-cache of one item field: the user's last P behaviours for each of Q values of that field."""

    value: Array  # int32 [Q] the field's value (category id), -1 where the slot is empty
    entries: Array  # float32 [Q, P, D] behaviour embeddings; attention's key and value maps live in query and head
    mask: Array  # bool [Q, P]
    count: Array  # int32 [Q] behaviours of this value in the whole long history, not only the P kept
    age: Array  # float32 [Q] seconds since the last of them


@record
class TierHistory:
    """What exact SimTier compares a candidate with."""

    signature: Array  # uint32 [L, W]
    group: Array  # int32 [L] which histogram the behaviour counts in (its action, or 0)
    mask: Array  # bool [L]


@record
class UserState:
    """Everything the interaction needs of a user; made by the user function off the critical path."""

    vector: Array  # float32 [D]
    bridge: Array | None  # float32 [M, D]
    memory: dict[str, Memory | UnfoldedMemory]  # by kind: "lsh", "learned"
    tiers: TierHistory | Array | None  # exact: TierHistory; by codes: float32 [R, G * T] log1p histograms
    sim: dict[str, SimCache]  # by item field


@record
class ItemRow:
    """Everything the interaction needs of an item; one row of the index table."""

    vector: Array  # float32 [D]
    query: Array | None  # float32 [D] SIM attention query
    bridge: Array | None  # float32 [M] softmax weights over the bridges
    signature: Array | None  # uint32 [W]
    memory_query: Array | None  # float32 [K] learned long-memory query
    codes: Array | None  # int32 [J] nearest bridge codes
    code_weights: Array | None  # float32 [J], sum to 1
    sim: dict[str, Array]  # int32 [] each: the item's value of every SIM field
    side: dict[str, Array]  # float32 [] each: bid, ...
