"""Training: a state and a step; `loop` runs it. Optax does the optimisation; `frozen` parameters are never touched.

Source: ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aif_jax.data.batches import Batch
from aif_jax.losses import TERMS
from aif_jax.model import PreRanker
from aif_jax.sparse import Rows, Slots, SparseConfig, Touched, apply, find, init_slots, join, row_ids, size_for, split, tables
from aif_jax.sparse import take as take_rows
from aif_jax.types import Array, Params, record

PART_EVENTS = 10_000
"""Candidates and behaviours of a part of a batch: with D = 32 its arrays fill the level-2 cache of a core."""
PART_BYTES = 1 << 26
"""Touched rows that all parts of a batch together may add their gradients to: each part passes over all of them."""

LossFn = Callable[..., jax.Array]
"""`loss(scores [B, C], labels [B, C], *, where [B, C]) -> []`, see `losses`; it is given `log_q` too where the batch has it."""


@record
class TrainState:
    """Everything that a step changes, and the frozen parameters beside it."""

    step: Array  # int32 []
    skipped: Array  # int32 [] steps whose loss or gradient was not finite, and which changed nothing
    trained: Params  # the trained groups
    frozen: Params  # {"frozen": ...} or {}
    opt_state: Any

    @property
    def params(self) -> Params:
        """Parameters of the whole model."""
        return self.trained | self.frozen


class StepFn(Protocol):
    """`step(state, batch) -> (state, {"loss": [], "grad_norm": [], "applied": bool []})`; the state given is consumed."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]: ...


def default_optimizer(steps: int, *, learning_rate: float = 3e-3, weight_decay: float = 1e-5) -> optax.GradientTransformation:
    """AdamW under a warm-up of 5 % of the steps and a cosine decay, with gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), max(2, steps), learning_rate / 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the parameters are copied, because steps consume their state."""
    params = jax.tree.map(jnp.array, params)
    trained = {name: group for name, group in params.items() if name != "frozen"}
    frozen = {name: group for name, group in params.items() if name == "frozen"}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, skipped=zero.copy(), trained=trained, frozen=frozen, opt_state=optimizer.init(trained))


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

    The user function runs once for each list of candidates. A step whose loss or gradient is not finite, or whose
    gradient is too large, leaves parameters and optimizer as they were and counts in `state.skipped`.

    On a CPU the time of a large batch is the time of writing arrays such as [B, L, D] to memory. So the batch is taken in parts
    that stay in the cache. A loss of `losses.TERMS` adds up over the parts. Any other loss needs all scores first, then part
    after part the gradient of the scores, for which a part is scored again: a third more work. The result is that of one pass,
    up to the order of sums.

    Args:
      model: what to train.
      optimizer: any Optax transformation; for tables under `sparse` it must treat rows apart, see `aif_jax.sparse`.
      loss: of scores, labels and mask, and of `log_q` where the batch has it.
      sparse: which embedding tables are updated by touched rows; None updates every table whole. The state is the same, so a
        run may go on from a checkpoint with another choice.
      part: samples of a part; None takes the batch whole; "auto" takes parts where a batch lies on one CPU.
      compute_dtype: of activations: parameters and float features are cast, ages and logits stay float32, and so do the
        parameters that are kept (mixed precision with `jnp.bfloat16`).
      max_grad_norm: a gradient norm above it makes the step change nothing; to end the run instead, see `loop.fit`.
    """
    names = tables(model.config.schema, sparse)
    step = partial(
        _step,
        model=model,
        optimizer=optimizer,
        loss=loss,
        names=names,
        compute_dtype=jnp.dtype(compute_dtype),
        max_grad_norm=max_grad_norm,
    )
    compiled = jax.jit(step, donate_argnums=0, static_argnames=("part", "sizes"))
    counted = jax.jit(lambda slots, users, items: find(slots, model.config.schema, users, items), donate_argnums=0)
    return _Step(compiled, counted, names, part)


class _Step:
    """A compiled step with its scratch, which is no part of the state: nothing is kept there from one step to the next."""

    def __init__(self, compiled: Any, counted: Any, names: tuple[str, ...], part: int | Literal["auto"] | None):
        self._compiled, self._counted, self._names, self._part = compiled, counted, names, part
        self._slots: Slots = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if not self._names:
            return self._compiled(state, {}, {}, batch, part=self.part(batch, 0), sizes=())
        whole = {name: state.trained["embedding"][name] for name in self._names}
        for name, table in whole.items():
            slot = self._slots.get(name)
            if slot is None or slot.is_deleted() or not _fits(slot, table):
                self._slots |= init_slots(state.trained, [name])
        self._slots, touched = self._counted(self._slots, batch.users, batch.items)
        counts = jax.device_get({name: found.count for name, found in touched.items()})
        sizes = tuple(
            size_for(int(counts[name]), min(table.shape[0], touched[name].ids.shape[0])) for name, table in whole.items()
        )
        taken = sum(size * table.nbytes // table.shape[0] for size, table in zip(sizes, whole.values(), strict=True))
        return self._compiled(state, self._slots, touched, batch, part=self.part(batch, taken), sizes=sizes)

    def part(self, batch: Batch, taken: int) -> int | None:
        """Samples of a part of this batch, whose tables' touched rows are so many bytes; None for all."""
        if not isinstance(self._part, str):
            return self._part
        devices = batch.labels.sharding.device_set if isinstance(batch.labels, jax.Array) else jax.devices()[:1]
        return part_size(batch, taken) if len(devices) == 1 and next(iter(devices)).platform == "cpu" else None


