"""The map of the system: three pure functions and their composition, see `PreRanker`."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import interaction, item, layers, user
from aif_jax.blocks.block import expect_arrays
from aif_jax.catalogue import Catalogue
from aif_jax.checks import check_encoding, expect, expect_finite
from aif_jax.config import Config
from aif_jax.scores import GROUP
from aif_jax.trees import leaves_by_path
from aif_jax.types import ItemFeatures, Params, UserFeatures


class Component(NamedTuple):
    """A part of a model: `init(key, config)` gives its parameters, `apply(params, inputs..., config=...)` what it computes.

    Attributes:
      init: `(key, config) -> params`, the component's group of parameters: nested dicts of floats by strings.
      apply: `(params, inputs, ..., config=config)`; `params` are all groups of the model.
    """

    init: Callable[..., Params]
    apply: Callable[..., Any]


class PreRanker(NamedTuple):
    """A pre-ranking model: pure functions of its parameters, from `build` or `assemble`.

    Nothing is compiled: callers jit and vmap. Given few candidates, `joint` may use a cheaper form of a block than the staged
    functions do; the two forms are tested equal.

    Attributes:
      config: sizes and blocks.
      init: `(key, catalogue, *, seed=0, fitted=None) -> params`, a nested dict of float32 arrays: trained ones from the key,
        fitted ones from the catalogue. With `fitted`, what `fit_tables` returned before, nothing is fitted and the catalogue
        may be None; `{}` gives the trained parameters alone. Raises ValueError where `fitted` has other tables, a group of no
        block, or another number of items; other arrays of a block are taken as they are: `fit` alone knows their shapes.
      user: `(params, UserFeatures) -> UserState` of ONE user; off the critical path, while retrieval runs.
      item: `(params, ItemFeatures) -> ItemRow` of ONE item; nearline, over the catalogue.
      interaction: `(params, UserState, ItemRow [C]) -> logits`, float32 [C], or [C, T] for T objectives; the critical path.
      joint: `(params, UserFeatures, ItemFeatures [C]) -> logits`: the three composed; training adds `Block.training_logit`.

    Example:
      >>> import jax, numpy as np, aif_jax as aif
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> catalogue = aif.Catalogue.from_items(schema, range(10, 18), ids={"category": [1, 2] * 4})
      >>> model = aif.build(aif.presets.two_tower(schema))
      >>> params, user = model.init(jax.random.key(0), catalogue), aif.empty_user(schema, length=256)
      >>> rows = jax.vmap(model.item, (None, 0))(params, catalogue.features([1, 2, 3]))
      >>> model.interaction(params, model.user(params, user), rows).shape
      (3,)
    """

    config: Config
    init: Callable[..., Params]
    user: Callable[[Params, UserFeatures], Any]
    item: Callable[[Params, ItemFeatures], Any]
    interaction: Callable[[Params, Any, Any], jax.Array]
    joint: Callable[[Params, UserFeatures, ItemFeatures], jax.Array]

    def __repr__(self) -> str:
        named = [f"{part}={name_of(getattr(self, part))}" for part in ("user", "item", "interaction")]
        return f"PreRanker({', '.join(named)}, config={self.config!r})"


USER = Component(user.init, user.apply)
ITEM = Component(item.init, item.apply)


def build(config: Config) -> PreRanker:
    """Return the pre-ranker of a config: the same one for the same config, so that its programs are compiled once in a process.

    Example:
      >>> import aif_jax as aif
      >>> schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> aif.build(aif.presets.aif(schema)) is aif.build(aif.presets.aif(schema))
      True
    """
    expected = "a config of `build`; give the model that assemble(config, ...) makes, as model="
    expect(not config.assembled, "build", expected, f"one of `assemble` with {', '.join(config.assembled)}")
    return _built(config, config.schema.encoding, repr(config.to_json()))  # == leaves out the encoding, and takes 1 for 1.0


def assemble(config: Config, *, user: Component | layers.Module = USER, item: Component | layers.Module = ITEM) -> PreRanker:
    """Return a pre-ranker with towers of yours; what reads pairs of user and item is a head or a block.

    A Flax module as `user` or `item` replaces the MLP of that tower: from the tower's inputs [w] of ONE user or item to the
    vector [D]; blocks stay as they are. An NNX module is one by `nnx.bridge.to_linen`.

    A component of yours calls the blocks of the config as `aif_jax.user` and `aif_jax.item` do. One that reads embedding rows
    of other ids than its features hold trains with `sparse=()`, see `train.make_step`.

    The config of the model names the functions that replace the package's (`Config.assembled`). What is saved of the model is
    opened with `model=` alone, by `aif.open`, `Run.load` and `export.restore`; commands cannot open it.
    """
    parts = ("user", user, USER.apply), ("item", item, ITEM.apply)
    for part, one, _ in parts:
        fits = isinstance(one, Component | layers.Module)
        expect(fits, f"assemble {part}", "a Component, or an instance of a Flax module", repr(one), error=TypeError)
    yours = [(part, one if isinstance(one, layers.Module) else one.apply) for part, one, ours in parts if one.apply is not ours]
    config = config.replace(assembled=tuple(f"{part}={name_of(one).rpartition('.')[2]}" for part, one in yours))
    hinted = user is USER or isinstance(user, layers.Module)  # a component of yours need not know how many candidates follow
    user, item = _component(user, USER), _component(item, ITEM)
    item_fn, interaction_fn = partial(item.apply, config=config), partial(interaction.apply, config=config)

    def init(key: jax.Array, catalogue: Catalogue | None, *, seed: int = 0, fitted: Params | None = None) -> Params:
        if fitted is None:
            fitted = fit_tables(config, catalogue, seed=seed)  # type: ignore[arg-type]  # which refuses None
        elif fitted:
            _check_fitted(config, fitted)
        keys = dict(zip(("embedding", "user", "item", "head", "blocks"), jax.random.split(key, 5), strict=True))
        block_keys = jax.random.split(keys["blocks"], max(1, len(config.blocks)))
        blocks = {block.name: block.init(k, config) for k, block in zip(block_keys, config.blocks, strict=False)}
        for name, trained in expect_arrays(blocks, "init").items():
            expect(not trained.keys() & fitted.get(name, {}).keys(), name, "`init` of other names than `fit`", sorted(trained))
        return {
            "embedding": layers.embedding_init(keys["embedding"], config.schema, config.width),
            **expect_arrays({"user": user.init(keys["user"], config), "item": item.init(keys["item"], config)}, "init"),
            "blocks": {name: trained for name, trained in blocks.items() if trained},
            "head": interaction.init(keys["head"], config),
            "fitted": fitted,
        }

    def joint(params: Params, features: UserFeatures, items: ItemFeatures) -> jax.Array:
        rows = jax.vmap(item_fn, (None, 0))(params, items)
        hint = {"candidates": jnp.shape(items.ids["item"])[0]} if hinted else {}
        return interaction_fn(params, user.apply(params, features, config=config, **hint), rows)

    return PreRanker(config, init, partial(user.apply, config=config), item_fn, interaction_fn, joint)


def _component(given: Component | layers.Module, ours: Component) -> Component:
    """Return a component as it is, or the package's with a Flax module as its network."""
    if not isinstance(given, layers.Module):
        return given
    return Component(partial(ours.init, network=given), partial(ours.apply, network=given))


