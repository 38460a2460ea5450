"""Sizes and blocks that the models of `question` share, and two blocks that `ranker_recall` judges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from aif_jax import Config, heads, layers
from aif_jax.blocks import Bea, Block, DotProduct, HeadInputs, ItemView, LinearMemory, PureSvd, Sim, SimTier, UserView, block
from aif_jax.train.edits import svd_factors
from aif_jax.types import Behaviours, ItemFeatures, ItemRow, Params, UserState

SIZES: dict[str, Any] = dict(width=32, short_length=32, long_length=128, towers=(64,), head=heads.Mlp((64, 32)))
SMOKE: dict[str, Any] = dict(width=8, short_length=8, long_length=32, towers=(16,), head=heads.Mlp((16, 8)), sequence=False)
BEA, SIM, DOT = Bea(bridges=10, dot_product=True), Sim("each"), DotProduct()
"""`SIM` stands for a cache of every SIM field of the data set."""
LEARNED = LinearMemory(dot_product=True)
WINDOWED = dataclasses.replace(SimTier(tiers=16, bits=128), length=512)
HALF_LIVES = (2.0, 8.0, 32.0, 128.0)  # in events
ITERATIONS = 20  # of k-means


def decayed(events: Behaviours) -> jax.Array:
    """Return weights [L, half-lives] of the events of a history: halved every so many events, 0 where there is none."""
    mask = jnp.asarray(events.mask)
    place = jnp.arange(mask.shape[0]).astype(jnp.float32)
    return jnp.where(mask[:, None], jnp.exp2(-place[:, None] / jnp.array(HALF_LIVES)[None]), 0.0)


@block
class RecentVectors(Block):
    """A user vector for each of HALF_LIVES, the decayed mean of the long history times a trained map, dotted with the item's.

    Real time: [C, D] x [D, 4] and [C, 4] x [4, H].
    """

    def widths(self, config: Config) -> dict[str, int]:
        return {"agreement": len(HALF_LIVES)}

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"map": jax.random.normal(key, (len(HALF_LIVES), config.width, config.width)) / config.width**0.5}

    def user(self, params: Params, user: UserView) -> jax.Array:
        weights = decayed(user.long)
        means = (weights / jnp.maximum(weights.sum(0), 1e-6)[None]).T.astype(user.embedded.dtype) @ user.embedded
        return jnp.einsum("kd,kde->ke", means, params["map"])

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        vectors = jnp.asarray(state.blocks[self.name])
        agreement = jnp.asarray(rows.vector) @ vectors.T / math.sqrt(vectors.shape[-1])
        return HeadInputs(pairs=((agreement, kernels["agreement"]),), logit=agreement.sum(-1))


@block
class Similar(Block):
    """How many events of the long history are like the candidate, and how recent they are: events of the same cluster.

    For each clustering log(1 + sum of weights) of the events in the candidate's cluster, without decay and with each of
    HALF_LIVES: the user side sums them by cluster, a candidate gathers its own. Real time: C rows of 5 numbers a clustering.
    `with_clusters` gives the clusters, which are of the training events; one event of a sample hardly moves a cluster.

    Attributes:
      clusters: clusters of each clustering; 0 is for items without a training event.
    """

    per_item = ("table",)
    clusters: tuple[int, ...] = (64, 512)

    def widths(self, config: Config) -> dict[str, int]:
        return {"similar": len(self.clusters) * (1 + len(HALF_LIVES))}

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        return {"table": jnp.zeros((config.schema.table_sizes["item"], len(self.clusters)), jnp.int32)}

    def user(self, params: Params, user: UserView) -> tuple[jax.Array, ...]:
        weights = jnp.concatenate([jnp.asarray(user.long.mask)[:, None].astype(jnp.float32), decayed(user.long)], 1)
        of = layers.lookup(params["table"], jnp.asarray(user.long.item))
        sums = (jnp.zeros((1 + size, weights.shape[1])).at[of[:, n]].add(weights) for n, size in enumerate(self.clusters))
        return tuple(jnp.log1p(each).at[0].set(0.0) for each in sums)

    def item(self, params: Params, item: ItemView) -> jax.Array:
        return layers.lookup(params["table"], jnp.asarray(item.features.ids["item"]))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        own, tables = jnp.asarray(rows.blocks[self.name]), state.blocks[self.name]
        found = jnp.concatenate([jnp.asarray(table)[own[:, n]] for n, table in enumerate(tables)], 1)
        return HeadInputs(pairs=((found.astype(kernels["similar"].dtype), kernels["similar"]),))


def with_clusters(params: Params, config: Config, user: np.ndarray, item: np.ndarray) -> Params:
    """Return parameters whose `Similar`, if there is one, has k-means clusters of the PureSVD factors of training events."""
    for similar in (one for one in config.blocks if isinstance(one, Similar)):
        size = config.schema.table_sizes["item"]
        factors = svd_factors(user, item, size=size, block=PureSvd(width=32, length=128))
        norm = np.linalg.norm(factors, axis=1)
        some = np.flatnonzero(norm > 0)
        table = np.zeros((size, len(similar.clusters)), np.int32)
        for n, count in enumerate(similar.clusters):
            of = kmeans2(factors[some] / norm[some, None], min(count, len(some)), iter=ITERATIONS, minit="points", seed=0)[1]
            table[some, n] = 1 + of
        params = params | {"fitted": params["fitted"] | {similar.name: {"table": jnp.asarray(table)}}}
    return params
