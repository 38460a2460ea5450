"""Loss and gradient of a batch, taken whole or in parts that stay in the cache.

On a CPU the time of a large batch is that of writing arrays such as [B, L, D] to memory, so it is taken in parts. A
`losses.Loss` adds up over the parts: each is scored once. Any other loss must see all scores first: the parts are scored a
second time for the gradient. Either way the result is that of the whole batch, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from aif_jax.data.batches import Batch
from aif_jax.train.loss import Loss
from aif_jax.types import Array

PART_EVENTS = 10_000
"""Candidates and behaviours of a part of a batch: with D = 32 its arrays fill the level-2 cache of a core."""
PART_BYTES = 1 << 26
"""Bytes of embedding rows that all parts of a batch together may add gradients to: each part writes all of the batch's rows."""

LossFn: TypeAlias = Loss | Callable[..., jax.Array]
"""A `losses.Loss`, or any `loss(scores [B, C], labels, *, where) -> []`; it gets `log_q` too where the batch has it."""
ScoresFn: TypeAlias = Callable[[Any, Any], jax.Array]
"""(params, (users, items)) -> scores [B, C]."""


def part_size(samples: int, events: int, row_bytes: int = 0) -> int | None:
    """Samples of a part with about PART_EVENTS candidates and places, `events` a sample; None for a batch no larger."""
    most_parts = max(1, PART_BYTES // max(row_bytes, 1))
    size = max(1, PART_EVENTS // events, -(-samples // most_parts))
    return size if size < samples else None


def loss_and_gradient(
    scores_of: ScoresFn, params: Any, batch: Batch, loss: LossFn, *, part: int | None
) -> tuple[jax.Array, Any]:
    """The loss [] of B samples and its gradient like `params`, any pytree of `scores_of`, in parts of `part` samples."""
    features = (batch.users, batch.items)
    if part is not None and isinstance(loss, Loss):
        return _scored_once(scores_of, params, batch, loss, part)

    def loss_of(scores: jax.Array) -> jax.Array:
        correction = {} if batch.log_q is None else {"log_q": batch.log_q}
        return loss(scores, batch.labels, where=batch.where, **correction)

    if part is None:
        return jax.value_and_grad(lambda params: loss_of(scores_of(params, features)))(params)
    return _scored_twice(scores_of, params, features, loss_of, part, jnp.shape(batch.labels))


def _scored_once(scores_of: ScoresFn, params: Any, batch: Batch, loss: Loss, part: int) -> tuple[jax.Array, Any]:
    shape = samples, _ = jnp.shape(batch.labels)
    norms = loss.norms(batch.labels, batch.where)
    log_q = None if batch.log_q is None else jnp.broadcast_to(jnp.asarray(batch.log_q), shape)
    features, labels, where, log_q = _parts(((batch.users, batch.items), batch.labels, batch.where, log_q), part)
    where &= (jnp.arange(labels.shape[0] * part) < samples).reshape(-1, part, 1)

    def add(total: Any, inputs: tuple[Any, Array, Array, Array | None]) -> tuple[Any, None]:
        features, labels, where, log_q = inputs

        def loss_of_part(params: Any) -> jax.Array:
            return loss.part(scores_of(params, features), labels, norms, where=where, log_q=log_q)

        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of_part)(params)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, gradient), _ = jax.lax.scan(add, zeros, (features, labels, where, log_q))
    return value, gradient


def _scored_twice(
    scores_of: ScoresFn,
    params: Any,
    features: Any,
    loss_of: Callable[[jax.Array], jax.Array],
    part: int,
    shape: tuple[int, ...],
) -> tuple[jax.Array, Any]:
    samples, candidates = shape
    parts = _parts(features, part)
    scores = jax.lax.map(partial(scores_of, params), parts)
    value, cotangent = jax.value_and_grad(loss_of)(scores.reshape(-1, candidates)[:samples])
    weight = jnp.pad(cotangent, ((0, -samples % part), (0, 0)))  # samples that fill the last part weigh nothing

    def add(total: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, None]:
        features, weight = inputs
        _, pull = jax.vjp(lambda params: scores_of(params, features), params)
        return jax.tree.map(jnp.add, total, pull(weight)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradient, _ = jax.lax.scan(add, zeros, (parts, weight.reshape(-1, part, candidates)))
    return value, gradient


def _parts(tree: Any, size: int) -> Any:
    """Splits the leading axis into parts of one size; copies of the last sample fill the last part."""

    def reshape(x: Array) -> jax.Array:
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return x.reshape(x.shape[0] // size, size, *x.shape[1:])  # no -1: some features have width 0

    return jax.tree.map(reshape, tree)
