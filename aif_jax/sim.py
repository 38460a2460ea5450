"""SIM with pre-caching, both halves side by side.

Hard-search SIM (arXiv 2006.05639) attends over the user's behaviours in the candidate's category: a cross feature that is not
known before the candidates are. The user's own categories are: the user side caches, for the Q values of a field with the most
behaviours, the last P of them. In real time the candidate's value picks the slot, and a softmax runs over its P entries:

    o = softmax(q E_slot^T / sqrt D) E_slot

The key map is folded into the item's query and the value map into the head's first layer: both are linear, so this loses
nothing and halves the cache. Pre-caching is AIF's (arXiv 2511.12934); the rule for choosing slots is ours.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from aif_jax.layers import masked_softmax
from aif_jax.types import SimCache

FLAGS = 3
"""Slot features next to the attention: missing, log1p(count), log1p(age in days)."""


def user_half(value: jax.Array, embedded: jax.Array, age: jax.Array, mask: jax.Array, *, slots: int, length: int) -> SimCache:
    """Caches the last `length` behaviours of each of the `slots` most frequent values.

    Equal counts are ordered by the more recent last behaviour. Value 0 (unknown) has no slot.

    Args:
      value: int32 [L], most recent first.
      embedded: float32 [L, D] behaviour embeddings.
      age: float32 [L] seconds.
      mask: bool [L].
      slots: Q.
      length: P.
    """
    order, group, rank, counts = _group(value, mask & (value > 0))
    total = value.shape[0]
    best = _most_frequent(rank, counts, min(slots, total))
    start, filled, count = best
    within = jnp.arange(length)
    at = order[jnp.minimum(start[:, None] + within, total - 1)]
    kept = (within < count[:, None]) & filled[:, None]
    cache = SimCache(
        value=jnp.where(filled, group[start], -1),
        entries=jnp.where(kept[..., None], embedded[at], 0.0),
        mask=kept,
        count=jnp.where(filled, count, 0),
        age=jnp.where(filled, age[order[start]], 0.0),
    )
    short = slots - cache.value.shape[0]
    if short > 0:  # a history shorter than Q cannot fill Q slots
        pad = lambda x, fill: jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)  # noqa: E731
        cache = SimCache(
            value=pad(cache.value, -1), entries=pad(cache.entries, 0), mask=pad(cache.mask, False),
            count=pad(cache.count, 0), age=pad(cache.age, 0),
        )  # fmt: skip
    return cache


def lookup(cache: SimCache, query: jax.Array, value: jax.Array, project: jax.Array) -> jax.Array:
    """Attention of every candidate over its own slot, times the head's kernel; zeros for a value without a slot.

    No [C, P, D] array is made: all Q * P entries are scored in one product, other slots are masked, and the entries enter
    already multiplied by `project`.

    Args:
      cache: of one user.
      query: float32 [C, D].
      value: int32 [C] the candidates' values of the field.
      project: float32 [D, H].

    Returns:
      float32 [C, H].
    """
    slots, length, width = cache.entries.shape
    entries = cache.entries.reshape(slots * length, width)
    own = jnp.repeat(value[:, None] == cache.value[None, :], length, axis=1, total_repeat_length=slots * length)
    weights = masked_softmax(query @ entries.T / math.sqrt(width), own & cache.mask.reshape(-1)[None, :])
    return weights @ (entries @ project)


def flags(cache: SimCache, value: jax.Array) -> jax.Array:
    """Slot features of every candidate: [C, FLAGS] = missing, log1p(count), log1p(age in days)."""
    own = (value[:, None] == cache.value[None, :]).astype(jnp.float32)
    features = jnp.stack(
        [
            -jnp.ones_like(cache.age),
            jnp.log1p(cache.count.astype(jnp.float32)),
            jnp.log1p(jnp.maximum(cache.age, 0.0) / 86400.0),
        ],
        -1,
    )
    return own @ features + jnp.array([[1.0, 0.0, 0.0]])


def _group(value: jax.Array, mask: jax.Array):
    """Sorts by (value, recency). Returns order [L], sorted value [L], rank in its run [L], run lengths at run starts [L]."""
    total = value.shape[0]
    masked_last = jnp.where(mask, value, jnp.iinfo(jnp.int32).max)
    group, order = jax.lax.sort((masked_last, jnp.arange(total, dtype=jnp.int32)), num_keys=2)
    place = jnp.arange(total, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones(1, bool), group[1:] != group[:-1]])
    begin = jax.lax.cummax(jnp.where(starts, place, 0))
    nexts = jnp.concatenate([jnp.where(starts, place, total)[1:], jnp.full(1, total, jnp.int32)])
    end = jax.lax.cummin(nexts, reverse=True)
    counts = jnp.where(starts & (group != jnp.iinfo(jnp.int32).max), end - begin, 0)
    return order, group, jnp.where(starts, order, total), counts


def _most_frequent(recency: jax.Array, counts: jax.Array, slots: int):
    """Run starts of the most frequent values, ties by recency: start [Q], filled [Q], count [Q]."""
    total = counts.shape[0]
    negative, _, start = jax.lax.sort((-counts, recency, jnp.arange(total, dtype=jnp.int32)), num_keys=2)
    count = -negative[:slots]
    return start[:slots], count > 0, count
