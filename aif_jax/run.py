"""`fit`, the usual training run in one call, and `Run`, what it returns: evaluate, index, serve, export."""

import contextlib
import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
import optax

from aif_jax import checkpoint, export
from aif_jax.blocks.item_offset import UNTRAINED
from aif_jax.checks import check_encoding, expect
from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.encoder import Encoder
from aif_jax.index import ItemIndex
from aif_jax.model import PreRanker, name_of
from aif_jax.output import hidden
from aif_jax.readers import read_candidates
from aif_jax.scores import objective_names, with_calibration
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.serving.requests import plain_ids
from aif_jax.sharding import processes
from aif_jax.store.folders import local
from aif_jax.store.trained import Trained, check_params, fingerprint
from aif_jax.train import edits, training
from aif_jax.train.distillation import Teacher, with_teacher
from aif_jax.train.edits import Edit
from aif_jax.train.evaluate import Evaluation, evaluate
from aif_jax.train.loop import LogFn
from aif_jax.train.losses import Loss, bce_of_each
from aif_jax.train.settings import FitConfig, FitSettings
from aif_jax.train.step import LossFn
from aif_jax.train.tasks import NextItem, Task, task_of
from aif_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with everything that it needs in production.

    Methods that take `data` take the data set of the run, or newer data read with its encoder; other data is an
    EncodingMismatch. What they fit or count is of the events before the validation slice; `calibrate` fits on the slice.

    Attributes:
      trained: model with the parameters of the best checkpoint on the validation slice, or of the last one with
        `keep_best=None`, and the encoder of the data.
      metrics: figures of the validation slice.
      settings: settings of the run.
      folder: folder of the run; None for a run without `out`.
    """

    trained: Trained
    metrics: dict[str, float]
    settings: FitSettings
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path, *, model: PreRanker | None = None) -> Self:
        """Return the run in a folder that `fit` or `save` wrote.

        Args:
          model: for one made by `assemble`, whose functions no folder holds; None builds it from the config.

        Raises:
          FileNotFoundError: no run, or no checkpoint of it.
          CheckpointError: a damaged record or checkpoint.
        """
        settings, saved = training.load(local(folder))
        return cls(trained=saved.trained(model), metrics=saved.metrics or {}, settings=settings, folder=Path(folder))

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items()) or "no validation slice"
        return f"Run({'in memory' if self.folder is None else self.folder}; validation: {figures})"

    @property
    def model(self) -> PreRanker:
        """Pure functions of the model."""
        return self.trained.model

    @property
    def params(self) -> Params:
        """Parameters of the model."""
        return self.trained.params

    @property
    def encoder(self) -> Encoder | None:
        """Raw users and items to features, with histories as long as the model reads; None for data without an encoder."""
        return self.trained.encoder

    @property
    def config(self) -> Config:
        """Config of the model."""
        return self.trained.config

    @property
    def version(self) -> str:
        """Version of the model, see `Trained`."""
        return self.trained.version

    def evaluate(
        self, data: Dataset, split: Literal["test", "validation"] = "test", *, k: int | None = 100, requests: int | None = None,
        min_history: int | None = None, **options: Any,
    ) -> Evaluation:  # fmt: skip
        """Return figures of a slice that training never saw, and those of the `train.baseline_scores` as of its first moment.

        Args:
          split: which slice; the moments that bound it are those of training.
          k: k of HR@k and NDCG@k.
          requests: at most so many, drawn at random; None evaluates all.
          min_history: earlier events that a user must have; None takes that of training.
          options: others of `train.evaluate`.

        Raises:
          ValueError: another slice, no sample in it, a k below 1.
        """
        check_encoding("data", expected=self.trained.encoding, got=data.encoding)
        settings = self.settings if min_history is None else dataclasses.replace(self.settings, min_history=min_history)
        positions, source = training.held_out(data, settings, split, requests=requests)
        given = training.evaluation_options(self.settings, data, split)
        given |= {"k": k if self.settings.task.ranks_catalogue else None, "candidates": source} | options
        return evaluate(self.model, self.params, data, positions, **given)

    def edit(self, data: Dataset, change: Edit, **options: Any) -> Self:
        """Return a run whose model is changed by a function `(trained, data, **options) -> Trained`, such as of `train.edits`.

        Params, config and version include the change, so build indexes and exports after it. A calibration of the run is
        removed: calibrate the new run. It is in memory until `save` writes it.
        """
        made = change(self.trained.replace(params=with_calibration(self.trained.params, None)), data, **options)
        expect(isinstance(made, Trained), "the result of an edit", "a Trained", type(made).__name__, error=TypeError)
        if made.items is None and made.encoding == self.trained.encoding:  # an edit may make a new Trained
            made = made.replace(items=self.trained.items)
        made = made.replace(settings=made.settings or self.trained.settings)
        return dataclasses.replace(self, trained=made, metrics={}, folder=None)

    def with_popularity_correction(self, data: Dataset, *, untrained: float | None = UNTRAINED) -> Self:
        """Return the same model for candidates from the whole catalogue: item offsets turn scores from log(P / q) into log P.

        Training draws negatives by popularity q, so its scores rank candidates that popularity found, such as those that
        `evaluate` draws. With retrieval from the whole catalogue, rank by log P, which `logq_correction=True` teaches already.
        See `edit`, and `blocks.popularity_offset` for `untrained`.

        Raises:
          ValueError: a run of another task than `NextItem`, or a corrected one.
        """
        task = self.settings.task
        if not isinstance(task, NextItem) or task.logq_correction:
            raise ValueError(f"with_popularity_correction: expected a NextItem task, not corrected, got {task}")
        return self.edit(data, edits.popularity_correction, before=self.settings.first_validation, untrained=untrained)

    def with_svd(self, data: Dataset) -> Self:
        """Return the same model with an SVD term: a `PureSvd` block with the factors of the events before the validation slice.

        See `blocks.PureSvd` and `edit`. A block that the config has keeps its sizes.
        """
        return self.edit(data, edits.svd_term, before=self.settings.first_validation)

    def with_unseen_items(self, data: Dataset) -> Self:
        """Return the same model, with items without a training event scored as the unknown item with their own other features.

        For a run with `id_dropout`, which trains the unknown item; ValueError for another. See `edit`.
        """
        expect(self.settings.id_dropout > 0, "with_unseen_items", "a run with id_dropout above 0", "one with 0")
        return self.edit(data, edits.unseen_items, before=self.settings.first_validation)

    def calibrate(self, data: Dataset, *, requests: int | None = None, progress: bool = True, **options: Any) -> Self:
        """Return the run with a calibration fitted on the validation slice, see `train.edits.calibration` and `edit`.

        `metrics` keeps the figures that a calibration does not change.

        Args:
          requests: at most so many, drawn at random; None takes all.
          progress: whether to show bars.
          options: see `train.edits.calibration`.

        Raises:
          ValueError: a run without a validation slice, or as `train.edits.calibration`.
        """
        positions, source = training.held_out(data, self.settings, "validation", requests=requests)
        given: dict[str, Any] = {"calibration_negatives": self.settings.task.calibration_negatives} | options
        with hidden(not progress):
            made = self.edit(data, edits.calibration, positions=positions, candidates=source, **given)
        return dataclasses.replace(made, metrics=training.ranking_figures(self.metrics))

    def index(self, items: Any, **options: Any) -> ItemIndex:
        """Return the item index of a catalogue; arguments as for `ItemIndex.build`.

        `items` is the path of the items file that training read, or of a newer one; a `Catalogue`; or raw values by column.
        With `Columns.item_statistics` file and raw values must have their columns, see `Dataset.statistic_columns`.
        """
        return ItemIndex.build(self.trained, items, **options)

    def serve(
        self, index: ItemIndex, *, features: Callable[..., Any], retrieval: Callable[..., Any] | None = None,
        config: ServingConfig | None = None,
    ) -> AsyncPreRanker:  # fmt: skip
        """Return the engine: `async with run.serve(index, features=..., retrieval=...) as engine`; see `AsyncPreRanker`."""
        return AsyncPreRanker(self.trained, index, features=features, retrieval=retrieval, config=config)

    def rank(self, user: Any, events: Any, candidates: Any, k: int, *, now: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the best k of some items for one user, as the engine would, in one synchronous call for notebooks and scripts.

        The item function runs for every candidate, on the item features of training.

        Args:
          user: raw id, or with user attributes or floats a mapping of column to raw value; None for an unknown user.
          events: raw events of this user by column; None for no events.
          candidates: raw item ids [C]; a repeated or unknown one is left out.
          k: how many, at least 1.
          now: time of the request, in `Columns.time_unit` or a `datetime`; None takes the present.

        Returns:
          Raw ids [n] and logits float32 [n], or [n, T] of T objectives, best first (by the first objective); n is k, or the
          number of known candidates if that is smaller.

        Raises:
          TypeError, ValueError: as `Encoder.user`; ids of another kind than the items'; k below 1; a run without an encoder.
        """
        encoder, items = self.trained.need_encoder("rank"), self.trained.items
        expect(items is not None, "rank", "a model saved with its items", "one without; serve it with an index")
        expect(isinstance(k, int | np.integer) and k >= 1, "rank k", "a whole number of at least 1", k)
        profile = user if user is None or isinstance(user, Mapping) else {encoder.columns.user_record_id: user}
        now = datetime.datetime.now(datetime.UTC) if now is None else now
        vocabulary, candidates = encoder.vocabularies["item"], plain_ids(candidates, "candidates")
        rows = np.array([row for row in dict.fromkeys(vocabulary.encode(candidates, "candidates").tolist()) if row], np.int32)
        padded = np.resize(rows, 1 << max(0, len(rows) - 1).bit_length())  # few shapes, each of which compiles once
        features = jax.tree.map(lambda leaf: leaf[padded], items)
        logits = np.asarray(jax.jit(self.model.joint)(self.params, encoder.user(profile, events, now), features))[: len(rows)]
        best = np.argsort(-(logits if logits.ndim == 1 else logits[:, 0]), kind="stable")[:k]
        return vocabulary.raw[rows[best] - 1], logits[best]

    def save(self, folder: str | Path) -> None:
        """Write the run as a checkpoint, for `Run.load`, `aif.open` and `--checkpoint`; FileExistsError if `folder` exists."""
        checkpoint.save(folder, self.trained, metrics=self.metrics)

    def export(self, folder: str | Path, *, index: ItemIndex | None = None, **options: Any) -> str:
        """Write compiled functions, parameters, encoder and index into one folder; arguments as for `export.save`."""
        return export.save(folder, self.trained, index, **options)