def _fits(slot: jax.Array, table: jax.Array) -> bool:
    return slot.shape[0] == table.shape[0] and slot.sharding.device_set == table.sharding.device_set


def part_size(batch: Batch, taken: int = 0) -> int | None:
    """Samples whose candidates and histories are about PART_EVENTS; None where the batch is no larger.

    Args:
      batch: whose samples are taken in parts.
      taken: bytes of touched rows, for which large parts are cheaper.
    """
    samples, candidates = batch.labels.shape
    events = candidates + sum(h.mask.shape[1] for h in (batch.users.short, batch.users.long))
    most = max(1, PART_BYTES // max(taken, 1))  # parts
    size = max(1, PART_EVENTS // events, -(-samples // most))
    return size if size < samples else None


def _step(
    state: TrainState,
    slots: Slots,
    touched: dict[str, Touched],
    batch: Batch,
    *,
    model: PreRanker,
    optimizer: optax.GradientTransformation,
    loss: LossFn,
    names: tuple[str, ...],
    compute_dtype: Any,
    max_grad_norm: float,
    part: int | None,
    sizes: tuple[int, ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    dense, whole = split(state.trained, names)
    ids = {name: row_ids(touched[name], size, none=len(whole[name])) for name, size in zip(names, sizes, strict=True)}
    rows = {name: take_rows(whole[name], ids[name]) for name in names}
    features = (batch.users, batch.items)
    scored = partial(_score, model, compute_dtype=compute_dtype)

    def scores_of(dense: Params, rows: dict[str, jax.Array], features: Any) -> jax.Array:
        held = {name: Rows(table=rows[name], slot=slots[name]) for name in names}
        return scored(join(dense, held) | state.frozen, *features)

    def loss_of(scores: jax.Array) -> jax.Array:
        correction = {} if batch.log_q is None else {"log_q": batch.log_q}
        return loss(scores, batch.labels, where=batch.where, **correction)

    if part is None:
        scores, pull = jax.vjp(lambda dense, rows: scores_of(dense, rows, features), dense, rows)
        value, cotangent = jax.value_and_grad(loss_of)(scores)
        gradient, row_gradients = pull(cotangent)
    else:
        samples, candidates = batch.labels.shape
        parts = _parts(features, part)
        terms = TERMS.get(loss) if batch.log_q is None else None
        if terms is None:  # the loss must see all scores before it tells what each weighs
            scores = jax.lax.map(partial(scores_of, dense, rows), parts)
            value, cotangent = jax.value_and_grad(loss_of)(scores.reshape(-1, candidates)[:samples])
            weight = jnp.pad(cotangent, ((0, -samples % part), (0, 0)))  # samples that fill the last part weigh nothing

            def body(total: Any, now: tuple[Any, jax.Array]) -> tuple[Any, None]:
                features, cotangent = now
                _, pull = jax.vjp(lambda dense, rows: scores_of(dense, rows, features), dense, rows)
                return jax.tree.map(jnp.add, total, pull(cotangent)), None

            zeros = jax.tree.map(jnp.zeros_like, (dense, rows))
            (gradient, row_gradients), _ = jax.lax.scan(body, zeros, (parts, weight.reshape(-1, part, candidates)))
        else:
            all_terms = jnp.maximum(terms(batch.labels, batch.where), 1)
            labels, where = _parts((batch.labels, batch.where), part)
            where &= (jnp.arange(labels.shape[0] * part) < samples).reshape(-1, part, 1)

            def add(total: Any, now: tuple[Any, Array, Array]) -> tuple[Any, None]:
                features, labels, where = now
                share = terms(labels, where) / all_terms

                def loss_of_part(dense: Params, rows: dict[str, jax.Array]) -> jax.Array:
                    return loss(scores_of(dense, rows, features), labels, where=where) * share

                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of_part, argnums=(0, 1))(dense, rows)), None

            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, (dense, rows)))
            (value, (gradient, row_gradients)), _ = jax.lax.scan(add, zeros, (parts, labels, where))

    def update(gradient: Params, trained: Params, opt_state: Any) -> tuple[Params, Any, Any]:
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & (norm <= max_grad_norm)

        def change(trained: Params, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(gradient, opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        return *jax.lax.cond(finite, change, lambda *kept: kept, trained, opt_state), (norm, finite)

    if names:
        trained, opt_state, (norm, finite) = apply(update, state.trained, state.opt_state, gradient, ids, row_gradients)
    else:
        trained, opt_state, (norm, finite) = update(gradient, state.trained, state.opt_state)
    after = TrainState(
        step=state.step + 1,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        trained=trained,
        frozen=state.frozen,
        opt_state=opt_state,
    )
    return after, {"loss": value, "grad_norm": norm, "applied": finite}


def _parts(tree: Any, size: int) -> Any:
    """Splits the leading axis into parts of one size; the last sample fills what is missing of the last part."""

    def reshape(x: Array) -> jax.Array:
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return x.reshape(x.shape[0] // size, size, *x.shape[1:])  # no -1: some features have width 0

    return jax.tree.map(reshape, tree)


def _score(model: PreRanker, params: Params, users: Any, items: Any, *, compute_dtype: Any = jnp.float32) -> jax.Array:
    """Joint scores float32 [B, C], computed in a type of choice."""
    if compute_dtype != jnp.float32:
        cast = partial(jax.tree.map, lambda x: x.astype(compute_dtype) if x.dtype == jnp.float32 else x)
        params = {name: group if name == "frozen" else cast(group) for name, group in params.items()}
        users = dataclasses.replace(users, floats=cast(users.floats))
        items = dataclasses.replace(items, floats=cast(items.floats), content=cast(items.content))
    return jax.vmap(model.joint, (None, 0, 0))(params, users, items).astype(jnp.float32)


def score(model: PreRanker, params: Params, batch: Batch) -> jax.Array:
    """Joint scores of a batch, float32 [B, C]."""
    return _score(model, params, batch.users, batch.items)


def predict(model: PreRanker, params: Params, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Joint scores of each batch, float32 [B, C]; masked candidates get a score too."""
    scores = jax.jit(lambda params, batch: score(model, params, batch))
    for batch in batches:
        yield np.asarray(scores(params, batch))
