"""Features made to the demo schema, for tests of the model."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

import aif_jax as aif
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures

VARIANTS: dict[str, dict] = {
    "every block": {},
    "codes": {"simtier": "codes"},
    "several codes by action": {"simtier": "codes", "codes_per_item": 3, "tiers_by_action": True},
    "codes by cosine": {"simtier": "codes", "codes_by": "cosine", "codes_per_item": 2, "memory": ("learned",)},
    "tiers by action and window": {"tiers_by_action": True, "tier_windows": (2, 6)},
    "base": {"sequence": False, "bridges": 0, "memory": (), "sim_fields": (), "simtier": "off"},
    "matching": {"matching": True, "memory_keys": "softmax"},
    "two SIM fields": {"sim_fields": ("category", "item")},
    "two_tower": {"architecture": "two_tower"},
    "cold": {"architecture": "cold"},
    "exact": {"architecture": "exact"},
}
"""Config changes by name: every architecture, and the switches that change what crosses a component."""


def build(seed: int = 0, **changes) -> tuple[aif.PreRanker, dict]:
    """A tiny model and its parameters, with the signature matrix fitted on random content."""
    config = aif.tiny(**changes)
    model = aif.build(config)
    content = np.random.default_rng(seed).normal(size=(50, config.schema.content))
    return model, model.init(jax.random.key(seed), frozen=aif.lsh.fit(content, config, seed=seed))


def behaviours(rng: np.random.Generator, config: aif.Config, length: int, count: int) -> Behaviours:
    """`count` events in `length` places."""
    mask = np.arange(length) < count
    return Behaviours(
        ids={
            "item": (rng.integers(1, 50, length) * mask).astype(np.int32),
            "category": (rng.integers(1, 6, length) * mask).astype(np.int32),
        },
        action=(rng.integers(0, 4, length) * mask).astype(np.int32),
        age=(np.sort(rng.exponential(1e6, length)) * mask).astype(np.float32),
        mask=mask,
        signature=rng.integers(0, 2**32, (length, config.signature_words), dtype=np.uint32) * mask[:, None].astype(np.uint32),
    )


def user(config: aif.Config, *, events: int = 20, seed: int = 0) -> UserFeatures:
    """One user; the short history is the start of the long one."""
    rng = np.random.default_rng(seed)
    long = behaviours(rng, config, config.long_length, events)
    short = jax.tree.map(lambda x: x[: config.short_length], long)
    return UserFeatures(
        ids={"gender": np.int32(1), "interests": np.array([2, 0], np.int32)},
        floats=rng.normal(size=2).astype(np.float32),
        short=short,
        long=long,
    )


def items(config: aif.Config, count: int, *, seed: int = 1) -> ItemFeatures:
    """`count` items."""
    rng = np.random.default_rng(seed)
    return ItemFeatures(
        ids={
            "item": rng.integers(1, 50, count).astype(np.int32),
            "category": rng.integers(1, 6, count).astype(np.int32),
            "tags": rng.integers(0, 9, (count, 3)).astype(np.int32),
        },
        floats=rng.normal(size=(count, 1)).astype(np.float32),
        content=rng.normal(size=(count, config.schema.content)).astype(np.float32),
        side={"bid": rng.uniform(1, 2, count).astype(np.float32)},
    )


def pad(history: Behaviours, length: int, *, poison: bool = False) -> Behaviours:
    """The same history in more places; with `poison`, padding that would show wherever it leaked."""

    def grow(array: np.ndarray, fill: float) -> np.ndarray:
        width = [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, width, constant_values=array.dtype.type(fill))

    grown = dataclasses.replace(
        history,
        ids={name: grow(np.asarray(ids), 3 if poison else 0) for name, ids in history.ids.items()},
        action=grow(np.asarray(history.action), 1 if poison else 0),
        age=grow(np.asarray(history.age), np.nan if poison else 0),
        mask=grow(np.asarray(history.mask), False),
        signature=grow(np.asarray(history.signature), 0x55555555 if poison else 0),
    )
    return grown
