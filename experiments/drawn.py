"""Features drawn at random and the head alone, for measuring speed: what the numbers say does not matter there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import layers
from aif_jax.features import LENGTH, Leaf, behaviours, item_layout, user_layout
from aif_jax.types import Params


def items(schema: aif.Schema, shape: tuple[int, ...], *, seed: int = 0) -> aif.ItemFeatures:
    """Return features of known items with leading axes `shape`; every id is drawn uniformly from 1 on."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: _draw(leaf, shape, rng), item_layout(schema))


def catalogue(schema: aif.Schema, *, seed: int = 0) -> aif.Catalogue:
    """Return a catalogue of all items of the schema's vocabulary; raw ids are the rows."""
    raw = np.arange(1, schema.table_sizes["item"], dtype=np.int32)
    drawn = items(schema, (len(raw),), seed=seed)
    ids = dict(drawn.ids) | {"item": raw}
    return aif.Catalogue.from_items(schema, raw, ids=ids, floats=drawn.floats, content=drawn.content, side=drawn.side)


def users(
    schema: aif.Schema, length: int, shape: tuple[int, ...] = (), *, events: Any = None, seed: int = 0
) -> aif.UserFeatures:
    """Return features of users with leading axes `shape` and `length` places of history, the first `events` filled."""
    rng = np.random.default_rng(seed)
    layout = user_layout(schema)
    drawn = jax.tree.map(lambda leaf: _draw(leaf, (*shape, *[length] * (LENGTH in leaf.shape)), rng), layout)
    age = np.sort(rng.exponential(1e6, (*shape, length)), axis=-1)
    mask = np.broadcast_to(np.arange(length) < (length if events is None else np.asarray(events)[..., None]), age.shape)
    return dataclasses.replace(drawn, history=behaviours(drawn.history.item, drawn.history.action, age, mask))


def head_alone(config: aif.Config, candidates: int) -> tuple[Callable[[Params, jax.Array], jax.Array], jax.Array]:
    """Return the head as one MLP over ready inputs, `f(params["head"], inputs)`, and such inputs [C, width]."""
    widths = config.head_features

    def scores(params: Params, inputs: jax.Array) -> jax.Array:
        first = params["first"]
        kernel = jnp.concatenate([first["kernels"][block][name] for block, named in widths.items() for name in named])
        return layers.mlp(params["rest"], jax.nn.relu(inputs @ kernel + first["bias"][None, :]))[..., 0]

    return scores, jnp.ones((candidates, sum(width for named in widths.values() for width in named.values())))


def _draw(leaf: Leaf, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    shape = (*shape, *(int(size) for size in leaf.shape if size != LENGTH))
    if leaf.size is not None:
        return rng.integers(1, leaf.size, shape, dtype=np.int32)
    return rng.normal(size=shape).astype(leaf.dtype)
