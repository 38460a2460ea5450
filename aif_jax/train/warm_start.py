"""Warm start: yesterday's parameters under today's vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aif_jax import checks
from aif_jax.config import Config
from aif_jax.encoding.capacity import new_rows
from aif_jax.encoding.encoder import Encoder
from aif_jax.model import build
from aif_jax.scores import GROUP
from aif_jax.store.trained import Trained
from aif_jax.trees import table_of
from aif_jax.types import Array, Params


def grow_vocabulary(
    params: Params, name: str, size: int, key: jax.Array, *, config: Config, rows: np.ndarray | None = None
) -> tuple[Params, Config]:
    """Parameters and config with another vocabulary: old ids keep their embedding, new ids get a fresh one.

    New embeddings are Gaussian with the standard deviation of the old table. In `params["fitted"]` old items keep their values
    and new items get those of the unknown item, until you refit on the new catalogue:
    `params | {"fitted": aif.fit_tables(config, catalogue)}`. The optimizer state starts afresh: init it from the result.

    Args:
      params: of the old vocabulary; not changed.
      name: attribute whose table `params["embedding"][name]`, float [old size, D], grows.
      size: rows of the new vocabulary, the unknown row 0 included.
      key: typed random key.
      config: of `params`.
      rows: int [old size], the new row of each old row, for ids that moved, and -1 for a row whose id is gone: what takes its
        place, if anything, starts new. None where new ids were appended. With a `Vocabulary` before and after:
        `encoding.capacity.new_rows(before, after)`.

    Returns:
      (params, config) of the new vocabulary.

    Raises:
      KeyError: no such attribute.
      ValueError: a smaller size without `rows`, or `rows` that are not distinct rows of the new table with row 0 first.

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
    if size < old and rows is None:
        raise ValueError(f"{name}: expected a size of at least the old {old}, got {size}; rows are never dropped")
    place = np.arange(old) if rows is None else np.asarray(rows)
    kept = np.flatnonzero(place >= 0)
    distinct = place.shape == (old,) and place[0] == 0 and len(np.unique(place[kept])) == len(kept)
    if not distinct or place.min() < -1 or place.max() >= size:
        raise ValueError(f"rows: expected {old} distinct rows below {size}, or -1, with row 0 first, got {place}")
    grown = jnp.std(table[kept]) * jax.random.normal(key, (size, *table.shape[1:]), table.dtype)
    larger = {
        field: tuple(dataclasses.replace(a, size=size) if a.name == name else a for a in group)
        for field, group in groups.items()
    }
    grown_params = {**params, "embedding": {**params["embedding"], name: grown.at[place[kept]].set(table[kept])}}
    if "fitted" in params:
        grown_params["fitted"] = _fitted(params["fitted"], name, size, place, config)
    return grown_params, config.replace(schema=dataclasses.replace(schema, encoding="", **larger))


def carry_over(trained: Trained, encoder: Encoder, *, key: jax.Array) -> Trained:
    """The model under the vocabularies of a newer encoder: an id that both know keeps everything that stands at its row.

    A row whose id is gone, and one that has a new id, start new: the embedding as in `grow_vocabulary`, and the values of the
    unknown item in every table of `params["fitted"]`: signatures, codes, SVD factors, popularity corrections, the fields of
    items. A field's value that is gone becomes unknown in the fields of all items. Indexes and user states carry the version
    that they were made with, so none of the model before is taken; build them from the result. Fit the tables again on the new
    catalogue, and run the edits after training again, so that new items have theirs.

    With vocabularies of fixed size the config stays but for the encoder's version, and so do compiled programs.

    Args:
      trained: of the encoder before, not changed; not one of `assemble`, whose functions this cannot build.
      encoder: of the same columns, such as from `readers.admit`, or from reading newer files.
      key: typed random key, of the new embeddings.

    Raises:
      ValueError: a model without an encoder, an encoder of other columns, actions or scales.
    """
    before, params, config = trained.need_encoder("carry_over"), trained.params, trained.config
    same = before.columns == encoder.columns and before.scales == encoder.scales
    same = same and before.vocabularies.get("action") == encoder.vocabularies.get("action")
    checks.expect(same, "encoder", "the columns, actions and scales of the model's encoder", "others; derive it from that one")
    embedded = {a.name: a for a in (*config.schema.item_attributes, *config.schema.user_attributes) if a.table is None}
    for number, (name, after) in enumerate(encoder.vocabularies.items()):
        old = before.vocabularies[name]
        if name not in embedded or old == after:
            continue
        size = max(len(after), 2)  # of an attribute without any value
        rows = np.append(new_rows(old, after), np.full(embedded[name].size - len(old), -1))
        params, config = grow_vocabulary(params, name, size, jax.random.fold_in(key, number), config=config, rows=rows)
    return Trained(build(config.with_encoding(encoder.version)), params, encoder.with_length(before.length))


def carry_over_state(opt_state: Any, optimizer: optax.GradientTransformation, before: Trained, after: Trained) -> Any:
    """The optimizer state of `before` for the model that `carry_over` made of it.

    An id that both know keeps its moments, dense or sparse; rows that are new start as in `optimizer.init`. Moments of other
    parameters, and the count of steps, go on.

    Args:
      opt_state: of `optimizer` for the trained groups of `before`, as in `TrainState.opt_state`.
      optimizer: which treats rows apart, as `train.sparse` needs it.
      before, after: both with their encoders.

    Raises:
      ValueError: state that has not one row for each row of a table whose rows changed.
    """
    trained = {name: group for name, group in after.params.items() if name != "fitted"}
    with jax.numpy_dtype_promotion("standard"):
        fresh = optimizer.init(trained)
    old, new = (each.need_encoder("carry_over_state").vocabularies for each in (before, after))
    names = {a.name for group in (before.config.schema.item_attributes, before.config.schema.user_attributes) for a in group}
    place = {name: new_rows(old[name], new[name]) for name in names & old.keys() if old[name] != new[name]}

    def one(path: tuple, leaf: Any, start: Any) -> Any:
        name = table_of(path, place)
        if name is None:
            return leaf
        rows = (np.shape(before.params["embedding"][name])[0], np.shape(after.params["embedding"][name])[0])
        expected, got = f"one row for each of {rows[0]} rows of table {name!r}", f"shape {np.shape(leaf)}"
        fits = (np.shape(leaf)[:1], np.shape(start)[:1]) == ((rows[0],), (rows[1],))
        checks.expect(fits, f"optimizer state {jax.tree_util.keystr(path)}", expected, got)
        kept = np.flatnonzero(place[name] >= 0)
        return jnp.asarray(start).at[place[name][kept]].set(jnp.asarray(leaf)[kept])

    return jax.tree_util.tree_map_with_path(one, opt_state, fresh)


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

    kept = np.flatnonzero(place >= 0)

    def grow(values: Array) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.broadcast_to(values[:1], (size, *values.shape[1:])).at[place[kept]].set(values[kept])

    fields = fitted.get("fields", {})
    if name != "item":
        moved = {name: jnp.asarray(np.maximum(place, 0), jnp.int32)[fields[name]]} if name in fields else {}
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
