"""Layers of the components, pairs of pure functions: `*_init(key, ...) -> params` and `*(params, inputs) -> outputs`.

The only file that imports `flax.linen`: its modules stay behind `init/apply`, so that nothing outside knows a framework.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from aif_jax.checks import expect
from aif_jax.schema import Attribute, Schema
from aif_jax.types import Array, Behaviours, Params, record

Module: TypeAlias = nn.Module
"""A Flax module, as a head or a tower."""
NORM = nn.LayerNorm()

AGE_BUCKETS = 32
"""Ages are looked up by floor(log2(1 + seconds)); the last bucket holds everything from 2^31 seconds (68 years) on."""

CHUNK = 64
"""Events that `fold_events` takes at a time on a CPU."""
JOINED_ROWS = 4096
"""Up to this catalogue size, summing the tables of all items once costs less than reading each table for every behaviour."""


@record
class Rows:
    """Rows of an embedding table that one batch uses, addressed by the original ids; replaces the table in training."""

    table: Array  # float32 [size, D]
    ids: Array  # int32 [size] the id of each row, N where there is none
    slot: Array  # int32 [N] position in `table` of every id of the batch; anything for others

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        """Return rows [..., D] of ids [...] of the batch, NaN for other ids; ids out of range read row 0."""
        asked = jnp.where((ids >= 0) & (ids < self.slot.shape[0]), ids, 0)
        positions = jnp.asarray(self.slot).at[asked].get(mode="promise_in_bounds")
        there = jnp.asarray(self.ids).at[positions].get(mode="clip") == asked
        # no select over [..., D]: a position past the end is NaN, and its gradient goes nowhere
        return jnp.asarray(self.table).at[jnp.where(there, positions, len(self.ids))].get(mode="fill", fill_value=jnp.nan)


class MLP(nn.Module):
    """Dense layers with ReLU between them, none after the last: [..., width_in] -> [..., widths[-1]]."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"layer_{i}")(x if i == 0 else nn.relu(x))
        return x


def init_module(module: Module, key: jax.Array, width: int) -> Params:
    """Return parameters of a Flax module of inputs [..., width], float32 nested dicts; ValueError if it has more than these."""
    inputs, name = jnp.zeros(width), f"Flax module {type(module).__name__}"
    expected = "parameters alone, without dropout, batch statistics and other variables"
    try:
        made = dict(module.init(key, inputs))
        expect(made.keys() <= {"params"}, name, expected, f"the collections {sorted(made)}")
        jax.eval_shape(module.apply, made, inputs)
    except Exception as error:
        expect("Rng" not in repr(error), name, expected, error)  # as Linen and NNX raise where a module draws random numbers
        error.add_note(f"{name} was given the inputs [{width}] of one user, one item or one pair")
        raise
    return made.get("params", {})


def apply_module(module: Module, params: Params, x: jax.Array) -> jax.Array:
    """Apply a Flax module with these parameters to x [..., width]."""
    return module.apply({"params": params}, x)  # type: ignore[return-value]


def dense_init(key: jax.Array, width_in: int, width_out: int) -> Params:
    """Return parameters of an affine map: kernel [width_in, width_out], bias [width_out]."""
    return init_module(nn.Dense(width_out), key, width_in)


def dense(params: Params, x: jax.Array) -> jax.Array:
    """Apply an affine map to the last axis: [..., width_in] -> [..., width_out]."""
    return apply_module(nn.Dense(params["kernel"].shape[-1]), params, x)


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Apply an `MLP` of the widths that these parameters have."""
    return apply_module(MLP(tuple(params[f"layer_{i}"]["kernel"].shape[-1] for i in range(len(params)))), params, x)


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the softmax of scores [..., S] over the entries where `mask` is true; zeros if there is none."""
    mask = jnp.broadcast_to(mask, scores.shape)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.where(mask, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)


