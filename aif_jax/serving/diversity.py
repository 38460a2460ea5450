"""Diversity at the cut: the best k candidates with at most m of a group (an author, a category, an advertiser).

The answer is that of the plain rule: go through the candidates from the best to the worst, and leave out one whose group has m
already. On the device a window of the best is looked at first. What it leaves out is of groups that are full, so where it holds
fewer than k, candidates of full groups are dropped and the next window is one of those that may still enter. Nothing is sorted
by group, and each further window has filled a group: there are at most k / m of them. `python -m experiments.cascade` measures
the cost.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LEAST_WINDOW = 256


def capped_top_k(values: jax.Array, groups: jax.Array, k: int, most: int) -> tuple[jax.Array, jax.Array]:
    """The best k of C candidates with at most `most` of a group, inside jit.

    Args:
      values: float32 [C], -inf for candidates that are none; ties keep the candidates' order.
      groups: float32 [C] or integers; equal numbers are one group.
      k: at most C.
      most: m, at least 1.

    Returns:
      values [k], best first, -inf where there are no more; positions int32 [k].

    Example:
      >>> values, positions = capped_top_k(jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([7, 7, 8, 7]), 3, 1)
      >>> values.tolist(), positions[:2].tolist()
      ([4.0, 2.0, -inf], [0, 2])
    """
    window, slots = min(max(2 * k, LEAST_WINDOW), values.shape[0]), jnp.arange(k, dtype=jnp.int32)
    place = jnp.arange(window, dtype=jnp.int32)

    def enter(
        left: jax.Array, held: jax.Array | int, chosen: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The window, and the choice [k] of which `count` are taken, with those of the window that fit; `held` as `after`."""
        best, at = jax.lax.top_k(left, window)
        own = groups[at]
        before = jnp.sum((own[None, :] == own[:, None]) & (place[None, :] < place[:, None]), axis=1, dtype=jnp.int32)
        fits = (before + (held if isinstance(held, int) else held[at]) < most) & (best > -jnp.inf)
        slot = jnp.where(fits, count + jnp.cumsum(fits, dtype=jnp.int32) - 1, k)
        return at, chosen.at[slot].set(at, mode="drop"), count + jnp.sum(fits, dtype=jnp.int32)

    def after(left: jax.Array, at: jax.Array, chosen: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values [C] without the window and without full groups, and how many of its group are chosen int32 [C]."""
        same = (groups[:, None] == groups[chosen][None, :]) & (slots < count)[None, :]
        held = jnp.sum(same, axis=1, dtype=jnp.int32)
        return jnp.where(held < most, left.at[at].set(-jnp.inf, unique_indices=True), -jnp.inf), held

    def further() -> tuple[jax.Array, jax.Array]:
        def some(state: tuple[jax.Array, ...]) -> jax.Array:
            return (state[3] < k) & (jnp.max(state[0]) > -jnp.inf)

        def window_after(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at, chosen, count = enter(*state)
            return *after(state[0], at, chosen, count), chosen, count

        state = *after(values, at, chosen, count), chosen, count
        _, _, *made = jax.lax.while_loop(some, window_after, state)
        return made[0], made[1]

    at, chosen, count = enter(values, 0, jnp.zeros(k, jnp.int32), jnp.int32(0))
    chosen, count = jax.lax.cond(count >= k, lambda: (chosen, count), further)
    return jnp.where(slots < count, values[chosen], -jnp.inf), chosen


def within_cap(groups: np.ndarray, most: int) -> np.ndarray:
    """bool [n]: which of some candidates, best first, are among the first `most` of their group; on the host.

    Example:
      >>> within_cap(np.array([7, 7, 8, 7]), 2).tolist()
      [True, True, True, False]
    """
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    new = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
    place = np.arange(len(ordered))
    within = np.zeros(len(ordered), np.bool_)
    within[order] = place - np.maximum.accumulate(np.where(new, place, 0)) < most
    return within
