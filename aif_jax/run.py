"""`fit`, the usual training run in one call, and `Run`, what it returns: evaluate, index, serve, export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax

from aif_jax import checkpoint, export
from aif_jax.blocks.item_offset import UNTRAINED
from aif_jax.checks import check_encoding, expect
from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.encoder import Encoder
from aif_jax.index import ItemIndex
from aif_jax.model import PreRanker, name_of
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.sharding import processes
from aif_jax.store.folders import local
from aif_jax.store.trained import Trained, fingerprint
from aif_jax.train import edits
from aif_jax.train import fit as training
from aif_jax.train.distillation import Retrieval, Teacher, name_of_retrieval, name_of_teacher, with_teacher
from aif_jax.train.edits import Edit
from aif_jax.train.evaluate import Evaluation, evaluate
from aif_jax.train.fit import note
from aif_jax.train.loop import LogWriter
from aif_jax.train.losses import Loss, distill_listwise
from aif_jax.train.optimizers import SparseConfig
from aif_jax.train.step import LossFn
from aif_jax.train.tasks import Goals, NextItem, Task, task_of
from aif_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with everything that it needs in production.

    Methods that take `data` take the data set of the run, or newer data read with its encoder; other data is an
    EncodingMismatch. What they fit or count is of the events before the validation slice.

    Attributes:
      trained: model with the parameters of the best checkpoint on the validation slice, or of the last one with
        `keep_best=False`, and the encoder of the data.
      metrics: figures of the validation slice.
      settings: settings of the run.
      folder: folder of the run; None for a run without `out`.
    """

    trained: Trained
    metrics: dict[str, float]
    settings: training.FitSettings
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path, *, model: PreRanker | None = None) -> Run:
        """The run in a folder that `fit` or `save` wrote.

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
        min_history: int | None = None, repeats: bool | None = None, **options: Any,
    ) -> Evaluation:  # fmt: skip
        """Figures of a slice that training never saw.

        Args:
          split: which slice; the moments that bound it are those of training.
          k: k of HR@k and NDCG@k.
          requests: at most so many, drawn at random; None evaluates all.
          min_history: earlier events that a user must have; None takes that of training.
          repeats: whether users come back to items, for candidates and the catalogue; None takes that of training.
          options: others of `train.evaluate`.

        Raises:
          ValueError: another slice, no sample in it, a k below 1.
        """
        check_encoding("data", expected=self.trained.encoding, got=data.encoding)
        repeats = self.settings.repeats if repeats is None else repeats
        chosen: dict[str, Any] = {"requests": requests, "min_history": min_history, "repeats": repeats}
        positions, source = training.held_out(data, self.settings, split, **chosen)
        given = training.evaluation_options(self.settings)
        given |= {"repeats": repeats, "k": k if self.settings.task.ranks_catalogue else None, "candidates": source} | options
        evaluation = evaluate(self.model, self.params, data, positions, **given)
        return dataclasses.replace(evaluation, note=note(self.config, self.settings.task, evaluation.k))

    def edit(self, data: Dataset, *changes: Edit) -> Run:
        """The run with a model that functions `(Trained, Dataset) -> Trained` of `train.edits` change, one after the other.

        What they add is part of params, config and version, and so of the index, the engine and an export. A calibration of the
        run is left out, since it is of other scores: calibrate the new run. It is in memory until `save` writes it.
        """
        made = edits.chain(*changes)(self.trained, data)
        if made.items is None and made.encoding == self.trained.encoding:  # an edit may make a new Trained
            made = made.replace(items=self.trained.items)
        made = made.replace(settings=made.settings or self.trained.settings)
        return dataclasses.replace(self, trained=made, metrics={}, folder=None)

    def with_popularity_correction(self, data: Dataset, *, untrained: float | None = UNTRAINED) -> Run:
        """The same model for candidates from the whole catalogue: an offset of each item makes its score log P, not log P / q.

        Training draws negatives by popularity, so a score says how much more likely an item is for this user than it is drawn.
        That ranks candidates that popularity found, such as those that `evaluate` draws; where retrieval looks through the
        whole catalogue, the question is how likely the item is. A task with `logq_correction=True` needs no correction: it
        teaches log P. See `edit`, and `blocks.popularity_offset` for `untrained`.

        Raises:
          ValueError: a run of another task than `NextItem`, a corrected one, or one whose sampler is partly uniform.
        """
        task = self.settings.task
        if not isinstance(task, NextItem) or task.logq_correction or task.uniform > 0:
            expected = "a NextItem task with candidates by popularity, not corrected"
            raise ValueError(f"with_popularity_correction: expected {expected}, got {task}")
        correction = edits.popularity_correction(before=self.settings.first_validation, power=task.power, untrained=untrained)
        return self.edit(data, correction)

    def with_svd(self, data: Dataset, **options: Any) -> Run:
        """The same model with co-engagement: a `PureSvd` block with the factors of the events before the validation slice.

        The factors are fitted after training, see `blocks.PureSvd` and `edit`. `options` are `width`, `length`, `decay` and
        `deviation` of `train.fit_pure_svd`, which also says what is refused.
        """
        return self.edit(data, edits.svd_term(before=self.settings.first_validation, **options))

    def with_unseen_items(self, data: Dataset) -> Run:
        """The same model, with items without a training event scored as the unknown item with their own other features.

        For a run with `id_dropout`, which trains the unknown item; ValueError for another. See `edit`.
        """
        expect(self.settings.id_dropout > 0, "with_unseen_items", "a run with id_dropout above 0", "one with 0")
        return self.edit(data, edits.unseen_items(before=self.settings.first_validation))

    def calibrate(self, data: Dataset, *, requests: int | None = None, **options: Any) -> Run:
        """The run with logits that serving turns into calibrated probabilities, fitted on the validation slice.

        Its version is another, so an index is built after it. `metrics` are those that a calibration leaves as they are.

        Args:
          requests: at most so many, drawn at random; None takes all.
          options: see `train.edits.calibration`.

        Raises:
          ValueError: a run without a validation slice, or as `train.edits.calibration`.
        """
        validation = functools.partial(training.held_out, settings=self.settings, split="validation", requests=requests)
        given: dict[str, Any] = {"calibration_negatives": self.settings.task.calibration_negatives} | options
        made = self.edit(data, edits.calibration(validation, **given))
        return dataclasses.replace(made, metrics=training.of_ranking(self.metrics))

    def index(self, items: Any, **options: Any) -> ItemIndex:
        """The item index of a catalogue; arguments as for `ItemIndex.build`.

        `items` is the path of the items file that training read, or of a newer one; a `Catalogue`; or raw values by column.
        """
        return ItemIndex.build(self.trained, items, **options)

    def serve(
        self, index: ItemIndex, *, features: Callable[..., Any], retrieval: Callable[..., Any] | None = None,
        config: ServingConfig | None = None,
    ) -> AsyncPreRanker:  # fmt: skip
        """The engine: `async with run.serve(index, features=..., retrieval=...) as engine`; arguments of `AsyncPreRanker`."""
        return AsyncPreRanker(self.trained, index, features=features, retrieval=retrieval, config=config)

    def save(self, folder: str | Path) -> None:
        """Writes the run as a checkpoint: `Run.load`, `checkpoint.load` and `--checkpoint` of every command read it.

        For a model that the folder of `fit` does not hold: one with factors, with an offset, or calibrated in memory.

        Raises:
          FileExistsError: something is there already.
        """
        checkpoint.save(folder, self.trained, metrics=self.metrics)

    def export(self, folder: str | Path, *, index: ItemIndex | None = None, **options: Any) -> str:
        """Writes compiled functions, parameters, encoder and index into one folder; arguments as for `export.save`."""
        return export.save(folder, self.trained, index, **options)


def fit(
    model: PreRanker,
    data: Dataset,
    *,
    out: str | Path | None = None,
    task: Task | None = None,
    epochs: int = 3,
    batch_size: int = 256,
    loss: LossFn | None = None,
    teacher: Teacher | None = None,
    distill: Loss = distill_listwise,
    candidates: Retrieval | None = None,
    teacher_candidates: int = 16,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    sparse: SparseConfig | None = SparseConfig(),  # noqa: B008 frozen
    compute_dtype: Any = jnp.float32,
    buckets: tuple[int, ...] | Literal["auto"] = "auto",
    id_dropout: float = 0.0,
    seed: int = 0,
    min_history: int = 1,
    validation: Any = 0.1,
    test: Any = 0.1,
    since: Any = None,
    start: Params | None = None,
    replay: float = 0.0,
    without: tuple[Any, Any] | None = None,
    requests: int = 2000,
    k: int | None = 100,
    repeats: bool | None = None,
    evaluate_every: int | None = None,
    keep_best: str | bool = True,
    resume: bool = True,
    writers: Sequence[LogWriter] = (),
    progress: bool = True,
) -> Run:
    """Trains a model: splits by time, samples candidates, runs the loop, evaluates on the validation slice, keeps the best.

    Killed at any moment, the same call resumes from the last checkpoint and ends with the same parameters, bit for bit.

    The processes of one job (`jax.distributed`) all make this call, with the same arguments. Each takes its share of every
    batch, process 0 writes the logs and evaluates; every process returns the run.

    Args:
      model: from `build`.
      data: from `read`, or any `Dataset`.
      out: folder of the run: checkpoints, `fit.json`, `log.jsonl`. None keeps nothing on disk. Several processes need one that
        all of them see.
      task: samples, candidates and labels: `NextItem`, `Liked`, `Impressions` or `Cascaded`. None takes `NextItem`, if all
        events are of one action or `Columns.history_actions` names the positives; ValueError otherwise.
      epochs: how often every sample comes. With `learning_rate` and `weight_decay` the recipe of all models of the results.
      batch_size: samples a step.
      loss: a `losses.Loss`, `Goals` or any function, see `make_step`; None takes that of the task.
      teacher: a ranker, whose scores are trained on too: a `Trained` model of this data, such as `run.trained`; a function of
        positions [B] in the log and catalogue rows [B, C] that returns float32 [B, C]; or the name of a label of
        `data.cascade`, a column of scores that any ranker has logged. None for none. For one objective.
      distill: the loss of the ranker's scores, with its weight: `4.0 * losses.distill_listwise`.
      candidates: what retrieval finds for each sample, a function of positions [B] in the log that returns catalogue rows
        [B, N], or such rows [n, N] of all events. The ranker scores them once, before training, into the folder of the run.
        None: it scores the candidates of the task alone, in every epoch.
      teacher_candidates: how many retrieved candidates of each sample are drawn for a batch.
      learning_rate, weight_decay: learning rate and weight decay of AdamW under a warm-up and a cosine decay.
      optimizer: any Optax transformation in its place.
      sparse: which tables get sparse updates, see `make_step`.
      compute_dtype: dtype of activations, see `make_step`.
      buckets: shorter lengths of the history, such as 128, 256, 512, 1024 for one of 2,048: samples of like length share a
        batch, which costs less padding, see `Pipeline`. Each length compiles once more; without any, all are padded to one.
        "auto" chooses from the histories and the number of steps (`data.pipeline.choose_lengths`), or resumes with the run's.
      id_dropout: share of candidates that are trained without their item id, see `Pipeline` and `Run.with_unseen_items`.
      seed: seed of parameters, order and candidates.
      min_history: strictly earlier events that the user of a sample must have.
      validation, test: a share of the task's samples in the order of time, or the moment when the slice begins: an ISO date
        such as "2022-05-06", a `datetime`, or an integer in `Columns.time_unit`. The last slice, test, is for `Run.evaluate`.
      since: train on samples from this moment on, a date or number as for `validation`; shares are of these.
        Histories and popularity still hold what was before; None: all samples.
      start: parameters to begin with, `fitted` included, such as yesterday's under today's vocabulary, see
        `refreshing.warm_start`; None draws them. The optimizer state starts afresh.
      replay: how many samples from before `since`, drawn at random, are trained on too: a share of those after it.
      without: (first moment, first moment after) of samples that are never trained on, replayed or not, such as a period to
        judge on; dates or numbers as for `since`. None leaves none out.
      requests: samples of the validation slice that are evaluated, at most.
      k: k of HR@k and NDCG@k in the catalogue; None does not rank it.
      repeats: whether users come back to items; None: as in the data. If not, an item that the user has met is no negative in
        training, and no candidate in the lists and the catalogue of an evaluation.
      evaluate_every: steps between two evaluations, each with a checkpoint; None evaluates after every epoch. In between, one
        process saves every ten minutes.
      keep_best: return the best checkpoint by a figure of the validation slice, "gauc" for True; False returns the last.
      resume: whether to go on with the run in `out`; False refuses a folder that has one.
      writers: further logs, see `aif_jax.train.loop`.
      progress: whether to show bars and the figures of every evaluation.

    Raises:
      EncodingMismatch: a model built on the schema of another encoder's data.
      ValueError: settings that do not fit together, too few samples, a run in `out` with other settings or data.
      FileExistsError: a run in `out` with `resume=False`.
      FloatingPointError, BadBatch: as `loop`.

    Example:
      >>> import aif_jax as aif
      >>> folder = Path(tempfile.mkdtemp())
      >>> events = [f"u{n % 7},{n * n % 11},{1_600_000_000 + n}" for n in range(300)]
      >>> _ = (folder / "events.csv").write_text("\\n".join(["user,item,time", *events]))
      >>> _ = (folder / "items.csv").write_text("\\n".join(["item,category", *(f"{n},{n % 3}" for n in range(11))]))
      >>> data = aif.read(folder / "events.csv", items=folder / "items.csv", columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4))
      >>> run = aif.fit(model, data, epochs=1, batch_size=32, k=3, progress=False)
      >>> list(run.metrics)
      ['auc', 'gauc', 'gauc_mean', 'log_loss', 'calibration', 'calibration_error', 'hr@3', 'ndcg@3']
    """
    check_encoding("fit data", expected=model.config.schema.encoding, got=data.encoding)
    task = task_of(data, task)
    training.expect_labels(task, data, model.config.objectives)
    given = loss or task.loss or Goals.of(model.config.objectives)
    if teacher is not None:
        given = with_teacher(given, distill, model.config.objectives)
    elif candidates is not None:
        raise ValueError("fit candidates: expected a teacher that scores them, got none; give teacher=")
    repeats = bool(data.repeats if repeats is None else repeats)
    settings = training.FitSettings(
        task=task, **training.cuts(task, data, validation=validation, test=test, since=since),  # type: ignore[arg-type]
        loss=repr(given) if isinstance(given, Loss | Goals) else name_of(given),
        optimizer="AdamW" if optimizer is None else "given",
        teacher=None if teacher is None else name_of_teacher(teacher), teacher_candidates=teacher_candidates,
        candidates=None if candidates is None else name_of_retrieval(candidates),
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay,
        compute_dtype=jnp.dtype(compute_dtype).name, id_dropout=id_dropout, seed=seed, min_history=min_history,
        requests=requests, k=k if task.ranks_catalogue else None, repeats=repeats, evaluate_every=evaluate_every,
        keep_best="gauc" if keep_best is True else keep_best or None,
        start=None if start is None else fingerprint(start, model.config, data.encoder), replay=replay,
        without=None if without is None else training.moments(without, data, "fit without"),
    )  # fmt: skip
    expect(out is not None or not processes.several(), "fit out", "a folder that all processes of the job see", None)
    goes_on = local(out, "out") if out is not None and resume else None
    lengths = training.buckets(buckets, data, settings, model.config, folder=goes_on)
    settings = dataclasses.replace(settings, buckets=lengths)
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as folder:
        if processes.first():
            training.begin(local(folder, "out"), settings, resume=resume)
        saved = training.train(
            model, data, settings, folder=Path(folder), loss=given, teacher=teacher, candidates=candidates, start=start,
            optimizer=optimizer, sparse=sparse, writers=writers, progress=progress,
        )  # fmt: skip
    where = None if out is None else Path(out)
    return Run(trained=saved.trained(model), metrics=saved.metrics or {}, settings=settings, folder=where)