def attention(query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return softmax(q K^T / sqrt D) V over what `mask` [S] or [..., S] keeps: [..., D], [S, D], [S, V] -> [..., V]; or 0."""
    return masked_softmax(query @ keys.T / math.sqrt(keys.shape[-1]), mask) @ values


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of values [S, D] over the entries that mask [S] keeps; zeros where it keeps none."""
    return jnp.where(mask[:, None], values, 0.0).sum(0) / jnp.maximum(mask.sum(), 1).astype(values.dtype)


def fold_events(step: Callable, shared: Any, own: Any, events: Any, mask: jax.Array, total: Any) -> tuple[Any, Any]:
    """Fold the events of ONE user in chunks, up to the last one: on a CPU the padding after it is not computed.

    Under `vmap` one loop serves all users and ends with the longest history. Other devices take all places at once. It has no
    gradient: give one with `jax.custom_vjp`.

    Args:
      step: `(shared, own, chunk, total) -> (total, out)` of ONE user; padding must add nothing, and its `out` be zeros.
      shared, own: pytrees that all users share, and of this user.
      events, mask: pytree of arrays [L, ...], zeros past the end; bool [L], where there is an event.
      total: the total before the first chunk, a pytree; returned with the `out` of all places [L, ...].
    """

    def of_users(axes: Any, shared: Any, own: Any, events: Any, mask: jax.Array, total: Any) -> tuple[Any, Any]:
        every, length = jax.vmap(step, (axes, 0, 0, 0)), mask.shape[1]

        def chunks() -> tuple[Any, Any]:
            def pad(x: jax.Array) -> jax.Array:
                return jnp.pad(x, [(0, 0), (0, -length % CHUNK)] + [(0, 0)] * (x.ndim - 2))

            def add(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                at = i * CHUNK
                chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, CHUNK, 1), padded)
                total, out = every(shared, own, chunk, carry[0])
                return total, jax.tree.map(lambda to, x: jax.lax.dynamic_update_slice_in_dim(to, x, at, 1), carry[1], out)

            padded, shapes = jax.tree.map(pad, events), jax.eval_shape(every, shared, own, events, total)[1]
            start = total, jax.tree.map(lambda x: pad(jnp.zeros(x.shape, x.dtype)), shapes)
            end = jnp.where(mask, jnp.arange(1, length + 1, dtype=jnp.int32)[None, :], 0).max()
            last, out = jax.lax.fori_loop(0, (end + CHUNK - 1) // CHUNK, add, start)
            return last, jax.tree.map(lambda x: x[:, :length], out)

        whole = partial(every, shared, own, events, total)
        return jax.lax.platform_dependent(cpu=chunks if length > CHUNK else whole, default=whole)

    @jax.custom_batching.custom_vmap
    def of_one(shared: Any, *of_user: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x[0], of_users(None, shared, *jax.tree.map(lambda x: x[None], of_user)))

    @of_one.def_vmap
    def of_several(size: int, batched: Any, shared: Any, *of_user: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda there: 0 if there else None, batched[0])  # several models have a `shared` each
        of_user = jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), of_user, tuple(batched[1:]))
        made = of_users(axes, shared, *of_user)
        return made, jax.tree.map(lambda _: True, made)

    return of_one(shared, own, events, mask, total)


