"""One checkpoint folder: `save` and `load` of parameters, config, encoder, optimizer state, position and metrics."""

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np

from aif_jax import sharding
from aif_jax.checkpoint import storage
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.encoding.encoder import Encoder
from aif_jax.model import PreRanker
from aif_jax.sharding import processes
from aif_jax.store.folders import METADATA_FILE, CheckpointError, local, remove_folder, remove_unfinished
from aif_jax.store.sealed import is_json
from aif_jax.store.trained import Trained, combine, encoding_for, model_of
from aif_jax.trees import differences, leaves_by_path, listed
from aif_jax.types import ItemFeatures, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a folder.

    Attributes:
      params, config, version, encoder, settings, items: see `Trained`.
      step: training steps so far.
      opt_state: optimizer state; None if `load` got no template for it.
      position: position of the data stream, as given to `Checkpoints.save_async`.
      metrics: figures of this step by name.
    """

    params: Params = dataclasses.field(repr=False)
    config: Config
    version: str
    encoder: Encoder | None = None
    step: int = 0
    opt_state: Any = dataclasses.field(default=None, repr=False)
    position: Any = None
    metrics: dict[str, float] | None = None
    settings: dict[str, Any] | None = None
    items: ItemFeatures | None = dataclasses.field(default=None, repr=False)

    def trained(self, model: PreRanker | None = None) -> Trained:
        """Return the model of this folder; `model` is one made by `assemble`, None builds it from the config."""
        trained = Trained(model_of(self.config, model), self.params, self.encoder, self.settings, self.items)
        return trained.with_version(self.version)


def save(path: str | Path, trained: Trained, *, metrics: Mapping[str, float] | None = None) -> None:
    """Write a model as a checkpoint folder: complete, or not there at all. `Checkpoints` saves a training that goes on.

    Args:
      path: a folder that does not exist yet.
      trained: model. Its parameters are arrays of a dtype that Orbax knows, of any sharding in this process, or typed keys.
      metrics: figures by name.

    Raises:
      FileExistsError: something is there already; nothing is ever overwritten.
      ValueError: a leaf that is no array.

    Example:
      >>> import tempfile, jax, aif_jax as aif
      >>> from aif_jax import checkpoint
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(schema := aif.Schema(item_attributes=(item, category)))
      >>> model = aif.build(config)
      >>> params = model.init(jax.random.key(0), aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4}))
      >>> folder = tempfile.mkdtemp() + "/first"
      >>> checkpoint.save(folder, aif.Trained(model, params), metrics={"gauc": 0.61})
      >>> checkpoint.load(folder, config=config).metrics
      {'gauc': 0.61}
    """
    rest = (trained.encoder, 0, None, None, metrics)
    storage.write(path, pack(trained.params, trained.config, *rest, settings=trained.settings, items=trained.items))


def load(path: str | Path, *, config: Config | None = None, like: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint folder, see `save`, and check every leaf of it. No other file is needed.

    Args:
      path: what `save` wrote.
      config: the config that is expected; None takes the one inside.
      like: templates under "params" and "opt_state": trees of arrays or `jax.ShapeDtypeStruct`. A leaf with a sharding is
        restored onto it, a NumPy leaf stays in NumPy. Without a template, params are nested dicts on the default device, and
        the optimizer state is not read.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered or foreign folder, or a config with a part that is not registered; says which part.
      ValueError: another config or schema than expected, or leaves missing, renamed or resized against the template.
    """
    leaves, record = storage.inspect(path)
    if config and (lines := differences(record.get("config"), config.to_json(), path="config", source="checkpoint")):
        expected = "expected this config and schema, got others; give those saved with it, or another folder"
        raise ValueError(f"{path}: {expected}:\n{listed(lines)}")
    stored = storage.parsed(path, record, "config", Config.from_json)
    step, metrics = storage.parsed(path, record, "step", operator.index), metrics_of(path, record)
    templates = {"params": None} | {name: np.ndarray for name in ("encoder", "items") if name in leaves} | dict(like or {})
    trees, encoder = storage.read(path, leaves, templates), None
    if record.get("encoder") is not None:
        arrays = leaves_by_path(trees.get("encoder", {}))
        encoder = storage.parsed(path, record, "encoder", lambda value: Encoder.from_record(value, arrays))
    return Checkpoint(
        params=trees["params"],
        config=stored if encoder is None else stored.with_encoding(encoder.version),
        version=combine(leaves["params"], stored, encoder),
        encoder=encoder,
        step=step,
        opt_state=trees.get("opt_state"),
        position=record.get("position"),
        metrics=metrics,
        settings=record.get("settings"),
        items=storage.parsed(path, trees, "items", lambda tree: ItemFeatures(**tree)) if "items" in trees else None,
    )


