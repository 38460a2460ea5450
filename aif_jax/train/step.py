"""The training step: state, scores, gradient, Optax update. `loop` runs it.

On a CPU the time of a large batch is that of writing arrays such as [B, L, D] to memory, so a `losses.Loss` (or `Goals`), which
adds up over samples, takes it in parts that stay in the cache: the result is that of the whole batch, up to the order of sums.
Any other loss takes the batch whole.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from aif_jax.config import Config
from aif_jax.data.pipeline import Batch
from aif_jax.layers import Rows
from aif_jax.model import PreRanker
from aif_jax.sharding.processes import in_order
from aif_jax.train.losses import Loss
from aif_jax.train.optimizers import (
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
from aif_jax.train.tasks import Goals
from aif_jax.types import Array, Params, record

PART_EVENTS = 10_000
"""Candidates and behaviours of a part of a batch: with D = 32 its arrays fill the level-2 cache of a core."""
PART_BYTES = 1 << 26
"""Bytes of embedding rows that all parts of a batch together may add gradients to: each part writes all of the batch's rows."""

LossFn: TypeAlias = Loss | Goals | Callable[..., jax.Array]
"""A `losses.Loss`, `Goals` for several labels, or any `loss(scores [B, C], labels, *, where) -> []`; it gets `log_q` too where
the batch has it."""
ScoresFn: TypeAlias = Callable[[Any, Batch], jax.Array]
"""(params, batch) -> scores [B, C]."""


