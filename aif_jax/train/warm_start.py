"""Warm start: yesterday's parameters under today's vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import checks
from aif_jax.config import Config
from aif_jax.scores import GROUP
from aif_jax.types import Array, Params


def grow_vocabulary(
    params: Params, name: str, size: int, key: jax.Array, *, config: Config, rows: np.ndarray | None = None
) -> tuple[Params, Config]:
    """Parameters and config with a larger vocabulary: old ids keep their embedding, new ids get a fresh one.

    New embeddings are Gaussian with the standard deviation of the old table. In `params["fitted"]` old items keep their values
    and new items get those of the unknown item, until you refit on the new catalogue:
    `params | {"fitted": aif.fit_tables(config, catalogue)}`. The optimizer state starts afresh: init it from the result.

    Args:
      params: of the old vocabulary; not changed.
      name: attribute whose table `params["embedding"][name]`, float [old size, D], grows.
      size: rows of the new vocabulary, the unknown row 0 included.
      key: typed random key.
      config: of `params`.
      rows: int [old size], the new row of each old row, for ids that moved; None where new ids were appended. With a
        `Vocabulary` before and after: `np.append(0, after.encode(before.raw))`.

    Returns:
      (params, config) of the new vocabulary.

    Raises:
      KeyError: no such attribute.
      ValueError: a smaller size, or `rows` that are not distinct rows of the new table with row 0 first.

    Example:
      >>> import jax, numpy as np, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)))
      >>> params = {"embedding": {"category": np.ones((6, 8), np.float32)}}
      >>> grown, larger = grow_vocabulary(params, "category", 9, jax.random.key(1), config=config)
      >>> grown["embedding"]["category"].shape, larger.schema.item_attribute("category").size
      ((9, 8), 9)
    """
    schema = config.schema
    groups = {"item_attributes": schema.item_attributes, "user_attributes": schema.user_attributes}
    known = [attribute.name for group in groups.values() for attribute in group]
    if name not in known:
        raise KeyError(f"no attribute {name!r} in the schema; it has {known}")
    table = jnp.asarray(params["embedding"][name])
    old = table.shape[0]
    if size < old:
        raise ValueError(f"{name}: expected a size of at least the old {old}, got {size}; rows are never dropped")
    place = np.arange(old) if rows is None else np.asarray(rows)
    if place.shape != (old,) or place[0] != 0 or len(np.unique(place)) != old or place.min() < 0 or place.max() >= size:
        raise ValueError(f"rows: expected {old} distinct rows below {size} with row 0 first, got {place}")
    grown = jnp.std(table) * jax.random.normal(key, (size, *table.shape[1:]), table.dtype)
    larger = {
        field: tuple(dataclasses.replace(a, size=size) if a.name == name else a for a in group)
        for field, group in groups.items()
    }
    grown_params = {**params, "embedding": {**params["embedding"], name: grown.at[place].set(table)}}
    if "fitted" in params:
        grown_params["fitted"] = _fitted(params["fitted"], name, size, place, config)
    return grown_params, config.replace(schema=dataclasses.replace(schema, encoding="", **larger))


def unseen_as_unknown(params: Params, counts: Any, *, config: Config) -> Params:
    """Parameters in which items without a training event have the embedding of the unknown item.

    For models that are trained with `Pipeline.id_dropout`, which teaches that embedding. What is fitted on content stays.

    Args:
      params: trained ones; not changed.
      counts: integers [N], training events of each catalogue row.
      config: of the model.

    Raises:
      TypeError, ValueError: not one count for each item of the schema; a model whose schema does not embed the item id.
    """
    name = config.schema.item_attribute("item").table_name
    size = config.schema.item_attribute("item").size
    counts = checks.expect_integers(counts, "counts", size=2**62)
    checks.expect(counts.shape == (size,), "counts", f"one for each of {size} items", f"shape {list(counts.shape)}")
    checks.expect(name in params["embedding"], "params", f"an embedding {name!r}", list(params["embedding"]))
    table = jnp.asarray(params["embedding"][name])
    shared = jnp.where((counts == 0)[:, None], table[:1], table)
    return params | {"embedding": params["embedding"] | {name: shared}}


def _fitted(fitted: Params, name: str, size: int, place: np.ndarray, config: Config) -> Params:
    """The fitted group: values of items in their new rows, or ids of a field that are new rows."""

    def grow(values: Array) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.broadcast_to(values[:1], (size, *values.shape[1:])).at[place].set(values)

    fields = fitted.get("fields", {})
    if name != "item":
        moved = {name: jnp.asarray(place, jnp.int32)[fields[name]]} if name in fields else {}
        return {**fitted, "fields": {**fields, **moved}}
    tables = {table.name for table in config.tables}
    return {
        group: values_by_name
        if group == GROUP
        else {
            # A table's values are per item by contract; in a block's group those with the vocabulary's length are.
            leaf: grow(values) if (leaf == "table" if group in tables else len(values) == len(place)) else values
            for leaf, values in values_by_name.items()
        }
        for group, values_by_name in fitted.items()
    }
