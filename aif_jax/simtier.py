"""SimTier on LSH signatures: how many behaviours are how similar to the candidate.

The histogram of sim over T equal tiers of [0, 1], split by behaviour type where a config says so. In integers, so that every
form agrees bit for bit: with h differing bits of K, tier = min((K - h) T // K, T - 1).

Source: SimTier (arXiv 2407.19467) on LSH similarities as in AIF (2511.12934). The forms by bridge codes are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aif_jax import lsh
from aif_jax.types import TierHistory


def tier(differing: jax.Array, *, bits: int, tiers: int) -> jax.Array:
    """Tier of a Hamming distance: int32 [...] -> int32 [...] in [0, tiers)."""
    return jnp.minimum((bits - differing) * tiers // bits, tiers - 1)


def histogram_reference(candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1) -> jax.Array:
    """The histogram written from its definition; makes a [C, L] array. Same signature and result as `histogram`."""
    bits = candidates.shape[-1] * lsh.WORD
    at = tier(lsh.hamming(candidates[:, None, :], history.signature[None, :, :]), bits=bits, tiers=tiers)
    cell = jnp.where(history.mask, history.group * tiers + at, groups * tiers)
    counts = jax.nn.one_hot(cell, groups * tiers, dtype=jnp.int32).sum(1)
    return counts.reshape(candidates.shape[0], groups, tiers)


def histogram(candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1) -> jax.Array:
    """Counts of a user's behaviours by similarity tier.

    Args:
      candidates: uint32 [C, W].
      history: of one user, [L].
      tiers: T.
      groups: G; `history.group` is in [0, G).

    Returns:
      int32 [C, G, T].
    """
    return histogram_reference(candidates, history, tiers=tiers, groups=groups)


def code_table(codes: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1) -> jax.Array:
    """User side of SimTier by bridge codes: log1p histograms between every code and the history, float32 [R, G * T]."""
    counts = histogram(codes, history, tiers=tiers, groups=groups)
    return jnp.log1p(counts.astype(jnp.float32)).reshape(codes.shape[0], groups * tiers)


def nearest_codes(codes: jax.Array, signature: jax.Array, *, count: int, tiers: int) -> tuple[jax.Array, jax.Array]:
    """Item side: the `count` nearest codes of a signature and their weights.

    Weights are softmax(-distance / tier width): a code one tier further away weighs e times less.

    Args:
      codes: uint32 [R, W].
      signature: uint32 [W].
      count: J.
      tiers: T; a tier is K / T bits wide.

    Returns:
      int32 [J] code ids (ties: the lower id) and float32 [J] weights that sum to 1.
    """
    distance = lsh.hamming(codes, signature).astype(jnp.float32)
    negative, index = jax.lax.top_k(-distance, count)
    return index.astype(jnp.int32), jax.nn.softmax(negative * tiers / (signature.shape[-1] * lsh.WORD))
