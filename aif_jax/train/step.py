"""The training step: state, scores, gradient, Optax update. `loop` runs it."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax

from aif_jax.config import Config
from aif_jax.data.pipeline import Batch
from aif_jax.layers import Rows
from aif_jax.model import PreRanker
from aif_jax.sharding.processes import in_order
from aif_jax.train.goals import Goals
from aif_jax.train.gradients import LossFn, loss_and_gradient, part_size
from aif_jax.train.losses import as_loss
from aif_jax.train.sparse import (
    Slots,
    SparseConfig,
    UniqueIds,
    join_tables,
    row_ids,
    size_for,
    sparse_tables,
    split_tables,
    take_rows,
    unique_ids,
    update_rows,
)
from aif_jax.types import Array, Params, record

FITTED = "fitted"
"""The group of parameters that no step changes."""


@record
class TrainState:
    """Everything that a step changes, and the fitted parameters that it reads."""

    step: Array  # int32 []
    skipped: Array  # int32 [] steps whose loss or gradient was not finite, and which changed nothing
    trained: Params  # the trained groups
    fitted: Params  # {"fitted": ...} or {}
    opt_state: Any

    @property
    def params(self) -> Params:
        """Parameters of the whole model."""
        return self.trained | self.fitted


class StepFn(Protocol):
    """`step(state, batch) -> (state, {"loss": [], "grad_norm": [], "applied": bool []})`; the state given is consumed."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]: ...


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the parameters are copied, because steps consume their state."""
    params = jax.tree.map(jnp.array, params)
    trained = {name: group for name, group in params.items() if name != FITTED}
    fitted = {name: group for name, group in params.items() if name == FITTED}
    zero = jnp.zeros((), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(trained)
    return TrainState(step=zero, skipped=zero.copy(), trained=trained, fitted=fitted, opt_state=opt_state)


def score(model: PreRanker, params: Params, batch: Batch, *, compute_dtype: Any = jnp.float32) -> jax.Array:
    """Joint scores of a batch, float32 [B, C], or [B, C, T] for T objectives; call it inside jit.

    Trained parameters, float features and content are cast to `compute_dtype`; ages, whose buckets need their precision, and
    the "fitted" group stay as they are.
    """
    users, items = batch.users, batch.items
    if compute_dtype != jnp.float32:
        cast = partial(jax.tree.map, lambda x: x.astype(compute_dtype) if x.dtype == jnp.float32 else x)
        params = {name: group if name == FITTED else cast(group) for name, group in params.items()}
        users = dataclasses.replace(users, floats=cast(users.floats))
        items = dataclasses.replace(items, floats=cast(items.floats), content=cast(items.content))
    return jax.vmap(model.joint, (None, 0, 0))(params, users, items).astype(jnp.float32)


def make_step(
    model: PreRanker,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossFn,
    sparse: SparseConfig | None = SparseConfig(),  # noqa: B008 frozen
    part: int | Literal["auto"] | None = "auto",
    compute_dtype: Any = jnp.float32,
    max_grad_norm: float = math.inf,
) -> StepFn:
    """The compiled training step of a model.

    A step whose loss or gradient is not finite, or whose gradient is too large, changes nothing and counts in `state.skipped`.
    It is dispatched without waiting for its result; with sparse tables it waits once: the number of unique ids is fetched to
    the host, because it chooses the compiled size of the update.

    Args:
      model: what to train.
      optimizer: any Optax transformation; for tables under `sparse` it must treat rows apart, see `train.sparse`.
      loss: a `losses.Loss`, `Goals` for labels by name, or any function of scores, labels and mask (and `log_q` where the batch
        has it). Where the batch is taken in parts, a `Loss` scores each once and any other function twice, see
        `train.gradients`.
      sparse: which embedding tables get sparse updates; None updates every table whole. The state is the same, so a run may
        resume from a checkpoint with another choice.
      part: samples of a part; None takes the batch whole; "auto" takes parts where a batch is on one CPU.
      compute_dtype: of activations: parameters and float features are cast, ages and logits stay float32, and so do the
        parameters of the state (mixed precision with `jnp.bfloat16`).
      max_grad_norm: a gradient norm above it makes the step change nothing; to end the run instead, see `loop`.

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.train import losses
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> model = aif.build(aif.presets.two_tower(aif.Schema(item_attributes=(item, category))))
      >>> step = make_step(model, optax.sgd(0.1), loss=losses.listwise_softmax + 0.1 * losses.pointwise_bce)
    """
    tables = sparse_tables(model.config.schema, sparse)
    objective, dtype = as_loss(loss) or loss, jnp.dtype(compute_dtype)
    if isinstance(objective, Goals):
        objective = objective.bind(model.config.objectives)

    def step(
        state: TrainState, slots: Slots, unique: dict[str, UniqueIds], batch: Batch, *, part: int | None, sizes: tuple[int, ...]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        dense, whole = split_tables(state.trained, tables)
        ids = {name: row_ids(unique[name], size, none=len(whole[name])) for name, size in zip(tables, sizes, strict=True)}
        rows = {name: take_rows(whole[name], ids[name]) for name in tables}

        def scores_of(params: tuple[Params, dict[str, jax.Array]], batch: Batch) -> jax.Array:
            dense, rows = params
            by_id = {name: Rows(table=rows[name], slot=slots[name]) for name in tables}
            return score(model, join_tables(dense, by_id) | state.fitted, batch, compute_dtype=dtype)

        value, (gradient, row_gradients) = loss_and_gradient(scores_of, (dense, rows), batch, objective, part=part)

        def update(gradient: Params, trained: Params, opt_state: Any) -> tuple[Params, Any, Any]:
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(norm) & (norm <= max_grad_norm)

            def change(trained: Params, opt_state: Any) -> tuple[Any, Any]:
                with jax.numpy_dtype_promotion("standard"):  # schedules divide integers
                    updates, opt_state = optimizer.update(gradient, opt_state, trained)
                    return optax.apply_updates(trained, updates), opt_state

            return *jax.lax.cond(finite, change, lambda *unchanged: unchanged, trained, opt_state), (norm, finite)

        trained, opt_state, (norm, finite) = update_rows(update, state.trained, state.opt_state, gradient, ids, row_gradients)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        after = dataclasses.replace(state, step=state.step + 1, skipped=skipped, trained=trained, opt_state=opt_state)
        return after, {"loss": value, "grad_norm": norm, "applied": finite}

    compiled = jax.jit(step, donate_argnums=0, static_argnames=("part", "sizes"))
    count = jax.jit(partial(unique_ids, config=model.config), donate_argnums=0)
    return _Step(compiled, count, model.config, tables, part)


class _Step:
    """A compiled step with its scratch, which holds nothing from one step to the next and so is no part of the state."""

    def __init__(self, compiled: Any, count: Any, config: Config, tables: tuple[str, ...], part: int | Literal["auto"] | None):
        self._compiled, self._count, self._config, self._tables, self._part = compiled, count, config, tables, part
        self._slots: Slots = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if not self._tables:
            return in_order(self._compiled(state, {}, {}, batch, part=self._samples_of_part(batch, 0), sizes=()))
        tables = {name: state.trained["embedding"][name] for name in self._tables}
        stale = {name: table for name, table in tables.items() if not _fits(self._slots.get(name), table)}
        self._slots |= {name: jnp.zeros(table.shape[0], jnp.int32) for name, table in stale.items()}
        self._slots, unique = in_order(self._count(self._slots, state.fitted, batch.users, batch.items))
        counts = jax.device_get({name: ids.count for name, ids in unique.items()})
        bounds = {name: min(table.shape[0], unique[name].ids.shape[0]) for name, table in tables.items()}
        sizes = tuple(size_for(int(counts[name]), bound) for name, bound in bounds.items())
        row_bytes = sum(size * table.nbytes // table.shape[0] for size, table in zip(sizes, tables.values(), strict=True))
        part = self._samples_of_part(batch, row_bytes)
        return in_order(self._compiled(state, self._slots, unique, batch, part=part, sizes=sizes))

    def _samples_of_part(self, batch: Batch, row_bytes: int) -> int | None:
        """Samples of a part of this batch, whose rows take so many bytes; None for all."""
        if not isinstance(self._part, str):
            return self._part
        where = batch.where
        devices = where.sharding.device_set if isinstance(where, jax.Array) else jax.devices()[:1]
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return None
        samples, candidates = where.shape
        places = batch.users.history.mask.shape[1]
        lengths = (self._config.short_length, self._config.long_length)
        return part_size(samples, candidates + sum(min(places, length) for length in lengths), row_bytes)


def _fits(slot: jax.Array | None, table: jax.Array) -> bool:
    """Whether scratch is there, not donated to a step that failed, and as long and placed as the table."""
    if slot is None or slot.is_deleted():
        return False
    return slot.shape[0] == table.shape[0] and slot.sharding.device_set == table.sharding.device_set
