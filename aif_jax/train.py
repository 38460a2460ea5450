"""Training: a state, a step, a loop. Optax does the optimisation; `frozen` parameters are never touched.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from aif_jax.data.batches import Batch
from aif_jax.model import PreRanker
from aif_jax.types import Array, Params, record

LossFn = Callable[..., jax.Array]
"""`loss(scores [B, C], labels [B, C], *, where [B, C]) -> []`, see `losses`."""


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
    """`step(state, batch) -> (state, {"loss": [], "grad_norm": []})`; the state given is consumed."""

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


def make_step(model: PreRanker, optimizer: optax.GradientTransformation, *, loss: LossFn) -> StepFn:
    """The compiled training step of a model.

    The user function runs once for each list of candidates. A step whose loss or gradient is not finite leaves parameters and
    optimizer as they were and counts in `state.skipped`.

    Args:
      model: what to train.
      optimizer: any optax transformation.
      loss: of scores, labels and mask.
    """

    def objective(trained: Params, frozen: Params, batch: Batch) -> jax.Array:
        return loss(score(model, trained | frozen, batch), batch.labels, where=batch.where)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        value, gradient = jax.value_and_grad(objective)(state.trained, state.frozen, batch)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def update(trained: Params, opt_state: Any):
            updates, opt_state = optimizer.update(gradient, opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        trained, opt_state = jax.lax.cond(finite, update, lambda *kept: kept, state.trained, state.opt_state)
        after = TrainState(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            trained=trained,
            frozen=state.frozen,
            opt_state=opt_state,
        )
        return after, {"loss": value, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0)


def score(model: PreRanker, params: Params, batch: Batch) -> jax.Array:
    """Joint scores of a batch, float32 [B, C]."""
    return jax.vmap(model.joint, (None, 0, 0))(params, batch.users, batch.items)


def fit(
    state: TrainState,
    step: StepFn,
    batches: Iterable[Batch],
    *,
    total: int | None = None,
    label: str = "train",
    log_every: int = 50,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    max_skipped: int = 10,
    progress: bool = True,
) -> TrainState:
    """Runs a step for every batch under a progress bar.

    The device works on one batch while the host gathers the next: nothing waits for a result except every `log_every` steps.

    Args:
      state: where to start; it is consumed.
      step: from `make_step`.
      batches: may be a generator.
      total: how many batches, for the bar.
      label: in front of the bar.
      log_every: steps between two looks at the loss.
      on_log: receives (step, {"loss", "grad_norm", "skipped"}) at every look.
      max_skipped: more steps than this without a finite loss or gradient end the run.
      progress: whether to show the bar.

    Returns:
      The state after the last batch.

    Raises:
      FloatingPointError: too many steps were skipped; the message names the step and the last loss.
    """
    seen, metrics = 0, {}
    with tqdm(batches, total=total, desc=label, disable=not progress, unit="step") as bar:
        for seen, batch in enumerate(bar, 1):
            state, metrics = step(state, batch)
            if seen % log_every == 0:
                _look(state, metrics, bar, on_log, max_skipped)
        if seen % log_every:
            _look(state, metrics, bar, on_log, max_skipped)
    return state


def predict(model: PreRanker, params: Params, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Joint scores of each batch, float32 [B, C]; masked candidates get a score too."""
    scores = jax.jit(lambda params, batch: score(model, params, batch))
    for batch in batches:
        yield np.asarray(scores(params, batch))


def _look(state: TrainState, metrics: dict[str, jax.Array], bar: tqdm, on_log: Callable | None, max_skipped: int) -> None:
    values = {name: float(value) for name, value in metrics.items()} | {"skipped": float(state.skipped)}
    bar.set_postfix(loss=f"{values['loss']:.4f}", skipped=int(values["skipped"]))
    at = int(state.step)
    if on_log is not None:
        on_log(at, values)
    if values["skipped"] > max_skipped:
        raise FloatingPointError(
            f"{int(values['skipped'])} of {at} steps had a loss or gradient that was not finite (allowed: {max_skipped}); "
            f"the last loss is {values['loss']}: look at the inputs, then at the learning rate"
        )
