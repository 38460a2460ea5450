"""The training loop: steps under a progress bar, policies for what goes wrong, logs, checkpoints, resuming.

A run that is killed at any moment goes on from its last checkpoint and ends with the same parameters, bit for bit, as if it had
not been: state and cursor are saved together, and batches are a function of the cursor (`aif_jax.data.pipeline`). Source: ours.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from tqdm.auto import tqdm

from aif_jax.checkpoint import Checkpoints
from aif_jax.config import Config
from aif_jax.data.batches import Batch
from aif_jax.data.pipeline import Fed
from aif_jax.logs import LogWriter
from aif_jax.train import StepFn, TrainState

logger = logging.getLogger(__name__)
NAMED = 8  # positions of samples that a message names


class BadBatch(ValueError):
    """A batch that must not be trained on, under the policy "stop"; the message names the reason and the samples."""


@dataclasses.dataclass(kw_only=True)
class _Look:
    """What happened since the last look, and the counters of the run."""

    started: float
    waited: float = 0.0
    pending: list[tuple[int, Fed, dict[str, jax.Array]]] = dataclasses.field(default_factory=list)
    bad: int = 0
    empty: int = 0

    def restart(self) -> None:
        """Begins the next span of time."""
        self.started, self.waited, self.pending = time.perf_counter(), 0.0, []


def fit(
    state: TrainState,
    step: StepFn,
    batches: Iterable[Batch | Fed],
    *,
    total: int | None = None,
    label: str = "train",
    log_every: int = 50,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    writers: Sequence[LogWriter] = (),
    max_skipped: int = 10,
    max_grad_norm: float = math.inf,
    on_bad_batch: Literal["stop", "skip"] = "stop",
    checkpoints: Checkpoints | None = None,
    config: Config | None = None,
    save_every: int = 1000,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> TrainState:
    """Runs a step for every batch under a progress bar.

    The device works on one batch while the host gathers the next: nothing waits for a result except every `log_every` steps.

    What goes wrong, and what is done:

    | event | done | counted as |
    |---|---|---|
    | loss or gradient not finite | the step changes nothing; more than `max_skipped` end the run | `skipped` |
    | gradient norm above `make_step(max_grad_norm=)` | the same | `skipped` |
    | gradient norm above `fit(max_grad_norm=)` | the run ends at the next look, before anything is saved | |
    | no candidate in the batch | passed over, without a step | `empty_batches` |
    | a corrupt record in the batch | `on_bad_batch`: the run ends, or passes over it, `max_skipped` times | `bad_batches` |

    Each is reported, with the positions of the samples in the log, by the logger "aif_jax.loop" or in the error.

    Args:
      state: where to start; it is consumed.
      step: from `make_step`.
      batches: from `Pipeline.batches` (or `to_device` of them), or plain `Batch`es, which have no cursor to resume from.
      total: how many batches, for the bar.
      label: in front of the bar.
      log_every: steps between two looks at the loss; counted over the whole run, so that a resumed run logs the same steps.
      on_log: receives (step, values) at every look: "loss" and "grad_norm" of that step, "skipped", "empty_batches",
        "bad_batches" so far; since the look before "examples_per_s" (samples), "padding" (share of the places of the long
        history without an event) and "input_share" (share of the time that was spent waiting for a batch); and what
        `evaluate` gave. The first look's rates hold the compilation.
      writers: receive the same, see `aif_jax.logs`; their rows behind the state's step are dropped at the start.
      max_skipped: more steps than this without a finite loss or gradient, or more bad batches, end the run.
      max_grad_norm: a gradient norm above it ends the run.
      on_bad_batch: what to do with a batch whose records are corrupt.
      checkpoints: where to save the state and the cursor, every `save_every` steps and at the end; None saves nothing.
      config: of the model; goes into the checkpoints.
      save_every: steps between two checkpoints, counted over the whole run.
      evaluate: gives figures of a state before each checkpoint: for the logs, and for `Checkpoints(keep_best=...)`.
      progress: whether to show the bar.

    Returns:
      The state after the last batch.

    Raises:
      FloatingPointError: too many steps were skipped, or the gradient exploded; the message names the step and the samples.
      BadBatch: a corrupt record under "stop", or more than `max_skipped` under "skip".
      ValueError: checkpoints without a config, or a policy that does not exist.
    """
    if (checkpoints is None) != (config is None):
        raise ValueError("checkpoints, config: expected both or none: a checkpoint holds the config of its model")
    if on_bad_batch not in ("stop", "skip"):
        raise ValueError(f"on_bad_batch: expected 'stop' or 'skip', got {on_bad_batch!r}")
    if log_every < 1 or save_every < 1:
        raise ValueError(f"log_every, save_every: expected at least 1, got {log_every} and {save_every}")
    at = int(state.step)
    for writer in writers:
        writer.rewind(at)
    seen = _Look(started=time.perf_counter())
    saved, cursor = at, None
    source = iter(batches)

    with tqdm(total=total, desc=label, disable=not progress, unit="step") as bar:

        def look(figures: Mapping[str, float] | None = None) -> None:
            if not seen.pending:
                return
            values = _values(state, seen, max_skipped=max_skipped, max_grad_norm=max_grad_norm)
            values |= figures or {}
            bar.set_postfix(
                loss=f"{values['loss']:.4f}", skipped=int(values["skipped"]), samples_s=f"{values['examples_per_s']:.0f}",
                padding=f"{values['padding']:.0%}", input=f"{values['input_share']:.0%}",
            )  # fmt: skip
            seen.restart()
            for write in (*([on_log] if on_log else []), *(writer.write for writer in writers)):
                write(at, values)

        def save() -> None:
            nonlocal saved
            assert checkpoints is not None and config is not None
            figures = dict(evaluate(state)) if evaluate is not None else {}
            look(figures)
            checkpoints.save_async(at, state.params, config, opt_state=_rest(state), position=cursor, metrics=figures or None)
            saved = at
            seen.restart()

        try:
            due = False  # a look waits for the next batch: if none comes, the last look also has what `evaluate` gives
            while (item := _next(source, seen)) is not None:
                if due:
                    look()
                fed = item if isinstance(item, Fed) else _fed(item)
                bar.update(1)
                cursor = fed.cursor
                if fed.problem is not None:
                    due = False
                    _pass_over(fed, at, seen, on_bad_batch=on_bad_batch, limit=max_skipped)
                    continue
                assert fed.batch is not None
                state, metrics = step(state, fed.batch)
                at += 1
                seen.pending.append((at, dataclasses.replace(fed, batch=None), metrics))
                due = at % log_every == 0
                if checkpoints is not None and at % save_every == 0:
                    save()
            if checkpoints is not None and at > saved:
                save()
            look()
        finally:
            if checkpoints is not None:
                checkpoints.wait()
    return state


def _next(source: Iterator[Batch | Fed], seen: _Look) -> Batch | Fed | None:
    """The next batch, None at the end; the time spent waiting for it is counted."""
    asked = time.perf_counter()
    item = next(source, None)
    seen.waited += time.perf_counter() - asked
    return item


def resume(state: TrainState, checkpoints: Checkpoints, *, config: Config) -> tuple[TrainState, Any]:
    """The state and the cursor of the latest checkpoint that `fit` saved; the state given and None where there is none.

    Args:
      state: from `init_state`, of the same model and optimizer; says which arrays are expected and where they go.
      checkpoints: the folder of the run.
      config: of the model.

    Returns:
      (state, cursor for `Pipeline.batches`).

    Raises:
      ValueError: a checkpoint of another model, config or optimizer: names what differs.
      CheckpointError: a damaged checkpoint.

    Example:
      >>> import tempfile, jax, optax, aif_jax as aif
      >>> from aif_jax import train
      >>> from aif_jax.checkpoint import Checkpoints
      >>> config = aif.tiny()
      >>> fresh = train.init_state({"user": {"bias": jax.numpy.zeros(3)}}, optax.sgd(0.1))
      >>> state, cursor = resume(fresh, Checkpoints(tempfile.mkdtemp()), config=config)
      >>> int(state.step), cursor
      (0, None)
    """
    if checkpoints.latest is None:
        return state, None
    found = checkpoints.restore(config=config, like={"params": state.params, "opt_state": _rest(state)})
    parts = {group: {name: found.params[name] for name in getattr(state, group)} for group in ("trained", "frozen")}
    return dataclasses.replace(state, **parts, **found.opt_state), found.position


def _rest(state: TrainState) -> dict[str, Any]:
    """What a state holds beside the parameters: step, counters, optimizer state."""
    names = [field.name for field in dataclasses.fields(state) if field.name not in ("trained", "frozen")]
    return {name: getattr(state, name) for name in names}


def _fed(batch: Batch) -> Fed:
    """A plain batch; looked at where it still lies on the host, since fetching it from a device would stall the step."""
    where, mask = batch.where, batch.users.long.mask
    empty = isinstance(where, np.ndarray) and not where.any()
    places, events = (mask.size, int(np.count_nonzero(mask))) if isinstance(mask, np.ndarray) else (0, 0)
    return Fed(batch=batch, samples=where.shape[0], places=places, events=events, problem="empty" if empty else None)


def _values(state: TrainState, seen: _Look, *, max_skipped: int, max_grad_norm: float) -> dict[str, float]:
    """Waits for the steps since the last look, reports what went wrong in them, and sums them up."""
    fetched = jax.device_get([metrics for _, _, metrics in seen.pending])
    skipped = int(state.skipped)
    seconds = time.perf_counter() - seen.started
    for (at, fed, _), metrics in zip(seen.pending, fetched, strict=True):
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm) and metrics.get("applied", True)):
            logger.warning("step %d changed nothing: loss %g, gradient norm %g%s", at, loss, norm, _where(fed))
        elif norm > max_grad_norm:
            raise FloatingPointError(
                f"step {at}: expected a gradient norm of at most {max_grad_norm:g}, got {norm:g} at loss {loss:g}{_where(fed)};"
                " look at these samples, then at the learning rate"
            )
    last = {name: float(value) for name, value in fetched[-1].items() if name != "applied"}
    at, fed, _ = seen.pending[-1]
    if skipped > max_skipped:
        raise FloatingPointError(
            f"{skipped} of {at} steps had a loss or gradient that was not finite or too large (allowed: {max_skipped}); "
            f"the last loss is {last['loss']}{_where(fed)}: look at the inputs, then at the learning rate"
        )
    samples, places, events = (sum(getattr(f, name) for _, f, _ in seen.pending) for name in ("samples", "places", "events"))
    return last | {
        "skipped": float(skipped),
        "empty_batches": float(seen.empty),
        "bad_batches": float(seen.bad),
        "examples_per_s": samples / seconds,
        "padding": 1 - events / places if places else 0.0,
        "input_share": seen.waited / seconds,
    }


def _pass_over(fed: Fed, at: int, seen: _Look, *, on_bad_batch: str, limit: int) -> None:
    """Counts and reports a batch that is not trained on, or ends the run."""
    if jax.process_count() > 1:
        raise BadBatch(f"after step {at}: a bad batch in one of several processes: {fed.problem}{_where(fed)}")
    if fed.problem == "empty":
        seen.empty += 1
        logger.warning("after step %d: passed over a batch without a candidate%s", at, _where(fed))
        return
    seen.bad += 1
    message = f"after step {at}: a bad batch: {fed.problem}{_where(fed)}"
    if on_bad_batch == "stop":
        raise BadBatch(message)
    if seen.bad > limit:
        raise BadBatch(f"{message}; it is number {seen.bad} (allowed: {limit})")
    logger.warning("passed over: %s", message)


def _where(fed: Fed) -> str:
    """Which batch that was, and which samples, as the end of a message."""
    parts = [] if fed.place is None else [f"batch {fed.place[1]} of epoch {fed.place[0]}"]
    if fed.positions is not None:
        named = ", ".join(str(at) for at in fed.positions[:NAMED])
        parts.append(f"samples at positions {named}{', ...' if len(fed.positions) > NAMED else ''} of the log")
    return f" ({'; '.join(parts)})" if parts else ""
