"""The checkpoints of one training run: saved in the background, pruned to the last and the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax

from aif_jax.checkpoint.contents import FORMATS, Checkpoint, contents_of, load, metrics_of, packed, write
from aif_jax.checkpoint.storage import CheckpointError, complete_steps, inspect, write_packed
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.encoding.encoder import Encoder
from aif_jax.sharding import processes
from aif_jax.store.folders import local, remove_folder, remove_unfinished
from aif_jax.types import Params


class Checkpoints:
    """The checkpoints of one training run: a folder with one sub-folder for each step that is kept.

    One process writes, or all processes of a job together, each its part (see `checkpoint.parts`); any number may read
    meanwhile, since reading looks at the folder anew each time.

    Args:
      directory: made when the first checkpoint is saved.
      keep_last: how many of the latest steps stay.
      keep_best: such as ("gauc", "max"): the best step by that metric stays too. None keeps the latest alone.
      run: a name of the run that every checkpoint carries; one of another run is refused. None takes any.
      settings: of the run, plain JSON that every checkpoint carries too, so that the run can be resumed from them alone.

    Example:
      >>> import tempfile, jax, aif_jax as aif
      >>> from aif_jax.checkpoint import Checkpoints
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)))
      >>> params = {"embedding": {"category": jax.numpy.ones((6, 8))}}
      >>> with Checkpoints(tempfile.mkdtemp(), keep_last=1, keep_best=("gauc", "max")) as run:
      ...     for step, gauc in ((1, 0.61), (2, 0.66), (3, 0.64)):
      ...         run.save_async(step, params, config, metrics={"gauc": gauc})
      >>> run.steps, run.latest, run.best
      ([2, 3], 3, 2)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 3,
        keep_best: tuple[str, Literal["max", "min"]] | None = None,
        run: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        expect(keep_last >= 1, "keep_last", "at least 1", keep_last)
        expect(keep_best is None or keep_best[1] in ("max", "min"), "keep_best", "(metric, 'max' or 'min')", keep_best)
        self.directory = local(directory)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.run = run
        self._settings = settings
        self._saving: Future[None] | None = None

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.directory)!r}, steps={self.steps}, latest={self.latest}, best={self.best})"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()

    @property
    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return complete_steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The highest complete step, None where there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The best complete step by the metric of `keep_best`, the later one on a tie; None where there is none."""
        if self.keep_best is None:
            return None
        name, direction = self.keep_best
        sign = 1 if direction == "max" else -1
        known = [(sign * figures[name], step) for step in self.steps if name in (figures := self._metrics(step))]
        return max(known)[1] if known else None

    @property
    def figures(self) -> dict[int, dict[str, float]]:
        """The figures of every complete step, by name; CheckpointError for a damaged one."""
        return {step: self._metrics(step) for step in self.steps}

    def settings(self) -> dict[str, Any] | None:
        """The settings that the latest checkpoint carries; None for no checkpoint, or one without; CheckpointError."""
        return None if self.latest is None else inspect(self._folder(self.latest), format=FORMATS)[1].get("settings")

    def save(self, step: int, params: Params, config: Config, **rest: Any) -> None:
        """Saves and waits; arguments as `save_async`."""
        self.save_async(step, params, config, **rest)
        self.wait()

    def save_async(
        self,
        step: int,
        params: Params,
        config: Config,
        *,
        encoder: Encoder | None = None,
        opt_state: Any = None,
        position: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background; the arrays may be donated or changed as soon as this returns.

        Copies to the host and hashes before it returns, writes afterwards; waits for the save before it. An error in the
        background is raised by the next `save_async` or `wait`, or at the end of a `with` block. Processes of one job all call
        this, and it returns when all have written: what one cannot do is raised in all.

        Args:
          step: must not be on disk yet.
          params, config, encoder, opt_state, position: as in `checkpoint.save`.
          metrics: figures by name; the one of `keep_best` must be among them.

        Raises:
          FileExistsError: the step is there already.
          ValueError: the metric of `keep_best` is missing or not finite, or what `checkpoint.save` refuses.
        """
        if self.keep_best is not None:
            chooses = f"a finite {self.keep_best[0]!r}, by which keep_best={self.keep_best} chooses"
            expect(math.isfinite((metrics or {}).get(self.keep_best[0], math.nan)), "metrics", chooses, metrics)
        self.wait()
        if not processes.several() and self._folder(step).exists():
            raise FileExistsError(f"{self._folder(step)}: step {step} is saved already; it stays as it is")
        own = {"run": self.run, "settings": self._settings}
        contents = contents_of(params, config, encoder, step, opt_state, position, metrics, **own)
        if processes.several():
            processes.by_first("checkpoints", lambda: remove_unfinished(self.directory))
            write(self._folder(step), contents, config)
            return processes.by_first("checkpoints", self.tidy)
        ready = packed(contents, config, copy=True)

        def save() -> None:
            remove_unfinished(self.directory)  # before it takes more of the disk
            write_packed(self._folder(step), ready)
            self.tidy()

        thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving = thread.submit(save)
        thread.shutdown(wait=False)

    def restore(
        self,
        step: int | Literal["latest", "best"] = "latest",
        *,
        config: Config | None = None,
        like: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """`load` of one step, by all processes of a job where templates are on devices of several.

        Raises FileNotFoundError for no such step; CheckpointError for one of another run; ProcessError in all processes for
        what one of them could not read.
        """
        if not all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(like or {})):
            return processes.together("checkpoints", lambda: self._restore(step, config, like))
        return self._restore(step, config, like)

    def _restore(self, step: int | str, config: Config | None, like: Mapping[str, Any] | None) -> Checkpoint:
        number = self.latest if step == "latest" else self.best if step == "best" else step
        if number is None or number not in self.steps:
            raise FileNotFoundError(f"{self.directory}: expected step {step}, found steps {self.steps}")
        found = load(self._folder(int(number)), config=config, like=like)
        self._expect_own(int(number), found.step, found.run)
        return found

    def wait(self) -> None:
        """Returns when everything is on disk, as the end of a `with` block does. Raises what went wrong in the background."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def tidy(self) -> None:
        """Removes what killed processes left, and the steps that are neither among the last nor the best.

        Every save does; `fit` does so at its end too, as nothing may be left to save. A process that only reads must not.
        """
        remove_unfinished(self.directory)
        keep = {*self.steps[-self.keep_last :], self.best}
        for old in self.steps:
            if old not in keep:
                remove_folder(self._folder(old))

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _expect_own(self, step: int, found: Any, run: Any) -> None:
        """Raises unless the record in a step's folder is that step's, of this run: a file of another may be in its place."""
        if found != step or (self.run is not None and run != self.run):
            expected, got = ("" if self.run is None else f" of the run {name}" for name in (self.run, run))
            raise CheckpointError(f"{self._folder(step)}: expected step {step}{expected}, got step {found}{got}")

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            _, record = inspect(self._folder(step), format=FORMATS)
            self._expect_own(step, record.get("step"), record.get("run"))
            return metrics_of(self._folder(step), record) or {}
        except (FileNotFoundError, CheckpointError):
            if step in self.steps:
                raise
            return {}  # the writer removed it since it was listed
