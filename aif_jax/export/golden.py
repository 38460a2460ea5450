"""Golden inputs and outputs: a small case for every function, its outputs made by the Python model, not by the export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aif_jax.data.schema import Attribute
from aif_jax.export.functions import item_specs, named, user_specs
from aif_jax.model import PreRanker
from aif_jax.trees import nest
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures

USERS = 3
ITEMS = 70  # more than the least candidate count, and no bucket


def golden_case(model: PreRanker, params: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays named `function.inputs/name` and `function.outputs/name`; three users, one of them without a history."""
    tree, rng = nest(params), np.random.default_rng(seed)
    users, items = random_users(model, rng), random_items(model, rng)
    states = jax.jit(jax.vmap(model.user, (None, 0)))(tree, users)
    one, state = jax.tree.map(lambda x: x[0], (users, states))
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(tree, items)
    cases: dict[str, tuple[Any, Any]] = {
        "user": (one, state),
        "users": (users, states),
        "item": (items, rows),
        "interaction": ({"state": state, "rows": rows}, {"logits": jax.jit(model.interaction)(tree, state, rows)}),
    }
    arrays = {}
    for function, (inputs, outputs) in cases.items():
        arrays |= {f"{function}.inputs/{name}": np.asarray(value) for name, value in named(inputs).items()}
        arrays |= {f"{function}.outputs/{name}": np.asarray(value) for name, value in named(outputs).items()}
    return arrays


def random_users(model: PreRanker, rng: np.random.Generator) -> UserFeatures:
    """USERS users in the model's schema with 3/4 full histories; the last one's are empty."""
    config = model.config
    specs = user_specs(config, config.long_length, lead=(USERS,))
    long = _behaviours(model, rng, specs.long)
    return UserFeatures(
        ids=_ids(config.schema.user_attributes, specs.ids, rng),
        floats=_normal(specs.floats, rng),
        short=jax.tree.map(lambda x: x[:, : config.short_length], _longer(long, config.short_length)),
        long=long,
    )


def random_items(model: PreRanker, rng: np.random.Generator) -> ItemFeatures:
    """ITEMS items in the model's schema."""
    schema = model.config.schema
    specs = item_specs(model.config, ITEMS)
    return ItemFeatures(
        ids=_ids(schema.item_attributes, specs.ids, rng),
        floats=_normal(specs.floats, rng),
        content=None if specs.content is None else _normal(specs.content, rng),
        side={name: np.abs(_normal(spec, rng)) for name, spec in specs.side.items()},
    )


def _behaviours(model: PreRanker, rng: np.random.Generator, specs: Behaviours) -> Behaviours:
    schema, shape = model.config.schema, specs.mask.shape
    mask = np.broadcast_to(np.arange(shape[1]) < shape[1] * 3 // 4, shape).copy()
    mask[-1] = False
    attributes = [schema.item_attribute(name) for name in schema.behaviour_fields]
    signature = specs.signature
    return Behaviours(
        ids={a.name: (rng.integers(1, a.size, shape) * mask).astype(np.int32) for a in attributes},
        action=(rng.integers(0, schema.actions, shape) * mask).astype(np.int32),
        age=(np.sort(rng.exponential(1e6, shape), axis=1) * mask).astype(np.float32),
        mask=mask,
        signature=None if signature is None else rng.integers(0, 1 << 32, signature.shape, np.uint32) * mask[..., None],
    )


def _longer(history: Behaviours, length: int) -> Behaviours:
    """The same histories with room for at least `length` events."""
    return jax.tree.map(
        lambda x: np.pad(x, [(0, 0), (0, max(0, length - x.shape[1]))] + [(0, 0)] * (x.ndim - 2)),
        history,
    )


def _ids(attributes: tuple[Attribute, ...], specs: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {a.name: rng.integers(0, a.size, specs[a.name].shape).astype(np.int32) for a in attributes}


def _normal(spec: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=spec.shape).astype(np.float32)