@functools.lru_cache(maxsize=64)
def _built(config: Config, *_: str) -> PreRanker:
    """Return the model of a config as it is written, for data of that encoding."""
    return assemble(config)


def rebuilt(model: PreRanker, config: Config, name: str) -> PreRanker:
    """Return the model of a config that `name` may have changed; ValueError where one of `assemble` would lose its parts."""
    way_out = "change params and config without an edit, and call assemble(config, ...) with these again"
    others, same = ", ".join(model.config.assembled), config is model.config
    expect(same or not others, name, "a model of `build`", f"one of `assemble` with {others}; {way_out}")
    return model if same else build(config)


def fit_tables(config: Config, catalogue: Catalogue, *, seed: int = 0) -> Params:
    """Return the fitted group alone: what blocks and tables derive from a catalogue; for a catalogue that has changed.

    Args:
      config: config of the model.
      catalogue: items of the model's vocabulary.
      seed: seed of random rotations and starts.

    Returns:
      `fields`, the behaviour fields of every item, and a dict for each table and block that fits something.

    Raises:
      ValueError: another number of rows than the schema's; no content although the schema has one.
      EncodingMismatch: a catalogue of another encoder than the schema's.
    """
    expect(isinstance(catalogue, Catalogue), "init catalogue", "a Catalogue", type(catalogue).__name__, error=TypeError)
    check_encoding("init catalogue", expected=config.schema.encoding, got=catalogue.schema.encoding)
    size, statistics = config.schema.table_sizes["item"], len(config.schema.statistics)
    expect(len(catalogue) == size, "init catalogue", f"a row for each of the {size} items of the schema", len(catalogue))
    items = catalogue.with_statistics(np.zeros((size, statistics), np.float32)).items if statistics else catalogue.items
    has_content = not config.schema.content or items.content is not None
    expect(has_content, "init catalogue", f"content [{size}, {config.schema.content}]", None)
    with jax.ensure_compile_time_eval():  # fits run on the host, also where `init` is traced
        parts = {part.name: part.fit(items, config, seed=seed) for part in (*config.tables, *config.blocks)}
        fields = {name: jnp.asarray(items.ids[name], jnp.int32) for name in config.schema.behaviour_fields if name != "item"}
    fitted = {"fields": fields} | {name: made for name, made in expect_arrays(parts, "fit").items() if made}
    for path, array in leaves_by_path(fitted).items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            expect_finite(np.asarray(array, np.float32), f"fitted {path}")
    _check_fitted(config, fitted)
    return fitted


def _check_fitted(config: Config, fitted: Params) -> None:
    """Raise ValueError for a fitted group of other tables or unknown blocks, or without a row for each item."""
    size, wanted = config.schema.table_sizes["item"], {"fields", *(table.name for table in config.tables)}
    extra = fitted.keys() - wanted - {block.name for block in config.blocks} - {GROUP}
    got = f"{sorted(fitted)}; fit_tables makes them for a config"
    expect(wanted <= fitted.keys() and not extra, "fitted", sorted(wanted), got)
    by_item = {"fields": fitted["fields"]} | {table.name: ("table",) for table in config.tables}
    by_item, arrays = by_item | {block.name: block.per_item or () for block in config.blocks}, leaves_by_path(fitted)
    for path in (f"{name}/{path}" for name, paths in by_item.items() for path in paths):
        shape = getattr(arrays.get(path), "shape", None)
        got = f"none; there are {sorted(arrays)}" if shape is None else f"shape {list(shape)}"
        expect((shape or ())[:1] == (size,), "fitted", f"{size} rows in {path}, row 0 and one for each item (per_item)", got)


def name_of(function: Any) -> str:
    """Return module and qualified name of a function, of a partial's function, or of a callable's class."""
    inner = getattr(function, "func", function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"
