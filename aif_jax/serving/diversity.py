"""Diversity at the cut: the best k candidates with at most m of a group (an author, a category, an advertiser).

The answer is that of the plain rule: go through the candidates from the best to the worst, and leave out one whose group has m
already. On the device a window of the best is looked at first; where k of it fit, it is the answer. Only where it holds too few
are all candidates sorted by group and score. On a CPU of ours with C=1,000 and k=100 a top-k takes 0.01 ms, the window 0.05 ms
and the full sort 0.2 ms; `python -m experiments.cascade` measures it.
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
    count = values.shape[0]
    window = max(2 * k, LEAST_WINDOW)
    if window >= count:
        return _sorted(values, groups, k, most)
    best, at = jax.lax.top_k(values, window)
    own = groups[at]
    place = jnp.arange(window, dtype=jnp.int32)
    before = jnp.sum((own[None, :] == own[:, None]) & (place[None, :] < place[:, None]), axis=1, dtype=jnp.int32)
    fits = before < most
    slot = jnp.where(fits, jnp.cumsum(fits, dtype=jnp.int32) - 1, k)
    first = jnp.zeros(k, jnp.int32).at[slot].set(place, mode="drop")
    enough = jnp.sum(fits, dtype=jnp.int32) >= k
    return jax.lax.cond(enough, lambda: (best[first], at[first]), lambda: _sorted(values, groups, k, most))


def _sorted(values: jax.Array, groups: jax.Array, k: int, most: int) -> tuple[jax.Array, jax.Array]:
    """The same by a sort of all candidates: one is left out where the one `most` places before it is of its group."""
    count = values.shape[0]
    place = jnp.arange(count, dtype=jnp.int32)
    group, negative, at = jax.lax.sort((groups, -values, place), num_keys=2, is_stable=True)
    most = min(most, count)
    out = jnp.concatenate([jnp.zeros(most, jnp.bool_), group[most:] == group[:-most]])
    kept = jnp.zeros(count, jnp.float32).at[at].set(jnp.where(out, -jnp.inf, -negative), unique_indices=True)
    best, positions = jax.lax.top_k(kept, k)
    return best, positions


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
