"""The training loop: steps under a progress bar, policies for what goes wrong, logs, checkpoints, resuming.

A run that is killed at any moment resumes from its last checkpoint and ends with the same parameters, bit for bit, as without
the kill: state and cursor are saved together, and batches are a function of the cursor (`aif_jax.data.pipeline`).
"""

import dataclasses
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax

from aif_jax.checkpoint import Checkpoints
from aif_jax.checkpoint.storage import meet
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.data.pipeline import PrefetchedBatch
from aif_jax.encoding.encoder import Encoder
from aif_jax.output import hidden, track
from aif_jax.sharding import processes
from aif_jax.store.folders import local, sync, write_file
from aif_jax.train.step import StepFn, TrainState

logger = logging.getLogger(__name__)


class JsonLines:
    """One JSON object a line: {"step": ..., "loss": ...}, on disk when `write` returns; null for values that are not finite.

    Example:
      >>> import tempfile
      >>> log = JsonLines(tempfile.mkdtemp() + "/log.jsonl")
      >>> log.write(10, {"loss": 0.5}), log.write(20, {"loss": 0.25}), log.rewind(10), log.write(20, {"loss": 0.2})
      (None, None, None, None)
      >>> [row["loss"] for row in log.rows()]
      [0.5, 0.2]
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        fresh = not self.path.exists()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync(self.path.parent)

    def rewind(self, step: int) -> None:
        """Keep the rows up to `step`."""
        if self.path.exists():
            rows = [row for row in self.rows() if row["step"] <= step]
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def rows(self) -> list[dict[str, Any]]:
        """Return rows, without an unfinished last line, which is reported. ValueError for any other line that is not JSON."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            logger.warning("%s, line %d: left out, it is cut: %r", self.path, len(lines), lines.pop()[:80])
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                text = line[:80].decode("utf-8", "replace")
                raise ValueError(f"{self.path}, line {number}: expected JSON, got {text!r}") from error
        return rows


LogFn: TypeAlias = Callable[[int, dict[str, float]], None]
"""Receives the step and the values of a log entry."""
OUTSIDE = "a block or tower of yours that reads an embedding row outside the batch needs sparse=()"


MOST_SKIPPED = 10
"""Steps without a finite loss or gradient that a run may have."""
DIVERGED = 100
"""A run has diverged if its loss is so many times that of the first step, or 1 if that is less."""


@dataclasses.dataclass(kw_only=True)
class _LogWindow:
    """Statistics since the last log entry, and totals of the run."""

    started: float
    waited: float = 0.0
    samples: int = 0
    pending: list[tuple[int, str, dict[str, jax.Array]]] = dataclasses.field(default_factory=list)  # step, its batch, metrics
    empty: int = 0
    first: float | None = None  # the loss of the first step, or of the first entry in the log of a run that is resumed

    def restart(self) -> None:
        """Begin the next log entry."""
        self.started, self.waited, self.samples, self.pending = time.perf_counter(), 0.0, 0, []


@dataclasses.dataclass(frozen=True)
class Saving:
    """Checkpoints of a `loop`, which are saved at the end too.

    Attributes:
      checkpoints: where to save the state and the cursor.
      config, encoder: config and encoder of model and data; go into the checkpoints.
      every: steps between two checkpoints, counted over the whole run.
      evaluate: returns figures of a state before each checkpoint, for logs and `Checkpoints(keep_best=...)`. All processes call
        it; the figures of process 0 count.
    """

    checkpoints: Checkpoints
    config: Config
    encoder: Encoder | None = None
    every: int = 1000
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None

    def __post_init__(self):
        expect(self.every >= 1, "Saving.every", "at least 1", self.every)


