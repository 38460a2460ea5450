"""Long-term interest in real time: DIN on LSH in its linear form, and the learned long memory.

DIN's target attention weighs every behaviour by its similarity to the candidate. Without a softmax it is linear in the
candidate's key, so the sum over the history can be taken before the candidate is known:

    sum_j m_j (f_i . g_j) v_j = f_i A,   A = sum_j m_j g_j v_j^T   [K, D]

- kind "lsh": f and g are the signs in {-1, +1}^K of the signatures. With sim = 1/2 + s_i . s_j / (2 K) the similarity-
  weighted mean is exactly (b / 2 + s_i A / (2 K)) / n, where b = sum_j m_j v_j and n = sum_j m_j.
- kind "learned" (ours): f is a trained item query, g a trained behaviour key: linear attention at the same real-time cost. With
  g a softmax over the history the K entries are bridges over the long history: attention whose weights know all behaviours.

The head receives the mean b / n and the deviation f_i A / (sqrt(K) n) apart: the same information, better conditioned. In
real time this is one [C, K] x [K, D] product, whatever L is. Source: AIF's LSH-DIN (arXiv 2511.12934) and DIN (1706.06978);
the linear form is ours.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from aif_jax import lsh
from aif_jax.layers import masked_softmax
from aif_jax.types import Memory, UnfoldedMemory


def cheaper_unfolded(candidates: int, key_width: int) -> bool:
    """Whether so few candidates are scored per user that folding the history (K D L) costs more than it saves (C K D)."""
    return candidates * 8 <= key_width


def fold(keys: jax.Array, values: jax.Array, mask: jax.Array) -> Memory:
    """User side: folds a history into its moments.

    Args:
      keys: uint32 [L, W] signatures or float32 [L, K] learned keys.
      values: float32 [L, D] behaviour embeddings.
      mask: bool [L].
    """
    kept = jnp.where(mask[:, None], values, 0.0)
    return Memory(moments=_as_float(keys).T @ kept, total=kept.sum(0), count=mask.sum().astype(values.dtype))


def deviation(memory: Memory | UnfoldedMemory, query: jax.Array, project: jax.Array) -> jax.Array:
    """Real time: f_i A / (sqrt(K) n) times the head's kernel.

    Args:
      memory: of one user.
      query: uint32 [C, W] signatures or float32 [C, K] learned queries.
      project: float32 [D, H]; enters before the product with the candidates where the history is folded.

    Returns:
      float32 [C, H]; zeros for an empty history.
    """
    if isinstance(memory, Memory):
        scale = 1.0 / (math.sqrt(memory.moments.shape[0]) * jnp.maximum(memory.count, 1.0))
        return _as_float(query) @ (memory.moments @ project * scale)
    keys, mask = jnp.asarray(memory.keys), jnp.asarray(memory.mask)
    if query.dtype == jnp.uint32:
        width = query.shape[-1] * lsh.WORD
        agreement = (width - 2 * lsh.hamming(query[:, None, :], keys[None, :, :])).astype(jnp.float32)
    else:
        width = query.shape[-1]
        agreement = query @ keys.T
    weights = jnp.where(mask, agreement, 0.0) / (math.sqrt(width) * jnp.maximum(mask.sum(), 1))
    return weights @ memory.values @ project


def match(memory: Memory | UnfoldedMemory, query: jax.Array, item: jax.Array) -> jax.Array:
    """Real time: the candidate's dot product with what its query reads, f_i A . item / (sqrt(K) n).

    Args:
      memory: of one user.
      query: float32 [C, K] learned queries.
      item: float32 [C, D].

    Returns:
      float32 [C]; zeros for an empty history.
    """
    if isinstance(memory, Memory):
        scale = 1.0 / (math.sqrt(memory.moments.shape[0]) * jnp.maximum(memory.count, 1.0))
        return (query * (item @ (memory.moments.T * scale))).sum(-1)
    return (item * deviation(memory, query, jnp.eye(item.shape[-1]))).sum(-1)


def softmax_keys(keys: jax.Array, mask: jax.Array) -> jax.Array:
    """Keys [L, K] as shares of the history: n times the softmax over its behaviours, for each of the K entries apart.

    The factor n, the number of behaviours, cancels the mean that the memory takes.
    """
    return masked_softmax(keys.T, mask[None, :]).T * mask.sum().astype(keys.dtype)


def fold_softmax(keys: jax.Array, values: jax.Array, mask: jax.Array) -> Memory:
    """`fold(softmax_keys(keys, mask), values, mask)` without the shares: what would divide shares [L, K] divides sums [K, D].

    Less than two thirds of the time in training, where the shares of all samples are the largest array of the user side.

    Args:
      keys: float32 [L, K] learned keys.
      values: float32 [L, D] behaviour embeddings.
      mask: bool [L].
    """
    scores = jnp.where(mask[:, None], keys, jnp.finfo(keys.dtype).min)
    weights = jnp.where(mask[:, None], jnp.exp(scores - jax.lax.stop_gradient(scores.max(0))), 0.0)
    sums = jnp.maximum(weights.sum(0), jnp.finfo(keys.dtype).tiny)
    folded = fold(weights, values, mask)
    scale = folded.count.astype(keys.dtype) / sums
    return Memory(moments=folded.moments * scale[:, None].astype(values.dtype), total=folded.total, count=folded.count)


def mean(memory: Memory | UnfoldedMemory) -> jax.Array:
    """b / n [D]: the part that is the same for every candidate; zeros for an empty history."""
    if isinstance(memory, Memory):
        return jnp.asarray(memory.total) / jnp.maximum(memory.count, 1.0)
    mask = jnp.asarray(memory.mask)
    return jnp.where(mask[:, None], memory.values, 0.0).sum(0) / jnp.maximum(mask.sum(), 1)


def _as_float(keys: jax.Array) -> jax.Array:
    return lsh.signs(keys) if keys.dtype == jnp.uint32 else keys
