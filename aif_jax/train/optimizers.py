"""Optimizers: the default, and row-wise Adagrad for large embedding tables. Any Optax transformation serves as well."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def default_optimizer(steps: int, *, learning_rate: float = 3e-3, weight_decay: float = 1e-5) -> optax.GradientTransformation:
    """AdamW with a warm-up over 5 % of the steps, a cosine decay, and gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), max(2, steps), learning_rate / 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))


def rowwise_adagrad(
    learning_rate: float | optax.Schedule, *, initial_accumulator: float = 0.1, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adagrad with one accumulator for each row (the last axis) of a matrix: 4 bytes a row in place of 4 D.

        a <- a + mean_d g_d^2,   w <- w - learning_rate g / sqrt(a + eps)

    Source: DLRM (arXiv 1906.00091). `initial_accumulator` is a before the first step; a vector counts as one row.

    Example:
      >>> optimizer = rowwise_adagrad(1.0, initial_accumulator=0.0)
      >>> table = jnp.zeros((2, 2))
      >>> updates, _ = optimizer.update(jnp.array([[2.0, 2.0], [0.0, 0.0]]), optimizer.init(table))
      >>> updates.tolist()
      [[-1.0, -1.0], [-0.0, -0.0]]
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: jnp.full((*x.shape[:-1], 1) if x.ndim else (), initial_accumulator, x.dtype), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(lambda a, g: a + (jnp.mean(g * g, -1, keepdims=True) if g.ndim else g * g), state, updates)
        # a row without a gradient so far, and with an accumulator of 0, divides 0 by 0 + eps
        return jax.tree.map(lambda a, g: g * jax.lax.rsqrt(a + eps), state, updates), state

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))