def embedding_init(key: jax.Array, schema: Schema, width: int) -> Params:
    """Return one table [size, width] for each attribute, and two for behaviours alone."""
    sizes = schema.table_sizes | {"behaviour.action": schema.actions, "behaviour.age": AGE_BUCKETS}
    keys = jax.random.split(key, len(sizes))
    return {
        name: nn.Embed(size, width).init(k, jnp.zeros((1,), jnp.int32))["params"]["embedding"]
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def lookup(table: Array | Rows, ids: jax.Array) -> jax.Array:
    """Return rows [..., *] of a table [size, *] for ids [...]; ids out of range read row 0: compiled code cannot raise."""
    if isinstance(table, Rows):
        return table[ids]
    table = jnp.asarray(table)
    return table.at[jnp.where((ids >= 0) & (ids < table.shape[0]), ids, 0)].get(mode="promise_in_bounds")


def embed_attributes(embedding: Params, attributes: tuple[Attribute, ...], ids: Mapping[str, Array]) -> list[jax.Array]:
    """Return one vector [D] for each attribute: its row, or the mean over non-zero ids of a bag (zeros for an empty bag)."""
    vectors = []
    for attribute in attributes:
        rows = lookup(embedding[attribute.name], jnp.asarray(ids[attribute.name]))
        vectors.append(rows if attribute.length == 1 else masked_mean(rows, jnp.asarray(ids[attribute.name]) != 0))
    return vectors


def behaviour_fields(params: Params, schema: Schema, item: Array) -> dict[str, jax.Array]:
    """Return int32 [S] ids of behaviour fields for the items [S] of a history, looked up in `params["fitted"]["fields"]`."""
    rows, tables = jnp.asarray(item), params["fitted"]["fields"]
    return {field: rows if field == "item" else lookup(tables[field], rows) for field in schema.behaviour_fields}


def embed_behaviours(params: Params, schema: Schema, behaviours: Behaviours, *, joined: bool = False) -> jax.Array:
    """Return Z: the sum of a behaviour's field, action and age embeddings, [S, D]; zeros where the mask is false.

    With `joined`, for training, by `embed_items` and `embed_context`: two look-ups, and the sum in another order.
    """
    if joined:
        total = embed_items(params, schema, behaviours.item) + embed_context(params, behaviours)
    else:
        embedding = params["embedding"]
        total = lookup(embedding["behaviour.action"], jnp.asarray(behaviours.action))
        for field, ids in behaviour_fields(params, schema, behaviours.item).items():
            total += lookup(embedding[field], ids)
        total += lookup(embedding["behaviour.age"], age_bucket(jnp.asarray(behaviours.age)))
    return jnp.where(jnp.asarray(behaviours.mask)[:, None], total, jnp.zeros((), total.dtype))


def embed_items(params: Params, schema: Schema, item: Array) -> jax.Array:
    """Return the sum of the field embeddings of items [...], as behaviours have it: [..., D].

    Up to `JOINED_ROWS` items the tables are added up before they are read.
    """
    embedding, fitted = params["embedding"], params["fitted"]["fields"]
    whole = not any(isinstance(embedding[field], Rows) for field in ("item", *fitted))
    if whole and len(embedding["item"]) <= JOINED_ROWS:
        others = (lookup(embedding[field], ids) for field, ids in fitted.items())
        return lookup(sum(others, jnp.asarray(embedding["item"])), jnp.asarray(item))
    fields = behaviour_fields(params, schema, item)
    return sum((lookup(embedding[field], ids) for field, ids in fields.items()), jnp.zeros(()))


def embed_context(params: Params, behaviours: Behaviours) -> jax.Array:
    """Return the sum of the action and age embeddings of behaviours, [S, D], from one table of all sums."""
    action, age = (jnp.asarray(params["embedding"][f"behaviour.{name}"]) for name in ("action", "age"))
    every, given = (action[:, None] + age[None]).reshape(-1, action.shape[1]), jnp.asarray(behaviours.action)
    known = jnp.where((given >= 0) & (given < len(action)), given, 0)
    return lookup(every, known * len(age) + age_bucket(jnp.asarray(behaviours.age)))


def age_bucket(age: jax.Array) -> jax.Array:
    """Return floor(log2(1 + age in seconds)) as int32, at most AGE_BUCKETS - 1; NaN and negative ages give 0."""
    # the exponent of a float is exact; a logarithm is not, and would put 2^k - 1 in different buckets on different devices
    _, exponent = jnp.frexp(1.0 + jnp.maximum(jnp.nan_to_num(age), 0.0))
    return jnp.minimum(exponent - 1, AGE_BUCKETS - 1).astype(jnp.int32)
