"""The functions of a model in their exported form: flat dicts of arrays in and out, symbolic axes, only what is read.

    user         one user, long history axis l
    users        B users, axes b and l
    item         N items, axis n
    interaction  one state and C rows, axis c (and l where a state carries the whole history)

Dataclasses are flattened to names such as "short.ids.item", so that a reader needs no registered types. Parameters and inputs
that a function does not read are left out of its signature, which also tells which parameters are used at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from aif_jax.config import Config
from aif_jax.data.schema import Attribute
from aif_jax.model import PreRanker
from aif_jax.trees import nest
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures

LEAST_CANDIDATES = 64
PROBE = {"b": 2, "c": 1024, "l": 512, "n": 2}
"""Sizes at which a function is looked at to see what it reads."""
Specs = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """One function, exported.

    Attributes:
      exported: of `f(params, inputs) -> outputs`, flat dicts.
      function: that function.
      inputs: specs of the inputs that it reads, by name, with symbolic dimensions.
      outputs: specs of its outputs.
      params: paths of the parameters that it reads.
      ignored: names of inputs that the model's features have and this function does not read.
    """

    exported: jax.export.Exported
    function: Callable[..., dict[str, jax.Array]]
    inputs: Specs
    outputs: Specs
    params: tuple[str, ...]
    ignored: tuple[str, ...]


def export_all(model: PreRanker, params: Mapping[str, Any], *, platforms: Sequence[str]) -> dict[str, Exported]:
    """Exports the functions of a model.

    Args:
      model: built by `aif_jax.build` or `assemble`.
      params: leaves by path, arrays or specs.
      platforms: names among "cpu", "cuda", "rocm", "tpu"; one artefact serves them all.
    """
    config = model.config
    flat_params = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    tree, item = nest(flat_params), jax.vmap(model.item, (None, 0))
    one, many, items, pairs = (_symbols(names, minimums(config)) for names in ("l", "bl", "n", "cl"))
    pair = {
        "state": jax.eval_shape(model.user, tree, user_specs(config, pairs["l"])),
        "rows": jax.eval_shape(item, tree, item_specs(config, pairs["c"])),
    }
    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        "user": (model.user, user_specs(config, one["l"])),
        "users": (jax.vmap(model.user, (None, 0)), user_specs(config, many["l"], lead=(many["b"],))),
        "item": (item, item_specs(config, items["n"])),
        "interaction": (lambda p, x: {"logits": model.interaction(p, x["state"], x["rows"])}, pair),
    }
    least = minimums(config)
    return {name: export_function(*function, flat_params, platforms, least=least) for name, function in functions.items()}


def export_function(
    function: Callable[..., Any], inputs: Any, params: Specs, platforms: Sequence[str], *, least: Mapping[str, int]
) -> Exported:
    """Exports `function(params, inputs)` as a function of flat dicts that takes only what it reads."""
    specs, treedef = named(inputs), jax.tree.structure(inputs)

    def flat(given_params: Specs, given: Specs) -> dict[str, Any]:
        # What is not given is not read, so that the zeros in its place never reach the module.
        whole_params = {k: given_params[k] if k in given_params else jnp.zeros(s.shape, s.dtype) for k, s in params.items()}
        sizes = {str(dim): size for k in given for dim, size in zip(specs[k].shape, given[k].shape, strict=True)}
        whole = [given[k] if k in given else jnp.zeros(_sized(s.shape, sizes), s.dtype) for k, s in specs.items()]
        return named(function(nest(whole_params), jax.tree.unflatten(treedef, whole)))

    # JAX drops the arguments that nothing reads, but only where no shape is symbolic.
    fixed = {k: jax.ShapeDtypeStruct(_sized(s.shape, PROBE), s.dtype) for k, s in specs.items()}
    first = jax.export.export(jax.jit(flat), platforms=platforms[:1])(params, fixed)
    kept = {order(params, specs)[i] for i in first.module_kept_var_idx}
    used_params = {k: params[k] for k in params if ("params", k) in kept}
    used = _fresh({k: specs[k] for k in specs if ("inputs", k) in kept}, least)
    exported = jax.export.export(jax.jit(flat), platforms=platforms)(used_params, used)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return Exported(
        exported=exported,
        function=flat,
        inputs=used,
        outputs={k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in outputs.items()},
        params=tuple(used_params),
        ignored=tuple(k for k in specs if k not in used),
    )


def order(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The flat argument list of a module of `f(params, inputs)`: JAX sorts dicts by key."""
    return [("params", k) for k in sorted(params)] + [("inputs", k) for k in sorted(inputs)]


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by dotted name, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def stablehlo(built: Exported, params: Specs, sizes: Mapping[str, int], *, platform: str) -> tuple[str, list[dict[str, str]]]:
    """StableHLO text with every axis fixed, for runtimes outside Python.

    Returns:
      The module's text, and its arguments in order: `kind` ("params" or "inputs") and `name` of each.
    """
    inputs = {k: jax.ShapeDtypeStruct(_sized(v.shape, sizes), v.dtype) for k, v in built.inputs.items()}
    used = {k: params[k] for k in built.params}
    exported = jax.export.export(jax.jit(built.function), platforms=[platform])(used, inputs)
    names = order(used, inputs)
    return exported.mlir_module(), [{"kind": names[i][0], "name": names[i][1]} for i in exported.module_kept_var_idx]