def part_size(samples: int, events: int, row_bytes: int = 0) -> int | None:
    """Samples of a part with about PART_EVENTS candidates and places, `events` a sample; None for a batch no larger."""
    most_parts = max(1, PART_BYTES // max(row_bytes, 1))
    size = max(1, PART_EVENTS // events, -(-samples // most_parts))
    size = -(-samples // -(-samples // size))  # as many parts, of even size: the last one is filled up with copies
    return size if size < samples else None


def loss_and_gradient(
    scores_of: ScoresFn, params: Any, batch: Batch, loss: LossFn, *, part: int | None
) -> tuple[jax.Array, Any]:
    """The loss [] of B samples and its gradient like `params`, any pytree of `scores_of`.

    A `Loss` or `Goals` takes the batch in parts of `part` samples; None takes it whole, as any other function does.
    """
    if part is None or not isinstance(loss, Loss | Goals):
        given = {"where": batch.where} | ({} if batch.log_q is None else {"log_q": batch.log_q})
        return jax.value_and_grad(lambda params: loss(scores_of(params, batch), batch.labels, **given))(params)
    norms: Any = loss.norms(batch.labels, batch.where)
    log_q = None if batch.log_q is None else jnp.broadcast_to(jnp.asarray(batch.log_q), jnp.shape(batch.where))

    def loss_of(params: Any, some: Batch) -> jax.Array:
        return loss.part(scores_of(params, some), some.labels, norms, where=some.where, log_q=some.log_q)

    def add(total: Any, some: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, some)), None

    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    return jax.lax.scan(add, zero, _parts(dataclasses.replace(batch, log_q=log_q), part))[0]


def _parts(batch: Batch, size: int) -> Batch:
    """Splits a batch into parts of one size; copies of the last sample, without candidates, fill the last one.

    Samples come by the events of their histories: blocks leave out the padding that all samples of a part have.
    """
    order = jnp.argsort(jnp.asarray(batch.users.history.mask).sum(1))
    places = jnp.arange(-(-len(order) // size) * size).reshape(-1, size)
    chosen = order[jnp.minimum(places, len(order) - 1)]
    parts = jax.tree.map(lambda x: jnp.asarray(x)[chosen], batch)
    return dataclasses.replace(parts, where=parts.where & (places < len(order))[..., None])


FITTED = "fitted"
"""The group of parameters that no step changes."""


@record
class TrainState:
    """Everything that a step changes, and the fitted parameters that it reads.

    Attributes:
      step: int32 [] steps made.
      skipped: int32 [] steps that changed nothing, since their loss or gradient was not finite.
      trained: the trained groups of parameters.
      fitted: {"fitted": ...} or {}.
      opt_state: state of the optimizer.
    """

    step: Array
    skipped: Array
    trained: Params
    fitted: Params
    opt_state: Any

    @property
    def params(self) -> Params:
        """Parameters of the whole model."""
        return self.trained | self.fitted


class StepFn(Protocol):
    """`step(state, batch) -> (state, {"loss": [], "grad_norm": []})`; the state given is consumed."""

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
        users = dataclasses.replace(users, floats=_cast(users.floats, compute_dtype))
        items = dataclasses.replace(
            items, floats=_cast(items.floats, compute_dtype), content=_cast(items.content, compute_dtype)
        )
    params = _cast_params(params, compute_dtype)
    return jax.vmap(model.joint, (None, 0, 0))(params, users, items).astype(jnp.float32)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, tree)


def _cast_params(params: Params, dtype: Any) -> Params:
    """Trained parameters in a dtype; float32 leaves all as it is."""
    if dtype == jnp.float32:
        return params
    return {name: group if name == FITTED else _cast(group, dtype) for name, group in params.items()}


def make_step(
    model: PreRanker,
    optimizer: optax.GradientTransformation,
    *,
    loss: LossFn,
    sparse: SparseConfig | None = SparseConfig(),  # noqa: B008 frozen
    part: int | Literal["auto"] | None = "auto",
    compute_dtype: Any = jnp.float32,
) -> StepFn:
    """The compiled training step of a model.

    A step whose loss or gradient is not finite changes nothing and counts in `state.skipped`.
    It is dispatched without waiting for its result; with sparse tables it waits once: the number of unique ids is fetched to
    the host, because it chooses the compiled size of the update.

    Args:
      optimizer: any Optax transformation; for tables under `sparse` it must treat rows apart, see `train.optimizers`.
      loss: a `losses.Loss`, `Goals` for labels by name, or any function `f(scores, labels, *, where)` of float32, float32 and
        bool [B, C] that returns [] (with `log_q=`, float32 [B, C], where the batch has it).
      sparse: which embedding tables get sparse updates; None updates every table whole, which a model needs whose block or
        tower reads embedding rows that no feature of its batch names: under sparse updates those are NaN. The state is the
        same, so a run may resume from a checkpoint with another choice.
      part: samples of a part; None takes the batch whole, as any loss but a `Loss` or `Goals` does; "auto" takes parts where a
        batch is on one CPU.
      compute_dtype: dtype of activations: parameters and float features are cast, ages and logits stay float32, and so do the
        parameters of the state (mixed precision with `jnp.bfloat16`).

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.train import losses
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> model = aif.build(aif.presets.two_tower(aif.Schema(item_attributes=(item, category))))
      >>> step = make_step(model, optax.sgd(0.1), loss=losses.listwise_softmax + 0.1 * losses.pointwise_bce)
    """
    tables = sparse_tables(model.config.schema, sparse)
    dtype = jnp.dtype(compute_dtype)
    if isinstance(loss, Goals):
        loss = loss.bind(model.config.objectives)
    try:
        inspect.signature(loss).bind_partial(None, None, where=None)
    except TypeError as error:
        got = str(error).removeprefix("got ")
        raise TypeError(f"loss: expected a function of (scores, labels, *, where), got {got}") from None

    @partial(jax.jit, donate_argnums=0, static_argnames=("part", "sizes"))
    def compiled(
        state: TrainState, slots: Slots, unique: dict[str, UniqueIds], batch: Batch, *, part: int | None, sizes: tuple[int, ...]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        dense, whole = split_tables(state.trained, tables)
        ids = {name: row_ids(unique[name], size, none=len(whole[name])) for name, size in zip(tables, sizes, strict=True)}
        rows = {name: take_rows(whole[name], ids[name]) for name in tables}

        def scores_of(params: tuple[Params, dict[str, jax.Array]], batch: Batch) -> jax.Array:
            dense, rows = params
            taken = {name: Rows(table=rows[name], ids=ids[name], slot=slots[name]) for name in tables}
            joined = join_tables(dense, taken) | state.fitted
            scores = score(model, joined, batch, compute_dtype=dtype)
            shown = [block for block in model.config.blocks if block.reads_places and batch.places is not None]
            return sum((block.training_logit(joined["blocks"][block.name], batch.places) for block in shown), scores)

        value, (gradient, row_gradients) = loss_and_gradient(scores_of, (dense, rows), batch, loss, part=part)

        def update(gradient: Params, trained: Params, opt_state: Any) -> tuple[Params, Any, Any]:
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)

            def move(trained: Params, opt_state: Any) -> tuple[Any, Any]:
                with jax.numpy_dtype_promotion("standard"):  # schedules divide integers
                    updates, opt_state = optimizer.update(gradient, opt_state, trained)
                    return optax.apply_updates(trained, updates), opt_state

            return *jax.lax.cond(finite, move, lambda *unchanged: unchanged, trained, opt_state), (norm, finite)

        trained, opt_state, (norm, finite) = update_rows(update, state.trained, state.opt_state, gradient, ids, row_gradients)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        after = dataclasses.replace(state, step=state.step + 1, skipped=skipped, trained=trained, opt_state=opt_state)
        return after, {"loss": value, "grad_norm": norm}

    count = jax.jit(partial(unique_ids, config=model.config), donate_argnums=0)
    slots: Slots = {}  # scratch, which holds nothing from one step to the next and so is no part of the state

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        nonlocal slots
        large = split_tables(state.trained, tables)[1]
        slots |= {name: jnp.zeros(len(table), jnp.int32) for name, table in large.items() if not _fits(slots.get(name), table)}
        unique: dict[str, UniqueIds] = {}
        if large:
            slots, unique = in_order(count(slots, state.fitted, batch.users, batch.items))
        counts = jax.device_get({name: ids.count for name, ids in unique.items()})
        sizes = tuple(size_for(int(counts[name]), min(len(large[name]), len(unique[name].ids))) for name in tables)
        row_bytes = sum(size * table.nbytes // len(table) for size, table in zip(sizes, large.values(), strict=True))
        samples = _part_of(batch, model.config, row_bytes) if part == "auto" else part
        return in_order(compiled(state, slots, unique, batch, part=samples, sizes=sizes))

    return step


def _part_of(batch: Batch, config: Config, row_bytes: int) -> int | None:
    """Samples of a part of this batch, whose rows take so many bytes; None for all, and for a batch that is not on one CPU."""
    devices = batch.where.sharding.device_set if isinstance(batch.where, jax.Array) else jax.devices()[:1]
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return None
    samples, candidates = batch.where.shape
    places = batch.users.history.mask.shape[1]
    lengths = (config.short_length, config.long_length)
    return part_size(samples, candidates + sum(min(places, length) for length in lengths), row_bytes)


def _fits(slot: jax.Array | None, table: jax.Array) -> bool:
    """Whether scratch is there, not donated to a step that failed, and as long and placed as the table."""
    if slot is None or slot.is_deleted():
        return False
    return slot.shape[0] == table.shape[0] and slot.sharding.device_set == table.sharding.device_set
