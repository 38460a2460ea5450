"""Golden inputs and outputs: a small case for every function, its outputs made by the Python model, not by the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aif_jax.config import Config
from aif_jax.export.functions import named
from aif_jax.features import Leaf, behaviours, item_layout, user_layout
from aif_jax.model import PreRanker
from aif_jax.schema import Schema
from aif_jax.trees import nest
from aif_jax.types import ItemFeatures, UserFeatures

USERS = 3
ITEMS = 70  # more than the least candidate count, and no bucket


def golden_case(model: PreRanker, params: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays named `function.inputs/name` and `function.outputs/name`; three users, the last one without a history."""
    tree, rng = nest(params), np.random.default_rng(seed)
    users, items = random_users(model.config, rng), random_items(model.config.schema, rng)
    states = jax.jit(jax.vmap(model.user, (None, 0)))(tree, users)
    one, state = jax.tree.map(lambda x: x[0], (users, states))
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(tree, items)
    cases: dict[str, tuple[Any, Any]] = {
        "user": (one, state),
        "users": (users, states),
        "item": (items, rows),
        "interaction": ({"state": state, "rows": rows}, {"logits": jax.jit(model.interaction)(tree, state, rows)}),
    }
    return {
        f"{function}.{part}/{name}": np.asarray(value)
        for function, pair in cases.items()
        for part, values in zip(("inputs", "outputs"), pair, strict=True)
        for name, value in named(values).items()
    }


def random_users(config: Config, rng: np.random.Generator, count: int = USERS) -> UserFeatures:
    """Users with events in about three quarters of the places that the model reads; the last user has none."""
    users = random_features(user_layout(config.schema), rng, length=config.history_length, lead=(count,))
    history = users.history
    mask = np.asarray(history.mask) & (np.arange(count) < count - 1)[:, None]
    return dataclasses.replace(users, history=behaviours(history.item, history.action, history.age, mask))


def random_items(schema: Schema, rng: np.random.Generator, count: int = ITEMS) -> ItemFeatures:
    """Items, some of them unknown ones."""
    return random_features(item_layout(schema), rng, lead=(count,))


def random_features(layout: Any, rng: np.random.Generator, *, length: int = 0, lead: tuple[int, ...] = ()) -> Any:
    """Features at random for a layout, in every range that it allows."""

    def draw(leaf: Leaf) -> np.ndarray:
        shape = (*lead, *(length if isinstance(size, str) else size for size in leaf.shape))
        if leaf.size is not None:
            values = rng.integers(0, leaf.size, shape)
        elif leaf.dtype == np.bool_:
            values = rng.random(shape) < 0.75
        else:
            values = rng.normal(size=shape) if leaf.minimum is None else leaf.minimum + rng.exponential(1e6, shape)
        return np.asarray(values, leaf.dtype)

    return jax.tree.map(draw, layout)