def loop(
    state: TrainState,
    step: StepFn,
    batches: Iterable[PrefetchedBatch],
    *,
    total: int | None = None,
    log_every: int = 50,
    on_log: LogFn | None = None,
    log: JsonLines | None = None,
    save: Saving | None = None,
    progress: bool = True,
) -> TrainState:
    """Run a step for every batch under a progress bar; returns the state after the last.

    The device works on one batch while the host gathers the next. The loop itself waits for results every `log_every` steps;
    with sparse tables each step also waits for the number of unique ids, see `make_step`.

    | event | done | counted as |
    |---|---|---|
    | loss or gradient not finite | the step changes nothing; more than `MOST_SKIPPED` end the run | `skipped` |
    | no candidate in the batch | skipped, without a step | `empty_batches` |

    Each is reported, with the positions of the samples, by the logger "aif_jax.train.loop".
    Errors of a source are raised, as is `BadBatch` of the pipeline for a label that is not finite.

    **Several processes** (`jax.distributed`) call this together, with equal states and each with its share of the same batches.
    Process 0 shows the bar and writes the logs; all save checkpoints. For errors see `sharding.processes.end_at_once`.

    Args:
      state: where to start; it is consumed.
      batches: from `Pipeline.batches`, or `to_device` of them.
      log_every: steps between two log entries; counted over the whole run, so that a resumed run logs the same steps.
      on_log: receives (step, values) at every log entry: "loss" and "grad_norm" of that step; totals "skipped" and
        "empty_batches"; since the last entry "examples_per_s" and "input_share" (share of the time spent waiting for batches),
        at first with compile time; figures of `Saving.evaluate`.
      log: file that process 0 writes the same to; its rows after the state's step are dropped at the start.
      save: where and when to save checkpoints; None saves none.

    Raises:
      FloatingPointError: too many steps were skipped, or the median loss since a log entry is more than `DIVERGED` times that
        of the first step; the message names the step and the samples.
    """
    expect(log_every >= 1, "loop log_every", "at least 1", log_every)
    meet()
    number = saved = int(state.step)
    log = log if processes.first() else None
    recent, source, cursor = _LogWindow(started=time.perf_counter()), iter(batches), None
    if log is not None:
        log.rewind(number)
        if rows := log.rows():  # of the run that was killed
            known = all({"loss", "empty_batches"} <= row.keys() for row in (rows[0], rows[-1]))
            expect(known, str(log.path), "rows that `loop` wrote", f"{', '.join(rows[-1])}; give this run its own log")
            recent.first, recent.empty = rows[0]["loss"], int(rows[-1]["empty_batches"])
    with hidden(not (progress and processes.first())), track(total=total, label="train", unit="steps") as bar:

        def enter(evaluate: Callable[[TrainState], Mapping[str, float]] | None = None) -> dict[str, float]:
            if not recent.pending:
                return {}
            values = _values(state, recent)  # first, since an evaluation of what is not finite says less
            figures = {name: float(value) for name, value in evaluate(state).items()} if evaluate else {}
            values |= figures
            bar.set_postfix(
                loss=f"{values['loss']:.4f}", skipped=int(values["skipped"]), samples_s=f"{values['examples_per_s']:.0f}",
                input=f"{values['input_share']:.0%}",
            )  # fmt: skip
            recent.restart()
            if log is not None:
                log.write(number, values)
            if on_log is not None:
                on_log(number, values)
            return figures

        def checkpoint() -> None:
            nonlocal saved
            if save is None or number == saved:
                return
            given: dict[str, Any] = dict(opt_state=_rest(state), position=cursor, metrics=enter(save.evaluate) or None)
            save.checkpoints.save_async(number, state.params, save.config, encoder=save.encoder, **given)
            saved = number
            recent.restart()

        try:
            due = False  # an entry waits for the next step: if none comes, the last entry also has the figures
            while True:
                began, fed = time.perf_counter(), next(source, None)
                recent.waited += time.perf_counter() - began
                if fed is None:
                    break
                bar.update(1)
                cursor = fed.cursor
                if fed.batch is None:
                    recent.empty += 1
                    logger.warning("after step %d: skipped a batch without a candidate%s", number, fed.origin)
                    continue
                if due:
                    enter()
                state, metrics = step(state, fed.batch)
                number += 1
                recent.samples += fed.batch.where.shape[0]
                recent.pending.append((number, fed.origin, metrics))
                due = number % log_every == 0
                if save is not None and number % save.every == 0:
                    checkpoint()
            checkpoint()
            enter()
            if 1 < number <= int(state.skipped):
                raise FloatingPointError(f"all {number} steps had a loss or gradient that was not finite: look at the inputs")
        finally:
            if save is not None:
                save.checkpoints.wait()
    return state


def resume(state: TrainState, checkpoints: Checkpoints, *, config: Config) -> tuple[TrainState, Any]:
    """Return the state and the cursor of the latest checkpoint that `loop` saved; the state given and None where there is none.

    Args:
      state: from `init_state`, of the same model and optimizer; says which arrays are expected and where they go.

    Raises:
      ValueError: a checkpoint of another model, config or optimizer: names what differs.
      CheckpointError: a damaged checkpoint.
    """
    latest = checkpoints.latest
    if latest is None:
        return state, None
    saved = checkpoints.restore(latest, config=config, like={"params": state.params, "opt_state": _rest(state)})
    groups = {group: {name: saved.params[name] for name in getattr(state, group)} for group in ("trained", "fitted")}
    return dataclasses.replace(state, **groups, **saved.opt_state), saved.position


def _rest(state: TrainState) -> dict[str, Any]:
    """Return the fields of a state other than parameters: step, counters, optimizer state."""
    return {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}


def _values(state: TrainState, recent: _LogWindow) -> dict[str, float]:
    """Wait for the steps since the last log entry, report what went wrong in them, and sum them up."""
    fetched = jax.device_get([metrics for _, _, metrics in recent.pending])
    skipped, seconds = int(state.skipped), time.perf_counter() - recent.started
    for (number, origin, _), metrics in zip(recent.pending, fetched, strict=True):
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            way_out = f"; {OUTSIDE}" if math.isnan(loss) else ""
            logger.warning("step %d changed nothing: loss %g, gradient norm %g%s%s", number, loss, norm, origin, way_out)
    last = {name: float(value) for name, value in fetched[-1].items()}
    number, origin, _ = recent.pending[-1]
    losses = [loss for metrics in fetched if math.isfinite(loss := float(metrics["loss"]))]
    recent.first = losses[0] if recent.first is None and losses else recent.first
    usual = statistics.median(losses) if losses else 0.0
    if recent.first is not None and usual > DIVERGED * max(1.0, recent.first):
        raise FloatingPointError(
            f"diverged: the loss was {recent.first:.4g} at first, {usual:.4g} up to step {number}; take a smaller learning rate"
        )
    if skipped > MOST_SKIPPED:
        raise FloatingPointError(
            f"{skipped} of {number} steps had a loss or gradient that was not finite (allowed: {MOST_SKIPPED}); the last loss "
            f"is {last['loss']}{origin}: look at the inputs, then take a smaller learning rate; {OUTSIDE}"
        )
    return last | {
        "skipped": float(skipped),
        "empty_batches": float(recent.empty),
        "examples_per_s": recent.samples / seconds,
        "input_share": recent.waited / seconds,
    }