def fit(
    model: PreRanker,
    data: Dataset,
    config: FitConfig = FitConfig(),
    *,
    out: str | Path | None = None,
    task: Task | None = None,
    loss: LossFn | None = None,
    teacher: Teacher | None = None,
    optimizer: optax.GradientTransformation | None = None,
    start: Params | None = None,
    on_log: LogFn | None = None,
    progress: bool = True,
) -> Run:
    """Train a model: splits by time, samples candidates, runs the loop, evaluates on the validation slice, keeps the best.

    Killed at any moment, the same call resumes from the last checkpoint and ends with the same parameters, bit for bit.

    The processes of one job (`jax.distributed`) all make this call, with the same arguments. Each takes its share of every
    batch, process 0 writes the logs and evaluates; every process returns the run.

    Args:
      model: from `build`.
      data: from `read`, or any `Dataset`.
      config: epochs, batch size, learning rate, slices and all other settings.
      out: folder of the run: checkpoints and `log.jsonl`. None keeps nothing on disk. Several processes need one that
        all of them see.
      task: samples, candidates and labels: `NextItem`, `Impressions` or `Cascaded`. None takes `NextItem`, if all
        events are of one action or `Columns.history_actions` names the positives; ValueError otherwise.
      loss: a `losses.Loss` or any function, see `make_step`; None takes that of the task.
      teacher: a ranker whose scores are trained on too; None for none.
      optimizer: any Optax transformation; None takes AdamW with the rates of the config.
      start: parameters to begin with, `fitted` included, such as yesterday's under today's vocabulary,
        `refreshing.warm_start(...).params`; None draws them. The optimizer state starts afresh.
      on_log: receives the step and the values of every log entry, see `aif_jax.train.loop`.
      progress: whether to show bars and the figures of every evaluation.

    Raises:
      EncodingMismatch: a model built on the schema of another encoder's data.
      ValueError: settings that do not fit together, too few samples, a run in `out` with other settings or data.
      FileExistsError: an `out` that holds something else than a run.
      FloatingPointError, BadBatch: as `loop`.

    Example:
      >>> import aif_jax as aif
      >>> folder = Path(tempfile.mkdtemp())
      >>> events = [f"u{n % 7},{n * n % 11},{1_600_000_000 + n}" for n in range(300)]
      >>> _ = (folder / "events.csv").write_text("\\n".join(["user,item,time", *events]))
      >>> _ = (folder / "items.csv").write_text("\\n".join(["item,category", *(f"{n},{n % 3}" for n in range(11))]))
      >>> data = aif.read(folder / "events.csv", items=folder / "items.csv", columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4))
      >>> run = aif.fit(model, data, aif.FitConfig(epochs=1, batch_size=32, k=3), progress=False)
      >>> list(run.metrics)
      ['auc', 'gauc', 'gauc_mean', 'log_loss', 'calibration', 'calibration_error', 'hr@3', 'ndcg@3']
    """
    expect(type(config) is FitConfig, "fit config", "a FitConfig", repr(config))
    expect(teacher is None or isinstance(teacher, Teacher), "fit teacher", "a train.Teacher", repr(teacher))
    if teacher is not None and isinstance(teacher.candidates, str | Path):
        teacher = dataclasses.replace(teacher, candidates=read_candidates(teacher.candidates, data))
    check_encoding("fit data", expected=model.config.schema.encoding, got=data.encoding)
    task = task_of(data, task)
    training.expect_task(task, data, binary=() if loss else objective_names(model.config.objectives))
    terms = loss or task.loss or bce_of_each(model.config.objectives)
    if teacher is not None:
        terms = with_teacher(terms, teacher.loss, model.config.objectives)
    expect(out is not None or not processes.several(), "fit out", "a folder that all processes of the job see", None)
    settings = training.resolve_settings(
        config, data, model.config, task=task, out=None if out is None else local(out, "out"),
        loss=repr(terms) if isinstance(terms, Loss) else name_of(terms),
        optimizer="AdamW" if optimizer is None else "given",
        start=None if start is None else fingerprint(check_params(model, start, "start"), model.config, data.encoder),
        teacher=None if teacher is None else teacher.name,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as folder:
        if processes.first():
            training.expect_resumable(local(folder, "out"), settings)
        with hidden(not progress):
            saved = training.train(
                model, data, settings, folder=Path(folder), loss=terms, teacher=teacher, start=start, optimizer=optimizer,
                on_log=on_log,
            )  # fmt: skip
    where = None if out is None else Path(out)
    return Run(trained=saved.trained(model), metrics=saved.metrics or {}, settings=settings, folder=where)
