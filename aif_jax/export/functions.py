"""The functions of a model in their exported form: flat dicts of arrays in and out, symbolic axes, only what is read.

    user         one user, history axis l
    item         N items, axis n
    interaction  one state and C rows, axis c (and l where a state carries the whole history)
    probability  logits of C candidates to calibrated probabilities, axis c; if calibrated, with several objectives, or orders
    order_NAME   probabilities and bids of C candidates to what they are ranked by, axis c; for each order

Dataclasses are flattened to names such as "history.item". Parameters and inputs that a function does not read are left out of
its signature, which so tells which parameters are used at all.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from aif_jax.checks import expect
from aif_jax.export.consume.files import ORDER, PROBABILITY
from aif_jax.features import Leaf, behaviours, item_layout, item_specs, user_layout, user_specs
from aif_jax.model import PreRanker
from aif_jax.scores import GROUP, Order, calibrated, order_inputs, probabilities
from aif_jax.store.codec import widen
from aif_jax.trees import leaves_by_path, nest
from aif_jax.types import Params

LEAST_CANDIDATES, MOST_CANDIDATES = 64, 1 << 14
named = partial(leaves_by_path, separator=".")
Specs = dict[str, jax.ShapeDtypeStruct]
Bounds = Mapping[str, tuple[int, int | None]]
"""The least and the largest size of every symbolic axis, by name; None for any."""


class ExportedFunction(NamedTuple):
    """One function, exported."""

    exported: jax.export.Exported  # of `f(params, inputs) -> outputs`, flat dicts
    inputs: Specs  # that it reads, by name, with symbolic dimensions
    outputs: Specs
    params: tuple[str, ...]  # paths of the parameters that it reads
    ignored: tuple[str, ...]  # inputs that the model's features have and this function does not read


def export_all(
    model: PreRanker, params: Mapping[str, Any], bounds: Bounds,
    *, platforms: Sequence[str], orders: Mapping[str, Order],
) -> dict[str, ExportedFunction]:  # fmt: skip
    """Export the functions of a model; `params` are leaves by path, `bounds` those of `axis_bounds`, `orders` by name."""
    config, flat_params = model.config, specs_of(params)
    one, items = (symbols(name, bounds) for name in "ln")
    inputs = {
        "user": user_specs(config.schema, length=one["l"]),
        "item": item_specs(config.schema, lead=(items["n"],)),
        "interaction": _pair(model, flat_params, bounds),
    }
    made = {}
    for name, function in functions_of(model, params, orders).items():
        # an engine's buckets may be smaller than those of the interaction
        sizes = {**bounds, "c": (1, None)} if name.startswith(ORDER) else bounds
        if name not in inputs:
            size = symbols("c", sizes)["c"]
            p, bid = order_inputs(config.objectives, size)
            logits = jax.ShapeDtypeStruct((size,) if config.outputs == 1 else (size, config.outputs), np.float32)
            inputs[name] = {"logits": logits} if name == PROBABILITY else {"p": p, "bid": bid}
        made[name] = export_function(function, inputs[name], flat_params, sizes, platforms)
    return made


def functions_of(
    model: PreRanker, params: Mapping[str, Any], orders: Mapping[str, Order]
) -> dict[str, Callable[[Params, Any], Any]]:
    """Return the functions to export by name, each of params and a pytree of inputs; `params` are leaves by path."""
    objectives = model.config.objectives

    def probability(p: Params, x: Any) -> dict[str, Any]:
        read = {"p": probabilities(p, x["logits"], objectives)} if orders else {}  # what orders read
        return {"probabilities": jax.nn.sigmoid(calibrated(p, x["logits"]))} | read

    def value(order: Order) -> Callable[[Params, Any], dict[str, Any]]:
        return lambda _, x: {"scores": jnp.asarray(order(x["p"], x["bid"]), jnp.float32)}

    known = orders or model.config.outputs > 1 or any(path.startswith(f"fitted/{GROUP}/") for path in params)
    return {
        "user": model.user,
        "item": exported_item(model),
        "interaction": lambda p, x: {"logits": model.interaction(p, x["state"], x["rows"])},
        **({PROBABILITY: probability} if known else {}),
        **{f"{ORDER}{name}": value(order) for name, order in orders.items()},
    }


def exported_item(model: PreRanker) -> Callable[[Params, Any], Any]:
    """Return the item function of N items; a block's bfloat16 comes as float32, as an index and an engine have it."""
    return lambda params, items: widen(jax.vmap(model.item, (None, 0))(params, items))


