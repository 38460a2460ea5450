"""Linear attention over the long history."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, UserView, block, expect
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import Array, ItemRow, Params, UserState, record


@record
class Summed:
    """A long history as its sums: the cost in real time does not depend on L."""

    moments: Array  # float32 [K, D]  sum_j m_j key_j value_j^T
    total: Array  # float32 [D]     sum_j m_j value_j
    count: Array  # float32 []      sum_j m_j


@block
class LinearMemory(Block):
    """Linear attention over the long history, whose state is summed before the candidate is known.

    DIN's target attention weighs every behaviour by its similarity to the candidate. Without a softmax over behaviours it is
    linear in the candidate's query, so the sum over the history can be taken first:

        sum_j m_j (f_i . g_j) v_j = f_i A,   A = sum_j m_j g_j v_j^T   [K, D]

    f is a trained item query, g a trained behaviour key. With keys="softmax" g is a softmax over the history for each of the K
    entries: K bridges over the long history, whose weights depend on all behaviours. The head receives the mean of v and the
    deviation f_i A / (sqrt(K) n) apart: the same information, better conditioned.

    - Paper: the linear form of DIN (arXiv 1706.06978) as in AIF's LSH-DIN (2511.12934); trained keys are ours.
    - Cost: user side K x D x L; in real time f is affine in the item vector, so A enters the kernel of the item vector once a
      request, [D, K] x [K, D]; the product of the candidates, [C, D] x [D, H], is independent of K. Nothing depends on L.
    - When: long histories; softmax keys rank best.

    Attributes:
      width: K, the keys.
      keys: "linear" for plain keys, or "softmax" over the history for each of the K entries.
      dot_product: adds the dot product of the attention output and the item vector to the logit.
    """

    width: int = 64
    keys: Literal["linear", "softmax"] = "softmax"
    dot_product: bool = False

    def __post_init__(self):
        expect(self.width >= 1, self, "width", "at least 1", self.width)

    def widths(self, config: Config) -> dict[str, int]:
        return {"mean": config.width, "deviation": config.width}

    def init(self, key: jax.Array, config: Config) -> Params:
        parts = zip(("query", "key"), jax.random.split(key), strict=True)
        return {name: layers.dense_init(part, config.width, self.width) for name, part in parts}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        history, item, kernel = state.blocks[self.name], jnp.asarray(rows.vector), kernels["deviation"]
        once, root = mean(history) @ kernels["mean"], math.sqrt(item.shape[-1])
        # f is an affine map of the item vector: A enters it once a request, [D, D], and not [K, D] for each candidate
        moments = jnp.asarray(history.moments) * scale(history)
        linear, constant = params["query"]["kernel"] @ moments, params["query"]["bias"] @ moments
        logit = ((item @ linear + constant[None, :]) * item).sum(-1) / root if self.dot_product else 0.0
        return HeadInputs(once=once + constant @ kernel, item=linear @ kernel, logit=logit)

    def user(self, params: Params, user: UserView) -> Summed:
        values, mask = user.embedded, jnp.asarray(user.long.mask)
        if user.candidates is not None and self.keys == "softmax":
            return sum_softmax_trained(params["key"], values, mask)
        keys = params["key"]["kernel"].T @ values.T + params["key"]["bias"][:, None]
        return (sum_softmax if self.keys == "softmax" else sum_events)(keys, values, mask)


def sum_events(keys: jax.Array, values: jax.Array, mask: jax.Array) -> Summed:
    """Sum a history: keys float32 [K, L], values float32 [L, D], mask bool [L].

    Behaviours are the last axis of the keys: the layout in which a CPU multiplies fastest.
    """
    kept = jnp.where(mask[:, None], values, jnp.zeros((), values.dtype))
    return Summed(moments=keys @ kept, total=kept.sum(0), count=mask.sum().astype(values.dtype))


def sum_softmax(keys: jax.Array, values: jax.Array, mask: jax.Array) -> Summed:
    """Sum a history under keys [K, L] that are n times the softmax over its n behaviours, for each of the K entries apart.

    Divides sums [K, D] in place of shares [K, L]. Padding has weight 0; without events all have 1, and the scale is 0.
    """
    scores = jnp.where(mask, keys, jnp.finfo(keys.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(1, keepdims=True)))
    summed = sum_events(weights, values, mask)
    scale = summed.count.astype(keys.dtype) / jnp.maximum(weights.sum(1), jnp.finfo(keys.dtype).tiny)
    return Summed(moments=summed.moments * scale[:, None].astype(values.dtype), total=summed.total, count=summed.count)


def sum_softmax_trained(key: Params, values: jax.Array, mask: jax.Array) -> Summed:
    """Return `sum_softmax` of dense keys for training, with a hand-written gradient: a batch of users transposes nothing, and
    padding is left out, see `layers.fold_events`. Values float32 [L, D], zeros where masked.
    """
    sums, weight = _weighted(key, values, mask)
    count = mask.sum().astype(values.dtype)
    scale = count / jnp.where(weight > 0, weight, 1)  # an empty history has weight 0; its gradient must stay finite
    return Summed(moments=(sums * scale[None, :]).T, total=values.sum(0), count=count)


@jax.custom_vjp
def _weighted(key: Params, values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return sum_j w_j v_j^T [D, K] and sum_j w_j [K] for w = exp(key - max key); the maximum cancels in their quotient."""
    return _weighted_forward(key, values, mask)[0]