def settings_of(path: str | Path) -> dict[str, Any] | None:
    """Return the settings that a checkpoint carries, or the latest one in the folder of a run; None without. Reads no array.

    Raises CheckpointError for a damaged checkpoint.
    """
    path = local(path)
    if not (path / METADATA_FILE).is_file():
        if not (steps := storage.complete_steps(path)):
            return None
        path /= str(steps[-1])
    return storage.inspect(path)[1].get("settings")


def pack(
    params: Params, config: Config, encoder: Encoder | None, step: int, opt_state: Any, position: Any, metrics: Any,
    *, settings: Mapping[str, Any] | None = None, items: ItemFeatures | None = None,
) -> storage.Payload:  # fmt: skip
    """Return trees and record of a checkpoint, checked and hashed; see `storage.pack`."""
    encoding_for(config, encoder)
    expect(is_json(position), "position", "plain JSON (dicts with string keys, lists, str, int, float)", repr(position))
    trees: dict[str, Any] = {"params": params}
    if encoder is not None:
        trees["encoder"] = encoder.to_arrays()
        if items is not None:
            trees["items"] = dataclasses.replace(items, encoding="")
    if opt_state is not None:
        trees["opt_state"] = opt_state
    record = {
        "config": json.loads(json.dumps(config.to_json())),
        "encoder": None if encoder is None else json.loads(json.dumps(encoder.to_record())),
        "step": int(step),
        "position": position,
        "metrics": {name: float(figure) for name, figure in metrics.items()} if metrics else None,
    }
    if settings is not None:
        record["settings"] = dict(settings)
    return storage.pack(jax.tree.map(sharding.local, trees), record)


