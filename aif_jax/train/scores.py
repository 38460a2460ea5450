"""Joint scores of batches: for training in a precision of choice, for evaluation compiled once per model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.data.batches import Batch
from aif_jax.model import PreRanker
from aif_jax.types import ItemFeatures, Params, UserFeatures


def score(model: PreRanker, params: Params, batch: Batch, *, compute_dtype: Any = jnp.float32) -> jax.Array:
    """Joint scores of a batch, float32 [B, C]; call it inside jit."""
    return joint_scores(model, params, batch.users, batch.items, compute_dtype=compute_dtype)


def joint_scores(
    model: PreRanker, params: Params, users: UserFeatures, items: ItemFeatures, *, compute_dtype: Any = jnp.float32
) -> jax.Array:
    """Joint scores of B users with C candidates each, float32 [B, C]; call it inside jit.

    Trained parameters, float features and content are cast to `compute_dtype`; ages, whose buckets need their precision, and
    the "fitted" group stay as they are.
    """
    if compute_dtype != jnp.float32:
        cast = partial(jax.tree.map, lambda x: x.astype(compute_dtype) if x.dtype == jnp.float32 else x)
        params = {name: group if name == "fitted" else cast(group) for name, group in params.items()}
        users = dataclasses.replace(users, floats=cast(users.floats))
        items = dataclasses.replace(items, floats=cast(items.floats), content=cast(items.content))
    return jax.vmap(model.joint, (None, 0, 0))(params, users, items).astype(jnp.float32)


def predict(model: PreRanker, params: Params, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Joint scores of each batch, float32 [B, C], masked candidates included; compiles once for each model and shape."""
    for batch in batches:
        yield np.asarray(_compiled(params, batch.users, batch.items, model=model))


@partial(jax.jit, static_argnames="model")
def _compiled(params: Params, users: UserFeatures, items: ItemFeatures, *, model: PreRanker) -> jax.Array:
    return joint_scores(model, params, users, items)
