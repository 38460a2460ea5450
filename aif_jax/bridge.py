"""Bridge Embedding Approximation (BEA), both halves side by side.

Full user x item cross-attention, softmax(q Z'^T / sqrt D) Z' with a query for every candidate, costs C x S in real time. M
learned bridge embeddings B [M, D] stand between the two sides:

    user side (asynchronous)   V = softmax(B Z'^T / sqrt D) Z'    [M, D]
    item side (nearline)       w = softmax(q B^T / sqrt D)        [M]
    real time                  w V                                [D]

Source: the BEA of AIF (arXiv 2511.12934); these formulas are ours, see docs/fidelity.md.
"""

from __future__ import annotations

import math

import jax

from aif_jax.layers import attention
from aif_jax.types import Params


def init(key: jax.Array, *, bridges: int, width: int) -> Params:
    """Parameters: `embeddings` B, float32 [M, D]."""
    return {"embeddings": jax.random.normal(key, (bridges, width))}


def user_half(params: Params, sequence: jax.Array, mask: jax.Array) -> jax.Array:
    """V [M, D]: what each bridge reads from the projected short sequence [S, D]; zeros for an empty history."""
    return attention(params["embeddings"], sequence, sequence, mask)


def item_half(params: Params, query: jax.Array) -> jax.Array:
    """w [..., M]: how much of each bridge the item query [..., D] asks for; sums to 1."""
    return jax.nn.softmax(query @ params["embeddings"].T / math.sqrt(query.shape[-1]))


def combine(weights: jax.Array, values: jax.Array) -> jax.Array:
    """w V: weights [C, M], values [M, X] -> [C, X]. Linear in `values`, so the head may pass V times its first layer."""
    return weights @ values
