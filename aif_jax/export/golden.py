"""Golden inputs and outputs: a small case for every function, its outputs made by the Python model, not by the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aif_jax.export.functions import named, values
from aif_jax.features import Leaf, behaviours, item_layout, user_layout
from aif_jax.model import PreRanker
from aif_jax.scores import Expression
from aif_jax.trees import nest

USERS = 3
ITEMS = 70  # more than the least candidate count, and no bucket


def golden_case(
    model: PreRanker, params: Mapping[str, Any], orders: Mapping[str, Expression] | None = None
) -> dict[str, np.ndarray]:
    """Arrays named `function.inputs/name` and `function.outputs/name`, of random users and items.

    A user has events in about three quarters of the places that the model reads, the last one has none.
    """
    config, tree, rng = model.config, nest(params), np.random.default_rng(0)
    users = random_features(user_layout(config.schema), rng, length=config.history_length, lead=(USERS,))
    history = users.history
    mask = history.mask & (np.arange(USERS) < USERS - 1)[:, None]
    users = dataclasses.replace(users, history=behaviours(history.item, history.action, history.age, mask))
    items = random_features(item_layout(config.schema), rng, lead=(ITEMS,))
    states = jax.jit(jax.vmap(model.user, (None, 0)))(tree, users)
    one, state = jax.tree.map(lambda x: x[0], (users, states))
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(tree, items)
    cases: dict[str, tuple[Any, Any]] = {
        "user": (one, state),
        "users": (users, states),
        "item": (items, rows),
        "interaction": ({"state": state, "rows": rows}, {"logits": jax.jit(model.interaction)(tree, state, rows)}),
    }
    logits = cases["interaction"][1]["logits"]
    side = {name: rng.exponential(1, ITEMS).astype(np.float32) for name in sorted(config.schema.side)}
    for name, (function, read) in values(model, params, orders or {}).items():
        inputs = {"logits": logits} | ({"side": {key: side[key] for key in read}} if read else {})
        cases[name] = inputs, jax.jit(function)(tree, inputs)
    return {
        f"{function}.{part}/{name}": np.asarray(value)
        for function, pair in cases.items()
        for part, arrays in zip(("inputs", "outputs"), pair, strict=True)
        for name, value in named(arrays).items()
    }


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
