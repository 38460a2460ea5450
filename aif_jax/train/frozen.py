"""Training that moves rows of some embedding tables, and nothing else: what a delta can publish between two full refreshes.

The tables that move are the only trained parameters of a state; everything else travels in its fitted group, which no step
writes, so it stays equal bit for bit and no gradient is computed for it. Updates are sparse: rows that no batch reads stay as
they are, which an optimizer with momentum or weight decay over whole tables would not leave.
"""

from __future__ import annotations

from typing import Any

import optax

from aif_jax.checks import expect
from aif_jax.model import PreRanker
from aif_jax.schema import Schema
from aif_jax.train.optimizers import SparseConfig, split_tables
from aif_jax.train.step import FITTED, LossFn, StepFn, TrainState, init_state, make_step
from aif_jax.types import ItemFeatures, Params, UserFeatures

FROZEN = "frozen"
"""Group of a state's fitted parameters: all trained ones that stay."""


def moving_tables(schema: Schema, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Names of the embedding tables that move.

    Args:
      schema: of the model.
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


def whole_params(state: TrainState) -> Params:
    """Parameters of the whole model of such a state."""
    return _whole(state.params)


def rows_step(
    model: PreRanker, optimizer: optax.GradientTransformation, *, loss: LossFn, tables: tuple[str, ...], **options: Any
) -> StepFn:
    """The compiled step that moves rows of `tables`; loss and options are those of `make_step`."""

    def joint(params: Params, features: UserFeatures, items: ItemFeatures) -> Any:
        return model.joint(_whole(params), features, items)

    moving = model._replace(joint=joint)
    return make_step(moving, optimizer, loss=loss, sparse=SparseConfig(tables=tables), **options)


def _whole(params: Params) -> Params:
    fitted = {name: group for name, group in params[FITTED].items() if name != FROZEN}
    fixed = params[FITTED][FROZEN]
    return {**fixed, "embedding": {**fixed["embedding"], **params["embedding"]}, FITTED: fitted}
