"""A small schema with every kind of feature, and models, users and items made to it."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import blocks
from aif_jax.features import behaviours
from tests import light

ITEMS = 50
BLOCKS = (
    blocks.Bea(bridges=4),
    blocks.LshDin(bits=32),
    blocks.LinearMemory(width=8, keys="linear"),
    blocks.Sim("category", slots=4, length=3),
    blocks.SimTier(tiers=4, bits=32),
)
"""Every approximation at a size for tests."""
EXACT = (blocks.CrossAttention(), blocks.TargetAttention(), blocks.Sim("category", slots=4, length=3))
VARIANTS: dict[str, dict[str, Any]] = {
    "every block": {},
    "the last tiers": {"blocks": (blocks.SimTier(tiers=4, bits=32, length=6),)},
    "base": {"sequence": False, "blocks": ()},
    "dot products": {
        "blocks": (blocks.Bea(bridges=4, dot_product=True), blocks.LinearMemory(width=8, dot_product=True), blocks.DotProduct())
    },
    "matching": {"blocks": (blocks.MatchingStatistics(("item", "category")), blocks.LinearMemory(width=8))},
    "factors": {"blocks": (blocks.PureSvd(width=4, length=9), blocks.ItemOffset(), blocks.DotProduct())},
    "two SIM fields": {"blocks": (blocks.Sim("category", slots=4, length=3), blocks.Sim("item", slots=4, length=3))},
    "two_tower": {"head": aif.heads.LogitSum(), "blocks": (blocks.DotProduct(),)},
    "exact": {"blocks": (*EXACT, blocks.DotProduct())},
}
"""Config changes by name: every kind of block, and what changes the types that cross a component."""
SMALL: dict[str, Any] = dict(
    blocks=(blocks.DotProduct(),), head=aif.heads.LogitSum(), sequence=False, towers=(), width=4, short_length=3, long_length=4
)
"""Changes to a model that compiles fast."""


FIT: dict[str, Any] = dict(
    epochs=2, batch_size=64, learning_rate=0.03, task=aif.train.NextItem(negatives=3, evaluated=20), requests=60, k=10,
    progress=False,
)  # fmt: skip
"""Settings of a training of a second."""


def schema() -> aif.Schema:
    """Items with a bag, a float, content and a bid; users with a bag and floats."""
    return aif.Schema(
        item_attributes=(
            aif.Attribute(name="item", size=ITEMS),
            aif.Attribute(name="category", size=6),
            aif.Attribute(name="tags", size=9, length=3),
        ),
        user_attributes=(aif.Attribute(name="gender", size=3), aif.Attribute(name="interests", size=7, length=2)),
        actions=4,
        user_floats=2,
        item_floats=1,
        content=12,
        side=("bid",),
    )


def fit(model: aif.PreRanker, data: aif.Dataset, **given: Any) -> aif.Run:
    """`aif.fit` with the fields of its config by keyword: tests share a dict of settings, and change some."""
    fields = {field.name for field in dataclasses.fields(aif.FitConfig)} & given.keys()
    return aif.fit(model, data, aif.FitConfig(**{name: given.pop(name) for name in fields}), **given)


def config(**changes: Any) -> aif.Config:
    """Every approximation, at sizes that compile in a second or two."""
    sizes: dict[str, Any] = dict(
        schema=schema(), width=8, short_length=6, long_length=24, towers=(16,), head=aif.heads.Mlp((16, 8)), blocks=BLOCKS
    )
    return aif.Config(**(sizes | changes))


@functools.cache
def catalogue(seed: int = 0) -> aif.Catalogue:
    """The catalogue of the 49 known items, raw ids 100 to 148."""
    rng, count = np.random.default_rng(seed), ITEMS - 1
    return aif.Catalogue.from_items(
        schema(),
        np.arange(count) + 100,
        ids={"category": rng.integers(1, 6, count), "tags": rng.integers(0, 9, (count, 3))},
        floats=rng.normal(size=(count, 1)),
        content=rng.normal(size=(count, 12)),
        side={"bid": rng.uniform(1, 2, count)},
    )


def build(seed: int = 0, **changes: Any) -> tuple[aif.PreRanker, dict[str, Any]]:
    """A small model and its parameters, fitted on `catalogue()`."""
    model = aif.build(config(**changes))
    return model, init(model, seed)


def init(model: aif.PreRanker, seed: int = 0, *, items: aif.Catalogue | None = None) -> dict[str, Any]:
    """Parameters of a model on `items` or `catalogue()`. NumPy draws the trained ones, biases too; nothing is compiled."""
    fitted = aif.fit_tables(model.config, catalogue() if items is None else items, seed=seed)
    shapes = jax.eval_shape(lambda key: model.init(key, None, fitted=fitted), jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        group, last = path[0].key, path[-1].key
        fan_in = leaf.shape[-1 if group == "embedding" else 0] if leaf.ndim > 1 else 100
        drawn = rng.normal(size=leaf.shape) * fan_in**-0.5 + float(last == "scale")
        return jax.device_put(np.asarray(drawn, leaf.dtype))  # `jnp.asarray` compiles a program for each shape

    trained = {group: part for group, part in shapes.items() if group != "fitted"}
    return jax.tree_util.tree_map_with_path(draw, trained) | {"fitted": fitted}


def history(length: int, events: int, *, seed: int = 0) -> aif.Behaviours:
    """`events` events of known items in `length` places."""
    rng = np.random.default_rng(seed)
    item, action, age = rng.integers(1, ITEMS, length), rng.integers(0, 4, length), np.sort(rng.exponential(1e6, length))
    return behaviours(item, action, age, np.arange(length) < events)


def user(config: aif.Config, *, events: int = 20, seed: int = 0) -> aif.UserFeatures:
    """One user with a history as long as the config reads."""
    return aif.UserFeatures(
        ids={"gender": np.int32(1), "interests": np.array([2, 0], np.int32)},
        floats=np.random.default_rng(seed).normal(size=2).astype(np.float32),
        history=history(config.history_length, events, seed=seed),
    )


def items(count: int, *, seed: int = 1) -> aif.ItemFeatures:
    """`count` rows of the catalogue, drawn at random."""
    return catalogue().features(np.random.default_rng(seed).integers(1, ITEMS, count))


def without_gradient(model: aif.PreRanker, params: dict[str, Any], user: aif.UserFeatures) -> list[str]:
    """The trained parameters that the logits of some items do not depend on."""
    trained = {key: group for key, group in params.items() if key != "fitted"}

    def objective(trained: Any, fitted: Any) -> jax.Array:
        return (model.joint(trained | {"fitted": fitted}, user, items(40)) ** 2).sum()

    gradient = jax.jit(jax.grad(objective)).lower(trained, params["fitted"]).compile(light.options())(trained, params["fitted"])
    return [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not leaf.any()]


def pad(events: aif.Behaviours, length: int, *, poison: bool = False) -> aif.Behaviours:
    """The same history in more places; with `poison`, padding that would show wherever it leaked."""

    def grow(array: Any, fill: float) -> np.ndarray:
        array = np.asarray(array)
        return np.pad(array, (0, length - len(array)), constant_values=array.dtype.type(fill))

    names = [field.name for field in dataclasses.fields(events)]
    fill = {"item": 3, "action": 1, "age": np.nan, "mask": False} if poison else dict.fromkeys(names, 0)
    return aif.Behaviours(**{name: grow(getattr(events, name), fill[name]) for name in names})


def same(a: Any, b: Any) -> bool:
    """Whether two trees have one structure and leaves of equal dtypes, shapes and bits."""

    def equal(x: Any, y: Any) -> bool:
        x, y = np.asarray(x), np.asarray(y)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(equal, a, b))