def metrics_of(path: str | Path, record: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the figures in a record by name; CheckpointError for others."""
    return storage.parsed(path, record, "metrics", lambda given: {k: float(v) for k, v in (given or {}).items()} or None)


class Checkpoints:
    """The checkpoints of one training run: a folder with one sub-folder for each step that is kept.

    One process writes, or all processes of a job together (see `checkpoint.storage`); any number may read meanwhile.

    Args:
      directory: made when the first checkpoint is saved.
      keep_last: how many of the latest steps stay.
      keep_best: such as ("gauc", "max"): the best step by that metric stays too. None keeps the latest alone.
      settings: settings of the run as plain JSON, saved in every checkpoint; one with others is refused. None takes any.
      items: features of the encoder's items, see `Trained`, saved in every checkpoint.

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
        self, directory: str | Path, *, keep_last: int = 3, keep_best: tuple[str, Literal["max", "min"]] | None = None,
        settings: Mapping[str, Any] | None = None, items: ItemFeatures | None = None,
    ):  # fmt: skip
        expect(keep_last >= 1, "keep_last", "at least 1", keep_last)
        expect(keep_best is None or keep_best[1] in ("max", "min"), "keep_best", "(metric, 'max' or 'min')", keep_best)
        self.directory = local(directory)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._settings = settings
        self._items = items
        self._saving: Future[None] | None = None

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.directory)!r}, steps={self.steps}, latest={self.latest}, best={self.best})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()

    @property
    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return storage.complete_steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The highest complete step, None where there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The best complete step by the metric of `keep_best`, the later one on a tie, without a metric the latest; or None."""
        if self.keep_best is None:
            return self.latest
        name, direction = self.keep_best
        sign = 1 if direction == "max" else -1
        known = [(sign * figures[name], step) for step in self.steps if name in (figures := self._metrics(step))]
        return max(known)[1] if known else None

    def save_async(
        self, step: int, params: Params, config: Config, *, encoder: Encoder | None = None, opt_state: Any = None,
        position: Any = None, metrics: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Save in the background; the arrays may be donated or changed as soon as this returns.

        Copies to the host and hashes before it returns; waits for the save before it. The next `save_async` or `wait`, or the
        end of a `with` block, raises an error of the background. Processes of one job all call this and end it together.

        Args:
          step: must not be on disk yet.
          params, config, encoder: see `checkpoint.save`.
          opt_state: any pytree of arrays, such as an optax state.
          position: where to resume, as plain JSON: epoch, batch, offset in the update stream, seed.
          metrics: figures by name, among them that of `keep_best`.

        Raises:
          FileExistsError: the step is there already.
          ValueError: the metric of `keep_best` is missing or not finite, the position no plain JSON, or a leaf no array.
        """
        if self.keep_best is not None and processes.first():
            chooses = f"a finite {self.keep_best[0]!r}, by which keep_best={self.keep_best} chooses"
            expect(math.isfinite((metrics or {}).get(self.keep_best[0], math.nan)), "metrics", chooses, metrics)
        self.wait()
        if self._folder(step).exists():
            raise FileExistsError(f"{self._folder(step)}: expected a new step, got {step}, saved already; resume from it")
        own: dict[str, Any] = {"settings": self._settings, "items": self._items}
        ready = pack(params, config, encoder, step, opt_state, position, metrics, **own)
        if processes.several():
            storage.write(self._folder(step), ready)
            return self.tidy() if processes.first() else None

        def save() -> None:
            remove_unfinished(self.directory)  # before it takes more of the disk
            storage.write(self._folder(step), ready)
            self.tidy()

        thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving = thread.submit(save)
        thread.shutdown(wait=False)

    def restore(
        self, step: int | Literal["latest", "best"] = "latest",
        *, config: Config | None = None, like: Mapping[str, Any] | None = None,
    ) -> Checkpoint:  # fmt: skip
        """Load one step: FileNotFoundError for no such step, CheckpointError for one of another run."""
        number = self.latest if step == "latest" else self.best if step == "best" else step
        if number is None or number not in self.steps:
            raise FileNotFoundError(f"{self.directory}: expected step {step}, found steps {self.steps}; take one of them")
        found = load(self._folder(int(number)), config=config, like=like)
        self._expect_own(int(number), found.step, found.settings)
        return found

    def wait(self) -> None:
        """Wait until everything is on disk, as the end of a `with` block does. Raises what went wrong in the background."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def tidy(self) -> None:
        """Remove leftovers of killed processes, and steps neither among the last nor the best, as every save does.

        A process that only reads must not call this.
        """
        remove_unfinished(self.directory)
        keep = {*self.steps[-self.keep_last :], self.best}
        for old in self.steps:
            if old not in keep:
                remove_folder(self._folder(old))

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _expect_own(self, step: int, found: Any, settings: Any) -> None:
        """Raise unless the record in a step's folder is of that step and this run."""
        ours = self._settings is None or settings == self._settings
        got = f"step {found}{'' if ours else ' of a run with other settings'}; {storage.DAMAGED}"
        expect(ours and found == step, str(self._folder(step)), f"step {step}", got, error=CheckpointError)

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            _, record = storage.inspect(self._folder(step))
            self._expect_own(step, record.get("step"), record.get("settings"))
            return metrics_of(self._folder(step), record) or {}
        except (FileNotFoundError, CheckpointError):
            if step in self.steps:
                raise
            return {}  # the writer removed it since it was listed
