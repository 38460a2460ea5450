"""The map of the system: three pure functions and their composition.

    user         one user            -> UserState   asynchronous, beside retrieval
    item         one item            -> ItemRow     nearline, over the catalogue
    interaction  state x rows [C]    -> logits [C]  real time
    joint        = interaction(params, user(...), vmap(item)(...)): what training differentiates

There is no second graph for serving, so nothing can skew. Nothing here is compiled: callers jit and vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from aif_jax import baselines, bridge, interaction, item, layers, lsh, user
from aif_jax.config import Config
from aif_jax.types import ItemFeatures, Params, UserFeatures


class Component(NamedTuple):
    """A part of the model: `init(key, config) -> params` of its own group, `apply(params, inputs..., config=...)`."""

    init: Callable[..., Params]
    apply: Callable[..., Any]


class InitFn(Protocol):
    """`init(key, *, frozen=None)`: all parameters; `frozen` are fitted signature matrices, see `lsh.fit`."""

    def __call__(self, key: jax.Array, *, frozen: Params | None = None) -> Params: ...


class UserFn(Protocol):
    """`user(params, features, *, candidates=None)`: ONE user -> state."""

    def __call__(self, params: Params, features: UserFeatures, *, candidates: int | None = None) -> Any: ...


class ItemFn(Protocol):
    """`item(params, features)`: ONE item -> row."""

    def __call__(self, params: Params, features: ItemFeatures) -> Any: ...


class InteractionFn(Protocol):
    """`interaction(params, state, rows)`: one state, rows [C] -> logits float32 [C]."""

    def __call__(self, params: Params, state: Any, rows: Any) -> jax.Array: ...


class JointFn(Protocol):
    """`joint(params, features, items)`: one user, items [C] -> logits float32 [C]."""

    def __call__(self, params: Params, features: UserFeatures, items: ItemFeatures) -> jax.Array: ...


class PreRanker(NamedTuple):
    """A pre-ranking model as pure functions of its parameters."""

    config: Config
    init: InitFn
    user: UserFn
    item: ItemFn
    interaction: InteractionFn
    joint: JointFn

    def __repr__(self) -> str:
        """Which functions it is made of, and the config."""
        parts = {"user": self.user, "item": self.item, "interaction": self.interaction}
        named = [f"{part}={_name(function)}" for part, function in parts.items()]
        return f"PreRanker({', '.join(named)}, config={self.config!r})"


def _name(function: Any) -> str:
    """Where a component's function stands, without the config that `assemble` bound to it."""
    inner = getattr(function, "func", function)
    return f"{inner.__module__}.{inner.__qualname__}" if hasattr(inner, "__qualname__") else repr(inner)


AIF = {
    "user": Component(user.init, user.apply),
    "item": Component(item.init, item.apply),
    "interaction": Component(interaction.init, interaction.apply),
}
ARCHITECTURES: dict[str, dict[str, Component]] = {
    "aif": AIF,
    "two_tower": {name: Component(*pair) for name, pair in baselines.TWO_TOWER.items()},
    "cold": {name: Component(*pair) for name, pair in baselines.COLD.items()},
    "exact": {name: Component(*pair) for name, pair in baselines.EXACT.items()},
}


def build(config: Config) -> PreRanker:
    """The pre-ranker that a config describes.

    Example:
      >>> import jax, aif_jax as aif
      >>> model = aif.build(aif.tiny())
      >>> sorted(model.init(jax.random.key(0)))
      ['bridge', 'embedding', 'frozen', 'interaction', 'item', 'user']
    """
    return assemble(config, **ARCHITECTURES[config.architecture])


def assemble(config: Config, *, user: Component, item: Component, interaction: Component) -> PreRanker:
    """A pre-ranker from three components, for towers of one's own.

    Each component's `init(key, config)` gives the parameter group of its name; `apply` sees all groups.
    """
    parts = {"user": user, "item": item, "interaction": interaction}
    user_fn: UserFn = partial(user.apply, config=config)
    item_fn: ItemFn = partial(item.apply, config=config)
    interaction_fn: InteractionFn = partial(interaction.apply, config=config)

    def init(key: jax.Array, *, frozen: Params | None = None) -> Params:
        keys = dict(zip(("embedding", "bridge", "frozen", *parts), jax.random.split(key, 6), strict=True))
        params: Params = {"embedding": layers.embedding_init(keys["embedding"], config.schema, config.width)}
        if config.bridges and config.architecture == "aif":
            params["bridge"] = bridge.init(keys["bridge"], bridges=config.bridges, width=config.width)
        params |= {name: part.init(keys[name], config) for name, part in parts.items()}
        fixed = frozen if frozen is not None else lsh.random_frozen(keys["frozen"], config)
        lsh.check_frozen(fixed, config)
        return params | ({"frozen": fixed} if fixed else {})

    def joint(params: Params, features: UserFeatures, items: ItemFeatures) -> jax.Array:
        candidates = jnp.shape(items.ids["item"])[0]
        rows = jax.vmap(item_fn, (None, 0))(params, items)
        return interaction_fn(params, user_fn(params, features, candidates=candidates), rows)

    return PreRanker(config, init, user_fn, item_fn, interaction_fn, joint)
