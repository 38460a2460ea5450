"""The training step: state, scores, gradient, Optax update. `loop` runs it.

*Parts.* On a CPU the time of a large batch is that of writing arrays such as [B, L, D] to memory, so a `losses.Loss`, which
adds up over samples, takes it in parts that stay in the cache. The result is that of the whole batch, up to the order of sums.

*Shares.* XLA runs the operations of such a part, which are small, one after the other on one core. So the parts are computed in
shares, each a call of one program. Threads dispatch them: calls of one thread run in their order, calls of several threads at
the same time. How many shares there are follows from the batch and not from the machine, so sums have one order everywhere.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aif_jax.blocks.block import own
from aif_jax.checks import expect
from aif_jax.data.pipeline import Batch
from aif_jax.layers import Rows
from aif_jax.model import PreRanker
from aif_jax.sharding.processes import in_order
from aif_jax.train import optimizers
from aif_jax.train.losses import Loss
from aif_jax.train.optimizers import Slots, UniqueIds, join_tables, row_ids, split_tables
from aif_jax.types import Array, Params, record

PART_EVENTS = 10_000
"""Candidates and behaviours of a part of a batch: with D = 32 its arrays fill the level-2 cache of a core."""
MOST_SHARES = 8
"""Shares of a batch that run at once, on as many cores."""
SHARES_BYTES = 1 << 27
"""Bytes of the gradients that the shares of a batch hold together, one each."""
PART_BYTES = 1 << 26
"""Bytes of embedding rows that all parts of a batch together may add gradients to: each part writes all of the batch's rows."""

LossFn: TypeAlias = Loss | Callable[..., jax.Array]
"""A `losses.Loss`, or any `loss(scores [B, C], labels, *, where) -> []`; it gets `log_q` too where the batch has it."""