def _weighted_forward(key: Params, values: jax.Array, mask: jax.Array) -> tuple[Any, Any]:
    def add(shared: Any, own: Any, chunk: Any, total: Any) -> tuple[Any, None]:
        (values, mask), (highest, sums, weight) = chunk, total
        keys = jnp.where(mask[:, None], layers.dense(shared, values), jnp.finfo(values.dtype).min)
        higher = jnp.maximum(highest, keys.max(0))  # the maximum so far: sums of earlier chunks are scaled to it
        scale, weights = jnp.exp(highest - higher), _weights(keys, mask, higher)
        return (higher, sums * scale[None, :] + jnp.einsum("lk,ld->dk", weights, values), weight * scale + weights.sum(0)), None

    none = jnp.zeros_like(key["bias"])
    start = none + jnp.finfo(none.dtype).min, jnp.zeros_like(key["kernel"]), none
    (highest, *made), _ = layers.fold_events(add, key, None, (values, mask), mask, start)
    return tuple(made), (key, values, mask, highest)


def _weighted_backward(saved: Any, cotangent: Any) -> tuple[Any, ...]:
    key, values, mask, highest = saved

    def add(shared: Any, own: Any, chunk: Any, total: Any) -> tuple[Any, jax.Array]:
        (values, mask), (highest, of_sums, of_weight) = chunk, own  # of_sums [D, K], of_weight [K]
        weights = _weights(layers.dense(shared, values), mask, highest)  # again: costs more to keep than to compute
        of_keys = weights * (values @ of_sums + of_weight[None, :])
        of_values = weights @ of_sums.T + of_keys @ shared["kernel"].T
        return {"kernel": total["kernel"] + values.T @ of_keys, "bias": total["bias"] + of_keys.sum(0)}, of_values

    start, own = jax.tree.map(jnp.zeros_like, key), (highest, *cotangent)
    of_key, of_values = layers.fold_events(add, key, own, (values, mask), mask, start)
    return of_key, of_values, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _weights(keys: jax.Array, mask: jax.Array, highest: jax.Array) -> jax.Array:
    return jnp.where(mask[:, None], jnp.exp(keys - highest[None, :]), jnp.zeros((), keys.dtype))


def mean(history: Summed) -> jax.Array:
    """Return total / count [D]: the part that is the same for every candidate; zeros for an empty history."""
    return jnp.asarray(history.total) / jnp.maximum(jnp.asarray(history.count), 1)


def scale(history: Summed) -> jax.Array:
    """Return 1 / (sqrt(K) count), the scale of the deviation."""
    return 1 / (math.sqrt(history.moments.shape[0]) * jnp.maximum(jnp.asarray(history.count), 1))
