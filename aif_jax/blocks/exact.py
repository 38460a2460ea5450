"""What AIF approximates, as blocks: the sequential ceiling, whose real-time cost grows with C x L."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, Fitted, HeadInputs, ItemView, UserView, block, by_id
from aif_jax.blocks.simtier import Tiers
from aif_jax.config import Config
from aif_jax.types import Array, ItemFeatures, ItemRow, Params, UserState, record


@record
class Sequence:
    """A history that candidates attend over."""

    values: Array  # float32 [S, D]
    mask: Array  # bool [S]


@dataclasses.dataclass(frozen=True)
class _Attention(Block):
    dot_product: bool = False
    needs_towers = True

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width}

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"query": layers.dense_init(key, config.width, config.width)}

    def item(self, params: Params, item: ItemView) -> jax.Array:
        return layers.dense(params["query"], item.vector)

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        history, query = state.blocks[self.name], jnp.asarray(rows.blocks[self.name])
        values, item = jnp.asarray(history.values), jnp.asarray(rows.vector)
        read = layers.attention(query, values, values, jnp.asarray(history.mask))
        logit = (item * read).sum(-1) / math.sqrt(item.shape[-1]) if self.dot_product else 0.0
        return HeadInputs(rest=read @ kernels["read"], logit=logit)


@block
class CrossAttention(_Attention):
    """Softmax attention of every candidate over the short history; `Bea` approximates it.

    - Formula: softmax(q Z'^T / sqrt D) Z', with an item query q [D] and the projected short history Z' [S, D].
    - Paper: scaled dot-product attention (arXiv 1706.03762), which AIF (2511.12934) replaces by BEA.
    - Cost: real time C x S x D.
    - When: to measure what `Bea` loses (`presets.full_attention`); a team would serve it sequentially.

    Attributes:
      dot_product: adds the dot product of what is read and the item vector to the logit.
    """

    def user(self, params: Params, user: UserView) -> Sequence:
        return Sequence(values=user.sequence, mask=jnp.asarray(user.short.mask))


@block
class TargetAttention(_Attention):
    """Softmax attention of every candidate over the long history, plus its mean; `LinearMemory` and `LshDin` approximate it.

    - Formula: softmax(q E^T / sqrt D) E, with an item query q [D] and behaviour embeddings E [L, D].
    - Paper: target attention, DIN (arXiv 1706.06978), here with a softmax.
    - Cost: real time C x L x D.
    - When: to measure what linear attention loses (`presets.full_attention`).

    Attributes:
      dot_product: see `CrossAttention`.
    """

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width, "mean": config.width}

    def user(self, params: Params, user: UserView) -> Sequence:
        return Sequence(values=user.embedded, mask=jnp.asarray(user.long.mask))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        history = state.blocks[self.name]
        mean = layers.masked_mean(jnp.asarray(history.values), jnp.asarray(history.mask))
        return super().score(params, state, rows, kernels)._replace(once=mean @ kernels["mean"])


@dataclasses.dataclass(frozen=True)
class UnitContent(Fitted):
    """A fitted table of content embeddings of unit length, float32 [N, E]."""

    @property
    def name(self) -> str:
        return "unit_content"

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        return {"table": _unit(jnp.asarray(items.content, jnp.float32))}

    def item(self, params: Params, features: ItemFeatures) -> jax.Array:
        return by_id(params["table"], features, lambda content: _unit(content.astype(params["table"].dtype)))


@record
class ContentHistory:
    """What a candidate's content is compared with."""

    content: Array  # float32 [L, E], unit length
    group: Array  # int32 [L] histogram of each behaviour
    mask: Array  # bool [L]


@block
class CosineTiers(Tiers):
    """Tier histograms of float content embeddings; `SimTier` approximates them by signatures.

    - Formula: log(1 + number of behaviours whose (1 + cos(e_i, e_j)) / 2 lies in tier t), t = 1 .. T.
    - Paper: SimTier (arXiv 2407.19467).
    - Cost: real time C x L x E.
    - When: to measure what signatures lose.

    Attributes:
      tiers, by_action, windows: see `SimTier`.
    """

    tiers: int = 8

    @property
    def tables(self) -> tuple[Fitted, ...]:
        return (UnitContent(),)

    def user(self, params: Params, user: UserView) -> ContentHistory:
        group, mask = self.group(user.long, user.config), jnp.asarray(user.long.mask)
        return ContentHistory(content=user.values(self.tables[0], user.long), group=group, mask=mask)

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        """Makes no [C, L, T] array."""
        kernel, history = kernels["tiers"], state.blocks[self.name]
        content = jnp.asarray(rows.fitted[self.tables[0].name])
        similarity = (1.0 + content @ jnp.asarray(history.content).T) / 2.0
        tier = jnp.clip((similarity * self.tiers).astype(jnp.int32), 0, self.tiers - 1)
        counts = []
        for group in range(kernel.shape[0] // self.tiers):
            counted = (jnp.asarray(history.mask) & (jnp.asarray(history.group) == group))[None, :]
            reached = [jnp.sum((tier >= t) & counted, axis=1, dtype=jnp.int32) for t in range(self.tiers)]
            counts += [a - b for a, b in zip(reached, [*reached[1:], jnp.zeros_like(reached[0])], strict=True)]
        return HeadInputs(rest=jnp.log1p(jnp.stack(counts, -1).astype(jnp.float32)).astype(kernel.dtype) @ kernel)


def _unit(content: jax.Array) -> jax.Array:
    return content / jnp.maximum(jnp.linalg.norm(content, axis=-1, keepdims=True), 1e-6)
