"""Training that moves rows of some embedding tables, and nothing else: what a delta can publish between two full refreshes.

The tables that move are the only trained parameters of a state; everything else travels in its fitted group, which no step
writes, so it stays equal bit for bit and no gradient is computed for it. Updates are sparse: rows that no batch reads stay as
they are, which an optimizer with momentum or weight decay over whole tables would not leave.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aif_jax.checks import expect
from aif_jax.layers import Rows
from aif_jax.model import PreRanker
from aif_jax.schema import Schema
from aif_jax.train.optimizers import SMALLEST, SparseConfig, split_tables, take_rows
from aif_jax.train.step import FITTED, LossFn, StepFn, TrainState, init_state, make_step
from aif_jax.types import ItemFeatures, Params, UserFeatures

FROZEN = "frozen"
"""Group of a state's fitted parameters: all trained ones that stay."""


def moving_tables(schema: Schema, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Names of the embedding tables that move.

    Args:
      schema: schema of the model.
      names: tables by name; None takes that of the item ids and those that user attributes alone read. A row of another table,
        such as a category's, is read by many items, and all of them are published again when it moves.

    Raises:
      ValueError: a name that is no table of the schema, or none at all.
    """
    of_items = {attribute.table_name for attribute in schema.item_attributes} | set(schema.behaviour_fields)
    own = schema.item_attribute("item").table_name
    chosen = tuple(name for name in schema.table_sizes if name == own or name not in of_items) if names is None else names
    known = sorted(schema.table_sizes)
    expect(len(chosen) > 0 and set(chosen) <= set(known), "tables that move", f"at least one of {known}", chosen)
    return tuple(dict.fromkeys(chosen))


def rows_state(params: Params, tables: tuple[str, ...], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: `tables` are trained, everything else is frozen. The arrays are copied."""
    fixed = {name: group for name, group in params.items() if name != FITTED}
    fixed, moving = split_tables(fixed, tables)
    return init_state({"embedding": moving, FITTED: {**params[FITTED], FROZEN: fixed}}, optimizer)


def whole_params(params: Params) -> Params:
    """Parameters of the whole model, from the parameters of such a state."""
    fitted = {name: group for name, group in params[FITTED].items() if name != FROZEN}
    fixed = params[FITTED][FROZEN]
    return {**fixed, "embedding": {**fixed["embedding"], **params["embedding"]}, FITTED: fitted}


def with_fitted(state: TrainState, params: Params) -> TrainState:
    """The state with the fitted groups of `params`, copied."""
    fitted = jax.tree.map(jnp.array, params[FITTED])
    return dataclasses.replace(state, fitted={FITTED: {**fitted, FROZEN: state.fitted[FITTED][FROZEN]}})


def rows_step(
    model: PreRanker, optimizer: optax.GradientTransformation, *, loss: LossFn, tables: tuple[str, ...], **options: Any
) -> StepFn:
    """The compiled step that moves rows of `tables`; loss and options are those of `make_step`.

    Row 0 stays: every item that has no row reads it, and index rows of those are not in a delta.
    """

    def joint(params: Params, features: UserFeatures, items: ItemFeatures) -> Any:
        embedding = {name: _row_0_stays(table) for name, table in params["embedding"].items()}
        return model.joint(whole_params({**params, "embedding": embedding}), features, items)

    moving = model._replace(joint=joint)
    return make_step(moving, optimizer, loss=loss, sparse=SparseConfig(tables=tables), **options)


def _row_0_stays(rows: Rows) -> Rows:
    fixed = (jnp.asarray(rows.ids) == 0)[:, None]
    return dataclasses.replace(rows, table=jnp.where(fixed, jax.lax.stop_gradient(rows.table), rows.table))


def rows_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam for the rows that a batch reads (lazy Adam): a row's moments move with it alone, and age with no other step."""
    return optax.adam(learning_rate)


def read_rows(table: Any, at: np.ndarray) -> np.ndarray:
    """Rows [n, D] of a table on the host, compiled for a few numbers of them."""
    size = max(SMALLEST, 1 << max(0, len(at) - 1).bit_length())
    padded = np.zeros(size, np.int32)
    padded[: len(at)] = at
    return np.asarray(_rows(table, padded))[: len(at)]


_rows = jax.jit(take_rows)