def export_function(
    function: Callable[..., Any], inputs: Any, params: Specs, bounds: Bounds, platforms: Sequence[str]
) -> ExportedFunction:
    """Export `function(params, inputs)` as a function of flat dicts that takes only what it reads."""
    whole, treedef = named(inputs), jax.tree.structure(inputs)
    specs = _resized(whole, symbols("".join(sorted(_axes(whole))), bounds))  # JAX solves for every axis that a scope knows of

    def flat(given_params: Specs, given: Specs) -> dict[str, Any]:
        return named(function(nest(given_params), jax.tree.unflatten(treedef, [given[name] for name in specs])))

    traced = jax.jit(flat).trace(params, specs)  # JAX drops unread arguments itself, but not where a shape is symbolic
    jaxpr, read = dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.out_avals))
    arguments = [("params", k) for k in sorted(params)] + [("inputs", k) for k in sorted(specs)]  # as JAX sorts dicts
    kept = set(itertools.compress(arguments, read))
    used_params = {k: params[k] for k in params if ("params", k) in kept}
    used = {k: specs[k] for k in specs if ("inputs", k) in kept}
    if unread := _axes(specs) - _axes(used):  # JAX must solve for every axis from the inputs: export again with fixed sizes
        sized = _resized(specs, {axis: bounds[axis][0] for axis in unread})
        return export_function(function, jax.tree.unflatten(treedef, list(sized.values())), params, bounds, platforms)
    run = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.jaxpr.consts))
    pruned = jax.jit(lambda *given: jax.tree.unflatten(traced.out_tree, run(*jax.tree.leaves(given))))
    exported = jax.export.export(pruned, platforms=platforms)(used_params, used)
    return ExportedFunction(
        exported=exported,
        inputs=used,
        outputs=specs_of(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        params=tuple(used_params),
        ignored=tuple(k for k in specs if k not in used),
    )


def axis_bounds(model: PreRanker, params: Mapping[str, Any]) -> Bounds:
    """Return the sizes that the exported functions of a model allow.

    A history has the places that user tower and blocks need, and at most those that the model reads; a loader pads and cuts.
    The interaction is exported in the form for many candidates, from the least count on at which every comparison of sizes has
    one answer; ValueError where there is none.
    """
    config, flat_params = model.config, specs_of(params)
    places = config.history_length
    least = max(config.short_length, *(block.least_history(config) for block in config.blocks), 1)
    bounds = {"c": (LEAST_CANDIDATES, None), "l": (min(least, places), places), "n": (1, None)}
    while True:
        try:
            pair = _pair(model, flat_params, bounds)
            jax.eval_shape(model.interaction, nest(flat_params), pair["state"], pair["rows"])
            return bounds
        except jax.errors.InconclusiveDimensionOperation as error:
            if bounds["c"][0] >= MOST_CANDIDATES:
                raise ValueError(
                    f"export: expected functions of one form for histories of {bounds['l'][0]} to {places} places and for "
                    f"{MOST_CANDIDATES} candidates and more; a block computes short histories in another form: "
                    f"override its `Block.least_history` with a larger length: {error}"
                ) from error
            bounds["c"] = (2 * bounds["c"][0], None)


def symbols(names: str, bounds: Bounds) -> dict[str, Any]:
    """Return a dimension for each letter, in one scope: a symbol, or the size where there is only one."""
    free = [name for name in names if bounds[name][0] != bounds[name][1]]
    least = [f"{name} >= {bounds[name][0]}" for name in free]
    scope = jax.export.SymbolicScope(least + [f"{name} <= {high}" for name in free if (high := bounds[name][1]) is not None])
    sizes: dict[str, Any] = {name: bounds[name][0] for name in names}
    return sizes | {name: jax.export.symbolic_shape(name, scope=scope)[0] for name in free}


def specs_of(arrays: Mapping[str, Any]) -> Specs:
    """Return shapes and dtypes of arrays."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def _pair(model: PreRanker, params: Specs, bounds: Bounds) -> dict[str, Any]:
    """Return specs of one state and C rows."""
    tree, schema, dims = nest(params), model.config.schema, symbols("cl", bounds)
    rows = jax.eval_shape(exported_item(model), tree, item_specs(schema, lead=(dims["c"],)))
    return {"state": jax.eval_shape(model.user, tree, user_specs(schema, length=dims["l"])), "rows": rows}


def _axes(specs: Specs) -> set[str]:
    """Return the names of the symbolic axes of arrays; ValueError for a size that is computed from one."""
    axes = {str(dim) for spec in specs.values() for dim in spec.shape if not isinstance(dim, int)}
    expect(all(map(str.isalpha, axes)), "export", "sizes: numbers or axes", f"{sorted(axes)}; see `Block.least_history`")
    return axes


def _resized(specs: Specs, sizes: Mapping[str, Any]) -> Specs:
    """Return specs with other sizes of some symbolic axes."""
    return {k: jax.ShapeDtypeStruct(tuple(sizes.get(str(n), n) for n in s.shape), s.dtype) for k, s in specs.items()}


ITEMS = 70  # no bucket


def golden_case(model: PreRanker, params: Mapping[str, Any], orders: Mapping[str, Order]) -> dict[str, np.ndarray]:
    """Return arrays named `function.inputs/name` and `function.outputs/name`, of a random user and items.

    The user has events in about three quarters of the places that the model reads.
    """
    config, tree, rng = model.config, nest(params), np.random.default_rng(0)
    user = random_features(user_layout(config.schema), rng, length=config.history_length)
    history = user.history
    user = dataclasses.replace(user, history=behaviours(history.item, history.action, history.age, history.mask))
    items = random_features(item_layout(config.schema), rng, lead=(ITEMS,))
    every, cases = functions_of(model, params, orders), {}

    def run(name: str, inputs: Any) -> Any:
        cases[name] = inputs, jax.jit(every[name])(tree, inputs)
        return cases[name][1]

    state, rows = run("user", user), run("item", items)
    logits = run("interaction", {"state": state, "rows": rows})["logits"]
    if PROBABILITY in every:
        p, bid = run(PROBABILITY, {"logits": logits}).get("p"), rng.exponential(1, ITEMS).astype(np.float32)
        for name in orders:
            run(f"{ORDER}{name}", {"p": p, "bid": bid})
    return {
        f"{function}.{part}/{name}": np.asarray(value)
        for function, pair in cases.items()
        for part, arrays in zip(("inputs", "outputs"), pair, strict=True)
        for name, value in named(arrays).items()
    }


def random_features(layout: Any, rng: np.random.Generator, *, length: int = 0, lead: tuple[int, ...] = ()) -> Any:
    """Return features at random for a layout, in every range that it allows."""

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
