"""Loss and gradient of a batch, taken whole or in parts that stay in the cache.

On a CPU the time of a large batch is that of writing arrays such as [B, L, D] to memory, so it is taken in parts. A
`losses.Loss` (or `Goals`) adds up over the parts: each is scored once. Any other loss must see all scores first: the parts are
scored a second time for the gradient. Either way the result is that of the whole batch, up to the order of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from aif_jax.data.pipeline import Batch
from aif_jax.train.goals import Goals
from aif_jax.train.losses import Loss
from aif_jax.types import Array

PART_EVENTS = 10_000
"""Candidates and behaviours of a part of a batch: with D = 32 its arrays fill the level-2 cache of a core."""
PART_BYTES = 1 << 26
"""Bytes of embedding rows that all parts of a batch together may add gradients to: each part writes all of the batch's rows."""

LossFn: TypeAlias = Loss | Goals | Callable[..., jax.Array]
"""A `losses.Loss`, `Goals` for several labels, or any `loss(scores [B, C], labels, *, where) -> []`; it gets `log_q` too where
the batch has it."""
ScoresFn: TypeAlias = Callable[[Any, Batch], jax.Array]
"""(params, batch) -> scores [B, C]."""


def part_size(samples: int, events: int, row_bytes: int = 0) -> int | None:
    """Samples of a part with about PART_EVENTS candidates and places, `events` a sample; None for a batch no larger."""
    most_parts = max(1, PART_BYTES // max(row_bytes, 1))
    size = max(1, PART_EVENTS // events, -(-samples // most_parts))
    size = -(-samples // -(-samples // size))  # as many parts, of even size: the last one is filled up with copies
    return size if size < samples else None


def loss_and_gradient(
    scores_of: ScoresFn, params: Any, batch: Batch, loss: LossFn, *, part: int | None
) -> tuple[jax.Array, Any]:
    """The loss [] of B samples and its gradient like `params`, any pytree of `scores_of`, in parts of `part` samples."""
    if part is not None and isinstance(loss, Loss | Goals):
        return _scored_once(scores_of, params, batch, loss, part)

    def loss_of(scores: jax.Array) -> jax.Array:
        correction = {} if batch.log_q is None else {"log_q": batch.log_q}
        return loss(scores, batch.labels, where=batch.where, **correction)

    if part is None:
        return jax.value_and_grad(lambda params: loss_of(scores_of(params, batch)))(params)
    return _scored_twice(scores_of, params, dataclasses.replace(batch, log_q=None), loss_of, part)


def _scored_once(scores_of: ScoresFn, params: Any, batch: Batch, loss: Loss | Goals, part: int) -> tuple[jax.Array, Any]:
    shape = samples, _ = jnp.shape(batch.where)
    norms: Any = loss.norms(batch.labels, batch.where)
    log_q = None if batch.log_q is None else jnp.broadcast_to(jnp.asarray(batch.log_q), shape)
    parts = _parts(dataclasses.replace(batch, log_q=log_q), part)
    real = (jnp.arange(parts.where.shape[0] * part) < samples).reshape(-1, part, 1)

    def value_and_gradient(batch: Batch) -> tuple[jax.Array, Any]:
        def loss_of_part(params: Any) -> jax.Array:
            return loss.part(scores_of(params, batch), batch.labels, norms, where=batch.where, log_q=batch.log_q)

        return jax.value_and_grad(loss_of_part)(params)

    parts = dataclasses.replace(parts, where=parts.where & real)
    return _total(value_and_gradient, (jnp.zeros(()), params), parts)


def _scored_twice(
    scores_of: ScoresFn, params: Any, batch: Batch, loss_of: Callable[[jax.Array], jax.Array], part: int
) -> tuple[jax.Array, Any]:
    samples = len(batch.where)
    parts = _parts(batch, part)
    scores = jax.lax.map(partial(scores_of, params), parts)
    each = scores.shape[2:]  # [C] or [C, T]
    value, cotangent = jax.value_and_grad(loss_of)(scores.reshape(-1, *each)[:samples])
    weight = jnp.pad(cotangent, [(0, -samples % part)] + [(0, 0)] * len(each))  # samples that fill the last part weigh nothing

    def gradient(inputs: tuple[Batch, jax.Array]) -> Any:
        batch, weight = inputs
        return jax.vjp(lambda params: scores_of(params, batch), params)[1](weight)[0]

    return value, _total(gradient, params, (parts, weight.reshape(-1, part, *each)))


def _total(f: Callable[[Any], Any], like: Any, parts: Any) -> Any:
    """The sum of f over parts, a tree `like` that."""

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, f(part)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), parts)[0]


def _parts(tree: Any, size: int) -> Any:
    """Splits the leading axis into parts of one size; copies of the last sample fill the last part."""

    def reshape(x: Array) -> jax.Array:
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return x.reshape(x.shape[0] // size, size, *x.shape[1:])  # no -1: some features have width 0

    return jax.tree.map(reshape, tree)
