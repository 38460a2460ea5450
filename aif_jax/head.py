"""The head: an MLP over the blocks of one (user, candidate) pair, its first layer split by block.

A first layer over concatenated blocks is a sum of one product for each block. Split so, whatever is the same for every
candidate is computed once, and a block that is linear in a user-side matrix (BEA, folded memory, SIM values) can take its
kernel in before the candidates come: w V W = w (V W). `tests/test_head.py` ties this to the plain concatenation.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.types import Params

Pair: TypeAlias = tuple[jax.Array, jax.Array]
"""A block [C, w] and its kernel [w, H]."""


def init(key: jax.Array, blocks: dict[str, int], hidden: tuple[int, ...]) -> Params:
    """`first`: a kernel [width, H] for each block and a bias [H], scaled by the total fan-in; `rest`: the MLP above it."""
    first, rest = jax.random.split(key)
    whole = layers.dense_init(first, sum(blocks.values()), hidden[0])
    kernels, start = {}, 0
    for name, width in blocks.items():
        kernels[name] = whole["kernel"][start : start + width]
        start += width
    return {"first": {"kernels": kernels, "bias": whole["bias"]}, "rest": layers.mlp_init(rest, hidden[0], (*hidden[1:], 1))}


def finish(params: Params, first: jax.Array) -> jax.Array:
    """Logits [C] from the first layer's sum [C, H]."""
    return layers.mlp(params["rest"], jax.nn.relu(first))[..., 0]


def product(params: Params, user: jax.Array, item: jax.Array) -> list[Pair]:
    """The blocks "item" and "product" of the first layer: i W_i + (u * i) W_p.

    With many candidates the user vector is folded into the kernel, i (W_i + diag(u) W_p): one product instead of two.

    Args:
      params: of the head.
      user: float32 [D].
      item: float32 [C, D].

    Returns:
      Pairs for `total`.
    """
    kernels = params["first"]["kernels"]
    if item.shape[0] > item.shape[1]:
        return [(item, kernels["item"] + user[:, None] * kernels["product"])]
    return [(item, kernels["item"]), (user[None, :] * item, kernels["product"])]


def total(pairs: list[Pair]) -> jax.Array:
    """The sum of left @ right: [C, w] x [w, H] each -> [C, H].

    With many candidates narrow blocks side by side make one product, which is faster than several and a sum over [C, H]. With
    few, kernels stay apart: those that users share need not be copied for each.
    """
    (first, _), *_ = pairs
    if first.shape[0] > first.shape[1]:
        left, right = zip(*pairs, strict=True)
        return jnp.concatenate(left, -1) @ jnp.concatenate(right, 0)
    return sum((left @ right for left, right in pairs), jnp.zeros(()))


def matching_init(width: int) -> Params:
    """Parameters of `matching`: a `popularity` direction [D]."""
    return {"popularity": jnp.zeros(width)}


def matching(params: Params, user: jax.Array, item: jax.Array) -> jax.Array:
    """The two-tower's logit, u . i / sqrt D + popularity . i, to stand beside the MLP: item float32 [C, D] -> [C].

    An MLP learns a dot product of two vectors only slowly (Rendle et al. 2020, arXiv 2005.09683).
    """
    return item @ (user / math.sqrt(user.shape[-1]) + params["matching"]["popularity"])


def concatenated(params: Params, blocks: dict[str, jax.Array]) -> jax.Array:
    """The same head as one MLP over concatenated blocks [C, width] each, the reference for the split form -> logits [C]."""
    kernels = params["first"]["kernels"]
    kernel = jnp.concatenate([kernels[name] for name in blocks])
    return finish(params, jnp.concatenate(list(blocks.values()), -1) @ kernel + params["first"]["bias"][None, :])