def part_size(samples: int, events: int, row_bytes: int = 0) -> int | None:
    """Return samples of a part with about PART_EVENTS candidates and places, `events` a sample; None for a batch no larger."""
    size = max(1, PART_EVENTS // events, -(-samples // max(1, PART_BYTES // max(row_bytes, 1))))
    size = -(-samples // -(-samples // size))  # as many parts, of even size: the last one is filled up with copies
    return size if size < samples else None


def in_shares(samples: int, size: int, gradient_bytes: int = 0) -> tuple[int, int]:
    """Return shares of a batch in parts of `size` samples, and samples of a part where each share has as many."""
    parts = -(-samples // size)
    shares = min(MOST_SHARES, max(2, parts // 4), max(1, SHARES_BYTES // max(gradient_bytes, 1))) if parts > 1 else 1
    return shares, -(-samples // (shares * -(-parts // shares)))


def _threads() -> tuple[ThreadPoolExecutor, ...]:
    """Return a thread for each core but the caller's, of one step: calls of a thread wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tuple(ThreadPoolExecutor(1, "aif-train") for _ in range(min(cores, MOST_SHARES) - 1))


def _at_once(f: Callable[[int], Any], count: int, threads: Sequence[ThreadPoolExecutor]) -> list[Any]:
    """Return [f(0), ..., f(count - 1)], dispatched by this thread and others in turn."""
    first = f(0)  # compiles
    workers = {i: i % (len(threads) + 1) for i in range(1, count)}  # 0: this thread
    others = {i: threads[worker - 1].submit(f, i) for i, worker in workers.items() if worker}
    return [first, *(others[i].result() if i in others else f(i) for i in workers)]


def loss_and_gradient(
    scores_of: Callable[[Any, Batch], jax.Array], params: Any, batch: Batch, loss: LossFn, *, part: int | None,
    share: tuple[Any, int] = (0, 1),
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Return the loss [] of B samples and its gradient like `params`, any pytree that `scores_of` takes.

    `part=None` takes the batch whole, a number a `Loss` in parts of so many samples; with `share` (first, count) only the parts
    first, first + count, ... are summed; first is int32 [].
    """
    if part is None:
        whole = partial(loss, where=batch.where, **({} if batch.log_q is None else {"log_q": batch.log_q}))
        return jax.value_and_grad(lambda params: whole(scores_of(params, batch), batch.labels))(params)
    assert isinstance(loss, Loss)
    norms = loss.norms(batch.labels, batch.where)
    log_q = None if batch.log_q is None else jnp.broadcast_to(jnp.asarray(batch.log_q), jnp.shape(batch.where))
    by_length = jnp.argsort(jnp.asarray(batch.users.history.mask).sum(1))  # blocks leave out padding that all samples share
    parts = _parts(dataclasses.replace(batch, log_q=log_q), by_length, part, share)

    def add(total: Any, batch: Batch) -> tuple[Any, None]:
        def loss_of_part(params: Any) -> jax.Array:
            return loss(scores_of(params, batch), batch.labels, where=batch.where, log_q=batch.log_q, norms=norms)

        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of_part)(params)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params)), parts)[0]


def _parts(batch: Batch, order: jax.Array, size: int, share: tuple[Any, int]) -> Batch:
    """Split a batch in an order into parts of one size; copies of the last sample, without candidates, fill the last ones."""
    first, count = share
    samples = batch.where.shape[0]
    places = jnp.arange(-(-samples // (size * count)) * size * count).reshape(-1, count, size)[:, first]
    chosen = order[jnp.minimum(places, samples - 1)]
    parts = jax.tree.map(lambda x: jnp.asarray(x)[chosen], batch)
    return dataclasses.replace(parts, where=parts.where & (places < samples)[..., None])


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


StepFn: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
"""`step(state, batch) -> (state, {"loss": [], "grad_norm": []})`; the state given is consumed."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; the parameters are copied, because steps consume their state."""
    params = jax.tree.map(jnp.array, params)
    trained = {name: group for name, group in params.items() if name != FITTED}
    fitted, zero = {name: group for name, group in params.items() if name == FITTED}, jnp.zeros((), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        opt_state, seen = optimizer.init(trained), {id(leaf) for leaf in jax.tree.leaves(trained)}
    # an optimizer may keep the parameters or one array twice; no two arrays that a step consumes are one
    opt_state = jax.tree.map(lambda leaf: jnp.array(leaf) if id(leaf) in seen else seen.add(id(leaf)) or leaf, opt_state)
    return TrainState(step=zero, skipped=zero.copy(), trained=trained, fitted=fitted, opt_state=opt_state)


def score(model: PreRanker, params: Params, batch: Batch) -> jax.Array:
    """Return joint scores of a batch, float32 [B, C], or [B, C, T] for T objectives; call it inside jit."""
    return jax.vmap(model.joint, (None, 0, 0))(params, batch.users, batch.items)


def make_step(
    model: PreRanker, optimizer: optax.GradientTransformation, *, loss: LossFn, sparse: tuple[str, ...] | None = None
) -> StepFn:
    """Return the compiled training step of a model.

    A step whose loss or gradient is not finite changes nothing and counts in `state.skipped`. It is dispatched without waiting
    for its result; with sparse tables it waits for the number of unique ids, which chooses the compiled size of the update.

    Args:
      optimizer: any Optax transformation without a line search; for tables under `sparse` it must treat rows apart, see
        `train.optimizers`.
      loss: a `losses.Loss`, which one CPU takes in parts, or any function `f(scores, labels, *, where)` of float32, float32 and
        bool [B, C] that returns [] (with `log_q=`, float32 [B, C], where the batch has it), which takes the batch whole.
      sparse: names of the embedding tables that get sparse updates; None: those of 20,000 rows or more. () updates every
        table whole, for a block or tower that reads embedding rows that no feature of its batch names: under sparse updates
        they are NaN. A run may resume with another choice.

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.train import losses
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> model = aif.build(aif.presets.two_tower(aif.Schema(item_attributes=(item, category))))
      >>> step = make_step(model, optax.sgd(0.1), loss=losses.listwise_softmax + 0.1 * losses.pointwise_bce)
    """
    tables, optimizer = optimizers.sparse_tables(model.config.schema, sparse), optax.with_extra_args_support(optimizer)
    try:
        inspect.signature(loss).bind_partial(None, None, where=None)
    except TypeError as error:
        got = str(error).removeprefix("got ")
        raise TypeError(f"loss: expected a function of (scores, labels, *, where), got {got}") from None
    if isinstance(loss, Loss):
        loss = loss.bind(model.config.objectives)

    def ids_of(whole: dict[str, jax.Array], unique: dict[str, UniqueIds], sizes: tuple[int, ...]) -> dict[str, jax.Array]:
        return {name: row_ids(unique[name], size, none=len(whole[name])) for name, size in zip(tables, sizes, strict=True)}

    def gradient(
        state: TrainState, slots: Slots, unique: dict[str, UniqueIds], batch: Batch, share: Any = 0, *, part: int | None,
        shares: int = 1, sizes: tuple[int, ...],
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        dense, whole = split_tables(state.trained, tables)
        ids = ids_of(whole, unique, sizes)
        rows = {name: whole[name].at[ids[name]].get(mode="clip") for name in tables}

        def scores_of(params: tuple[Params, dict[str, jax.Array]], batch: Batch) -> jax.Array:
            dense, rows = params
            taken = {name: Rows(table=rows[name], ids=ids[name], slot=slots[name]) for name in tables}
            joined = join_tables(dense, taken) | state.fitted
            scores, positions = score(model, joined, batch), batch.display_positions
            biased = [block for block in model.config.blocks if block.training_logit and positions is not None]
            added = {block.name: block.training_logit(own(joined, block), positions) for block in biased}
            for name, logit in added.items():
                expect(np.shape(logit) == scores.shape, f"{name}.training_logit", f"shape {scores.shape}", np.shape(logit))
            return sum(added.values(), scores)

        return loss_and_gradient(scores_of, (dense, rows), batch, loss, part=part, share=(share, shares))

    def change(
        state: TrainState, unique: dict[str, UniqueIds], added: list[tuple[jax.Array, Any]], *, sizes: tuple[int, ...]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        value, (gradient, row_gradients) = jax.tree.map(lambda *each: sum(each[1:], each[0]), *added)
        ids = ids_of(split_tables(state.trained, tables)[1], unique, sizes)

        def update(gradient: Params, trained: Params, opt_state: Any) -> tuple[Params, Any, Any]:
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)

            def move(trained: Params, opt_state: Any) -> tuple[Any, Any]:
                with jax.numpy_dtype_promotion("standard"):  # schedules divide integers
                    updates, opt_state = optimizer.update(gradient, opt_state, trained, value=value)
                    return optax.apply_updates(trained, updates), opt_state

            return *jax.lax.cond(finite, move, lambda *unchanged: unchanged, trained, opt_state), (norm, finite)

        trained, opt_state, (norm, finite) = optimizers.update_rows(
            update, state.trained, state.opt_state, gradient, ids, row_gradients
        )
        skipped = state.skipped + jnp.where(finite, 0, 1)
        after = dataclasses.replace(state, step=state.step + 1, skipped=skipped, trained=trained, opt_state=opt_state)
        return after, {"loss": value, "grad_norm": norm}

    def step(
        state: TrainState, slots: Slots, unique: dict[str, UniqueIds], batch: Batch, *, part: int | None, sizes: tuple[int, ...]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return change(state, unique, [gradient(state, slots, unique, batch, part=part, sizes=sizes)], sizes=sizes)

    whole = jax.jit(step, donate_argnums=0, static_argnames=("part", "sizes"))
    add = jax.jit(gradient, static_argnames=("part", "shares", "sizes"))
    apply = jax.jit(change, donate_argnums=0, static_argnames="sizes")
    count, threads = jax.jit(partial(optimizers.unique_ids, config=model.config), donate_argnums=0), _threads()
    slots: Slots = {}  # scratch, which holds nothing from one step to the next and so is no part of the state

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        nonlocal slots
        dense, held = split_tables(state.trained, tables)
        stale = {name: table for name, table in held.items() if not _fits(slots.get(name), table)}
        slots |= {name: jnp.zeros(table.shape[0], jnp.int32) for name, table in stale.items()}
        unique: dict[str, UniqueIds] = {}
        if held:
            slots, unique = in_order(count(slots, state.fitted, batch.users, batch.items))
        counts = jax.device_get({name: ids.count for name, ids in unique.items()})
        bounds = {name: min(table.shape[0], unique[name].ids.shape[0]) for name, table in held.items()}
        sizes = tuple(optimizers.size_for(int(counts[name]), bound) for name, bound in bounds.items())
        row_bytes = sum(size * table.nbytes // table.shape[0] for size, table in zip(sizes, held.values(), strict=True))
        devices = batch.where.sharding.device_set if isinstance(batch.where, jax.Array) else jax.devices()[:1]
        one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
        (samples, events), places = batch.where.shape, batch.users.history.mask.shape[1]
        events += sum(min(places, length) for length in (model.config.short_length, model.config.long_length))
        size = part_size(samples, events, row_bytes) if one_cpu and isinstance(loss, Loss) else None
        shares = 1
        if size is not None:
            shares, size = in_shares(samples, size, row_bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(dense)))
        if shares == 1:
            return in_order(whole(state, slots, unique, batch, part=size, sizes=sizes))
        of_share = partial(add, state, slots, unique, batch, part=size, shares=shares, sizes=sizes)
        return apply(state, unique, _at_once(lambda share: of_share(np.int32(share)), shares, threads), sizes=sizes)

    return run


def _fits(slot: jax.Array | None, table: jax.Array) -> bool:
    """Return whether scratch is there, not donated to a step that failed, and as long and placed as the table."""
    if slot is None or slot.is_deleted():
        return False
    return slot.shape[0] == table.shape[0] and slot.sharding.device_set == table.sharding.device_set
