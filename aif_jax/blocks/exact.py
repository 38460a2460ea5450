"""What AIF approximates, as blocks: the sequential ceiling.

- `CrossAttention`: softmax(q Z'^T / sqrt D) Z' over the short history, a query for every candidate; `Bea` approximates it.
- `TargetAttention`: the same over the whole long history; `LinearMemory` and `LshDin` approximate it.
- `CosineTiers`: tier histograms of float cosine similarities; `SimTier` approximates it by signatures.

A team would serve these sequentially: their cost in real time grows with C x L.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import layers
from aif_jax.blocks.block import Block, Fitted, ItemView, Terms, UserView, block, by_id, expect_content, expect_towers
from aif_jax.blocks.simtier import behaviour_group, check_tiers, group_count
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

    def check(self, config: Config) -> None:
        expect_towers(self, config)

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"query": layers.dense_init(key, config.width, config.width)}

    def item(self, params: Params, item: ItemView) -> jax.Array:
        return layers.dense(params["query"], item.vector)


@block
class CrossAttention(_Attention):
    """Softmax attention of every candidate over the short history.

    Attributes:
      dot_product: adds the dot product of what is read and the item vector to the logit.
    """

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width}

    def user(self, params: Params, user: UserView) -> Sequence:
        return Sequence(values=user.sequence, mask=jnp.asarray(user.short.mask))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> Terms:
        read = attend(state.blocks[self.name], rows.blocks[self.name])
        return Terms(rest=read @ kernels["read"], logit=dot_item(read, rows) if self.dot_product else 0.0)


@block
class TargetAttention(_Attention):
    """Softmax attention of every candidate over the whole long history, and the history's mean.

    Attributes:
      dot_product: adds the dot product of what is read and the item vector to the logit.
    """

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width, "mean": config.width}

    def user(self, params: Params, user: UserView) -> Sequence:
        return Sequence(values=user.embedded, mask=jnp.asarray(user.long.mask))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> Terms:
        history = state.blocks[self.name]
        read = attend(history, rows.blocks[self.name])
        mean = layers.masked_mean(jnp.asarray(history.values), jnp.asarray(history.mask))
        logit = dot_item(read, rows) if self.dot_product else 0.0
        return Terms(once=mean @ kernels["mean"], rest=read @ kernels["read"], logit=logit)


@dataclasses.dataclass(frozen=True)
class UnitContent(Fitted):
    """A fitted table of content embeddings of unit length, float32 [N, E]."""

    @property
    def name(self) -> str:
        return "unit_content"

    def check(self, config: Config) -> None:
        expect_content(self, config)

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        content = np.asarray(items.content, np.float32)
        return {"table": jnp.asarray(content / np.maximum(np.linalg.norm(content, axis=-1, keepdims=True), 1e-6))}

    def item(self, params: Params, features: ItemFeatures) -> jax.Array:
        def unit(content: jax.Array) -> jax.Array:
            content = content.astype(params["table"].dtype)
            return content / jnp.maximum(jnp.linalg.norm(content), 1e-6)

        return by_id(params["table"], features, unit)


@record
class ContentHistory:
    """What a candidate's content is compared with."""

    content: Array  # float32 [L, E], unit length
    group: Array  # int32 [L] histogram of each behaviour
    mask: Array  # bool [L]


@block
class CosineTiers(Block):
    """Tier histograms of (1 + cosine) / 2 of float content embeddings.

    Attributes:
      tiers: T.
      by_action: a histogram for each behaviour type.
      windows: a histogram for each window of the history, as in `SimTier`.

    Raises:
      ValueError: sizes out of range; a schema without content.
    """

    tiers: int = 8
    by_action: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        check_tiers(self, self.tiers, self.windows)

    @property
    def tables(self) -> tuple[Fitted, ...]:
        return (UnitContent(),)

    def widths(self, config: Config) -> dict[str, int]:
        return {"tiers": group_count(config, self.by_action, self.windows) * self.tiers}

    def user(self, params: Params, user: UserView) -> ContentHistory:
        group = behaviour_group(user.long, user.config, by_action=self.by_action, windows=self.windows)
        return ContentHistory(content=user.values(self.tables[0]), group=group, mask=jnp.asarray(user.long.mask))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> Terms:
        kernel = kernels["tiers"]
        content = jnp.asarray(rows.fitted[self.tables[0].name])
        counts = cosine_counts(content, state.blocks[self.name], tiers=self.tiers, groups=kernel.shape[0] // self.tiers)
        return Terms(rest=jnp.log1p(counts.astype(jnp.float32)).astype(kernel.dtype) @ kernel)


def attend(history: Sequence, query: Array) -> jax.Array:
    """What each candidate reads from a history: query float32 [C, D] -> float32 [C, D]."""
    values = jnp.asarray(history.values)
    return layers.attention(jnp.asarray(query), values, values, jnp.asarray(history.mask))


def dot_item(read: jax.Array, rows: ItemRow) -> jax.Array:
    """The dot product of what was read [C, D] and the item vector over sqrt D, float32 [C]."""
    item = jnp.asarray(rows.vector)
    return (item * read).sum(-1) / math.sqrt(item.shape[-1])


def cosine_counts(content: jax.Array, history: ContentHistory, *, tiers: int, groups: int) -> jax.Array:
    """Behaviours by tier of (1 + cosine) / 2: content float32 [C, E] of unit length -> int32 [C, G * T]; no [C, L, T] array."""
    similarity = (1.0 + content @ jnp.asarray(history.content).T) / 2.0
    tier = jnp.clip((similarity * tiers).astype(jnp.int32), 0, tiers - 1)
    counts = []
    for group in range(groups):
        counted = (jnp.asarray(history.mask) & (jnp.asarray(history.group) == group))[None, :]
        reached = [jnp.sum((tier >= t) & counted, axis=1, dtype=jnp.int32) for t in range(tiers)]
        counts += [a - b for a, b in zip(reached, [*reached[1:], jnp.zeros_like(reached[0])], strict=True)]
    return jnp.stack(counts, -1)