def minimums(config: Config) -> dict[str, int]:
    """The least size of every symbolic axis.

    The head multiplies differently for few candidates and the SIM cache for fewer behaviours than slots; an export fixes the
    form for many, and a loader pads up to the minimum.
    """
    candidates = LEAST_CANDIDATES
    while candidates <= config.width:
        candidates *= 2
    return {"b": 1, "c": candidates, "l": config.sim_slots if config.sim_fields else 1, "n": 1}


def buckets(config: Config) -> dict[str, list[int]]:
    """Sizes that a loader compiles by default, by axis."""
    least = minimums(config)
    return {
        "b": [1, 8, 64],
        "c": [size for size in (1 << i for i in range(6, 15)) if size >= least["c"]] or [least["c"]],
        "l": [max(config.long_length, least["l"])],
        "n": [1, 64, 4096],
    }


def user_specs(config: Config, long: Any, *, lead: tuple[Any, ...] = ()) -> UserFeatures:
    """Shapes and dtypes of one user's features, or of many with leading axes."""
    schema = config.schema
    return UserFeatures(
        ids=_ids(schema.user_attributes, lead),
        floats=_spec((*lead, schema.user_floats), jnp.float32),
        short=_behaviours(config, (*lead, config.short_length)),
        long=_behaviours(config, (*lead, long)),
    )


def item_specs(config: Config, count: Any) -> ItemFeatures:
    """Shapes and dtypes of `count` items' features; signatures are computed from content."""
    schema = config.schema
    return ItemFeatures(
        ids=_ids(schema.item_attributes, (count,)),
        floats=_spec((count, schema.item_floats), jnp.float32),
        content=_spec((count, schema.content), jnp.float32) if schema.content else None,
        side={name: _spec((count,), jnp.float32) for name in schema.side},
    )


def _fresh(specs: Specs, least: Mapping[str, int]) -> Specs:
    """The same specs with symbols of their own: JAX solves for every symbol that a scope knows of."""
    names = {str(dim) for spec in specs.values() for dim in spec.shape if not isinstance(dim, int)}
    symbols = _symbols("".join(sorted(names)), least)
    return {k: jax.ShapeDtypeStruct(_sized(spec.shape, symbols), spec.dtype) for k, spec in specs.items()}


def _symbols(names: str, least: Mapping[str, int]) -> dict[str, Any]:
    """A symbolic dimension for each letter, in one scope."""
    scope = jax.export.SymbolicScope([f"{name} >= {least[name]}" for name in names])
    return {name: jax.export.symbolic_shape(name, scope=scope)[0] for name in names}


def _behaviours(config: Config, shape: tuple[Any, ...]) -> Behaviours:
    words = config.signature_words
    return Behaviours(
        ids={name: _spec(shape, jnp.int32) for name in config.schema.behaviour_fields},
        action=_spec(shape, jnp.int32),
        age=_spec(shape, jnp.float32),
        mask=_spec(shape, jnp.bool_),
        signature=_spec((*shape, words), jnp.uint32) if config.schema.content else None,
    )


def _ids(attributes: Sequence[Attribute], lead: tuple[Any, ...]) -> dict[str, Any]:
    return {a.name: _spec(lead if a.length == 1 else (*lead, a.length), jnp.int32) for a in attributes}


def _spec(shape: tuple[Any, ...], dtype: Any) -> Any:
    """A shape and dtype in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _sized(shape: Sequence[Any], sizes: Mapping[str, Any]) -> tuple[Any, ...]:
    """A shape with every symbol replaced by its size, or by 1 for an axis that nothing reads."""
    return tuple(dim if isinstance(dim, int) else sizes.get(str(dim), 1) for dim in shape)
