"""The usual training run: samples, optimizer, loop, validation, checkpoints, exact resume.

`run.fit` is the call; it comes here. For a run of another kind, use `data.pipeline`, `make_step` and `loop`.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from aif_jax import checkpoint, output, sharding
from aif_jax.checkpoint import METADATA_FILE, Checkpoint, Checkpoints, settings_of
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.data import lengths
from aif_jax.data.candidates import CandidateSource, SourceFn, expect_threshold
from aif_jax.data.cascade import RANKER, STAGES, Cascade
from aif_jax.data.dataset import Dataset
from aif_jax.data.negatives import counts_before
from aif_jax.data.order import BatchKey
from aif_jax.data.pipeline import Pipeline, to_device
from aif_jax.data.split import time_cuts
from aif_jax.encoding.times import iso_text, seconds_of
from aif_jax.model import PreRanker, fit_tables
from aif_jax.sharding import processes
from aif_jax.train import distillation
from aif_jax.train.baselines import baseline_scores
from aif_jax.train.distillation import Teacher
from aif_jax.train.evaluate import BASELINE, evaluate, labels_of, order_figures
from aif_jax.train.loop import JsonLines, LogFn, Saving, loop, resume
from aif_jax.train.optimizers import default_optimizer
from aif_jax.train.settings import LOWER_IS_BETTER, SPLITS, FitConfig, FitSettings
from aif_jax.train.step import FITTED, LossFn, TrainState, init_state, make_step
from aif_jax.train.tasks import TASKS, Cascaded, Impressions, Task
from aif_jax.trees import differences, listed
from aif_jax.types import ItemFeatures, Params

logger = logging.getLogger(__name__)


def plan(feed: Pipeline, settings: FitSettings) -> Iterator[str]:
    """Yield lines of text before a run: samples of each split and left out, new items, steps, lengths of histories."""
    data, task, least, since = feed.dataset, settings.task, settings.min_history, settings.since
    unit = "events" if task.ranks_catalogue else "requests"
    total, later = (len(task.positions(data, min_history=0, since=first, before=None)) for first in (None, since))
    train, validation, test = (len(task.positions(data, min_history=least, **settings.span(split))) for split in SPLITS)
    replayed = 0 if since is None else int((data.log.time[feed.positions] < since).sum())
    early, short = total - later - replayed, later - train - validation - test
    excluded = train + replayed - len(feed.positions)
    evaluated = f" ({min(settings.requests, validation):,} evaluated)" if validation else ""
    yield (
        f"{type(task).__name__}: of {total:,} {unit} {len(feed.positions):,} to train on, {validation:,} for "
        f"validation{evaluated} from {iso_text(settings.first_validation)}, {test:,} for the test from "
        f"{iso_text(settings.first_test)}; left out: {early:,} before the first moment (since), {excluded:,} in the span "
        f"excluded (without), {short:,} with fewer than {least} earlier events of the user (min_history)"
    )
    if task.ranks_catalogue and (validation or test):
        split = "validation" if validation else "test"
        at, _ = held_out(data, settings, split, requests=settings.requests)
        new = np.mean(counts_before(data, settings.first_validation)[data.log.item[at]] == 0)
        yield f"{split}: {new:.1%} of the requests are for an item without a training event"
    histories = ", ".join(map(str, feed.lengths))
    yield f"batches: {len(feed):,} steps of {feed.batch_size:,} samples, lengths of the history {histories}"
    if (items := len(data.catalogue) - 1) <= (settings.k or 0):
        yield f"hr@{settings.k} is 1 for every model: the catalogue has {items:,} items; take a smaller k"


def say(line: str) -> None:
    """Print a line of process 0 on stderr, where the progress bar is."""
    if processes.first():
        output.say(line)


LOG = "log.jsonl"
PASSED_ON = 4  # one of so many candidates of a teacher is kept: the cut of its ranker recall


def span_of(span: tuple[Any, Any] | None, data: Dataset, name: str) -> tuple[int, int] | None:
    """Return two moments in seconds, dates or numbers in the unit of the data; ValueError for others."""
    if span is None:
        return None
    first, after = (seconds_of(moment, name, unit=data.columns.time_unit) for moment in span)
    return first, after


def resolve_settings(
    config: FitConfig, data: Dataset, model: Config, *, task: Task, out: Path | None, **names: Any
) -> FitSettings:
    """Return the settings of a run: what the config leaves open follows from data, model, task, and the run in `out`."""
    times = data.log.time[task.positions(data, min_history=0, since=None, before=None)]
    bounds = {"validation": config.validation, "test": config.test, "since": config.since}
    since, first_validation, first_test = time_cuts(times, **bounds, unit=data.columns.time_unit)
    decided = {
        "task": task, "since": since, "first_validation": first_validation, "first_test": first_test,
        "validation": None, "test": None, "k": config.k if task.ranks_catalogue else None,
        "newest": int(data.log.time.max()) if len(data.log) else -1, "without": span_of(config.without, data, "fit without"),
        "buckets": config.buckets or (), "repeats": bool(data.repeats),
    }  # fmt: skip
    settings = FitSettings(**vars(config) | decided | names)
    if config.buckets is not None:
        return settings
    if out is not None and (record := settings_of(out)) is not None:
        return dataclasses.replace(settings, buckets=tuple(record.get("buckets", ())))
    positions, longest = training_positions(data, settings), model.history_length
    histories, steps = lengths.sampled_lengths(data, positions, longest=longest), len(positions) // config.batch_size
    chosen = lengths.choose_lengths(histories, longest=longest, batch_size=config.batch_size, steps=config.epochs * steps)
    return dataclasses.replace(settings, buckets=chosen)


def training_positions(data: Dataset, settings: FitSettings) -> np.ndarray:
    """Return samples that a run trains on: those of its span, and `replay` times as many from before it, at random.

    Neither has one of the span `without`.
    """
    first, after = settings.without or (0, 0)

    def positions_in(**span: int | None) -> np.ndarray:
        positions = settings.task.positions(data, min_history=settings.min_history, **span)
        times = data.log.time[positions]
        return positions[(times < first) | (times >= after)]

    positions = positions_in(**settings.span("train"))
    if not settings.replay:
        return positions
    earlier = positions_in(since=None, before=settings.since)
    count = min(len(earlier), round(settings.replay * len(positions)))
    return np.union1d(positions, np.random.default_rng((settings.seed, 1)).choice(earlier, count, replace=False))


def expect_task(task: Task, data: Dataset, *, binary: Collection[str] = ()) -> None:
    """Raise ValueError for no task, thresholds that are no action row or that all or none reach, labels but 0 and 1."""
    expect(type(task) in TASKS.values(), "fit task", f"one of {', '.join(TASKS)}; others by make_step", task)
    known = data.cascade.labels if isinstance(task, Cascaded) and data.cascade is not None else {}
    for name, values in known.items():
        wrong = values[(values != 0) & (values != 1) & ~np.isnan(values)][:3].tolist() if name in binary else []
        expect(not wrong, f"labels {name!r}", "0 or 1, empty where unknown", f"{wrong}; make them so, or give a loss")
    several = isinstance(task, Impressions) and isinstance(task.threshold, Mapping)
    for objective, threshold in task.thresholds.items():
        name = f"threshold[{objective!r}]" if several else "threshold"
        expect_threshold(data, threshold, name)
        reached = data.action_counts[::-1].cumsum()[::-1] / max(1, data.action_counts.sum())
        names = data.action_names or range(1, data.schema.actions)
        listed = ", ".join(f"{row + 1} ({value!r}): {reached[row + 1]:.1%}" for row, value in enumerate(list(names)[:20]))
        way_out = f"events by least action row: {listed}; take one that some events reach and others do not, or other events"
        got = f"{reached[threshold]:.0%} positives for {threshold}; {way_out}"
        expect(0 < reached[threshold] < 1, name, "positives and negatives among the events", got)


def train(
    model: PreRanker, data: Dataset, settings: FitSettings, *, folder: Path, loss: LossFn, teacher: Teacher | None,
    start: Params | None, optimizer: optax.GradientTransformation | None, on_log: LogFn | None,
) -> Checkpoint:  # fmt: skip
    """Train in a folder, from its last checkpoint on; returns the best one by `settings.keep_best`, else the last."""
    task, config = settings.task, model.config
    source = task.source(data, before=settings.first_validation)
    positions, candidates, validated = training_positions(data, settings), source, data
    if teacher is not None:
        kept = folder / "ranker_scores"
        candidates = with_scores(source, data, positions, teacher, folder=kept)
        validated = with_ranker(data, settings, teacher, folder=kept) if settings.validates else data
    feed = Pipeline(
        dataset=data, positions=positions, config=config, batch_size=settings.batch_size, source=candidates,
        epochs=settings.epochs, seed=settings.seed, buckets=settings.buckets, id_dropout=settings.id_dropout,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    labels_of(config, source(positions[:1], BatchKey(settings.seed, 0, 0)).labels)  # raises for those that the model needs
    for line in plan(feed, settings):
        say(line)
    validate = validation(model, validated, settings) if settings.validates else None
    optimizer = optimizer or default_optimizer(
        len(feed), learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
    )
    params = init_params(model, data, seed=settings.seed) if start is None else start
    state, place = init_state(params, optimizer), jax.device_put
    if processes.several():
        mesh = sharding.row_mesh()
        state, place = sharding.place_state(state, mesh), partial(sharding.place_batch, mesh=mesh)
    step = make_step(model, optimizer, loss=loss, sparse=settings.sparse)
    with checkpoints_of(folder, settings.to_json(), data.catalogue.items) as checkpoints:
        state, cursor = resume(state, checkpoints, config=config)
        epoch, batch = feed.start(cursor)
        left = len(feed) - epoch * feed.steps_per_epoch - batch
        with to_device(feed.batches(cursor), place=place) as batches:
            saving = Saving(
                checkpoints, config, data.encoder and data.encoder.with_length(config.history_length),
                every=settings.evaluate_every or feed.steps_per_epoch, evaluate=validate,
            )  # fmt: skip
            loop(state, step, batches, total=left, on_log=on_log, log=JsonLines(folder / LOG), save=saving)
        if processes.first():
            checkpoints.tidy()
        return checkpoints.restore("best")


def with_scores(source: SourceFn, data: Dataset, positions: np.ndarray, teacher: Teacher, *, folder: Path) -> CandidateSource:
    """Return the candidates of a run with a ranker's scores; those of retrieved ones are kept in a folder."""
    found: Any = teacher.candidates
    if isinstance(teacher.ranker, str):
        scores = distillation.logged_ranks(data, teacher.ranker, positions)
        say(f"ranker: {len(scores.positions) / len(positions):.1%} of the samples have scores of {teacher.ranker!r}")
    else:
        scores = distillation.scores_of(teacher.ranker, data)
        if found is not None:
            expected, out = "one process, which scores them", "score them by a run of one"
            expect(not processes.several(), "Teacher.candidates", expected, f"several; {out}")
            scores = distillation.rank_retrieved(scores, data, positions, found, folder=folder, name=teacher.name)
    return distillation.distilled(source, scores, name=teacher.name, count=teacher.count)


def with_ranker(data: Dataset, settings: FitSettings, teacher: Teacher, *, folder: Path) -> Dataset:
    """Return the data with a teacher as the ranker of a cascade, for `Evaluation.ranker_recall` of the validation slice.

    A label of a cascade is that ranker; others rank what retrieval finds, or the lists of the task, unless it is `Cascaded`.
    """
    judged = copy.copy(data)  # with what it has computed
    if data.cascade is not None and (isinstance(teacher.ranker, str) or isinstance(settings.task, Cascaded)):
        more = {RANKER: data.cascade.labels[teacher.ranker]} if isinstance(teacher.ranker, str) else {}
        vars(judged)["cascade"] = dataclasses.replace(data.cascade, labels=dict(data.cascade.labels) | more)
        return judged
    if isinstance(teacher.ranker, str) or processes.several():
        return data
    positions, source = held_out(data, settings, "validation", requests=settings.requests)
    found: Any = teacher.candidates if teacher.candidates is not None else lambda at: source(at, BatchKey(0, 0, 0)).rows
    scores = distillation.scores_of(teacher.ranker, data)
    shown = isinstance(settings.task, Impressions) and teacher.candidates is None  # which were candidates, met before or not
    vars(judged).update(digest=data.digest, repeats=data.repeats or shown)
    ranked = distillation.rank_retrieved(scores, judged, positions, found, folder=folder / "validation", name=teacher.name)
    starts, first = np.unique(data.log.history_end(ranked.positions), return_index=True)
    first, starts = (each[(ranked.rows[first] > 0).sum(1) > 1] for each in (first, starts))  # others have no order
    rows, of = ranked.rows[first], ranked.scores[first]
    places = np.argsort(np.argsort(np.where(rows > 0, -of, np.inf), axis=1), axis=1)
    kept = PASSED_ON * places < (rows > 0).sum(1, keepdims=True)
    stage = np.where(kept, STAGES.index("ranked"), STAGES.index("retrieved")).astype(np.int8)
    vars(judged)["cascade"] = Cascade(positions=starts, rows=rows, stage=stage, labels={RANKER: np.where(rows > 0, of, np.nan)})
    return judged


def init_params(model: PreRanker, data: Dataset, *, seed: int) -> Params:
    """Return parameters before training; the trained ones by one function, compiled without optimization as it runs once."""
    fitted = fit_tables(model.config, data.catalogue, seed=seed)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def trained(key: jax.Array) -> Params:
        params = model.init(key, None, fitted=fitted)
        return {name: group for name, group in params.items() if name != FITTED}  # what is fitted is no constant of the program

    return trained(jax.random.key(seed)) | {FITTED: fitted}


def checkpoints_of(folder: Path, record: dict[str, Any], items: ItemFeatures | None = None) -> Checkpoints:
    """Return the checkpoints of a run by its settings as they are saved, with the features of its items."""
    best = record["keep_best"]
    keep_best = None if best is None else (best, "min" if best in LOWER_IS_BETTER else "max")
    return Checkpoints(folder, keep_best=keep_best, settings=record, items=items)


def held_out(data: Dataset, settings: FitSettings, split: str, *, requests: int | None = None) -> tuple[np.ndarray, SourceFn]:
    """Return positions of a slice, at most `requests` drawn at random, and the source of their candidates."""
    expect(split in ("validation", "test"), "split", "'validation' or 'test', which training never saw", repr(split))
    span, task, least = settings.span(split), settings.task, settings.min_history
    positions = task.positions(data, min_history=least, **span)
    expect(len(positions) > 0, split, f"a sample with {least} earlier events of its user", f"none in {span}")
    if requests is not None and requests < len(positions):
        positions = np.sort(np.random.default_rng(0).choice(positions, requests, replace=False))
    return positions, task.source(data, before=span["since"], held_out=True)


def validation(model: PreRanker, data: Dataset, settings: FitSettings) -> Callable[[TrainState], dict[str, float]]:
    """Return figures of a state on the validation slice; ValueError where that of `keep_best` is not defined on it."""
    positions, source = held_out(data, settings, "validation", requests=settings.requests)
    rows, named, _ = source(positions, BatchKey(0, 0, 0))
    labels = next(iter(labels_of(model.config, named).values()))
    defined = order_figures(np.zeros(rows.shape), labels, data.log.user[positions], (rows > 0) & ~np.isnan(labels))
    logged = data.cascade if data.cascade is not None and RANKER in data.cascade.labels else None
    ranked = logged is not None and np.isin(data.log.history_end(positions), logged.positions).any()
    fits = {name: math.isfinite(part.mean) for name, part in defined.items()} | {"ranker_recall": ranked}
    of_ranker = {"ranker_recall": f"scores of a teacher (of Cascaded a label), or of a cascade with the label {RANKER!r}"}
    needs = of_ranker.get(settings.keep_best or "", "candidates of both labels (gauc: of one user)")
    got = f"{settings.keep_best!r}: none of its {len(positions)} samples has {needs}; give keep_best='log_loss' or None"
    figure = (settings.keep_best or "").removesuffix("_mean")  # that of GAUC is defined where GAUC is
    expect(fits.get(figure, True), "FitConfig.keep_best", "a figure that the validation slice defines", got)
    options: dict[str, Any] = evaluation_options(settings, data, "validation") | {"candidates": source}

    def figures(state: TrainState) -> dict[str, float]:
        if not processes.first():
            return {}  # process 0 writes the logs, and the record of a checkpoint
        evaluation = evaluate(model, jax.tree.map(sharding.local, state.params), data, positions, **options)
        say(f"step {int(state.step)}, validation: {evaluation}")
        return {name: value for name, value in evaluation.figures().items() if BASELINE not in name}

    return figures


def evaluation_options(settings: FitSettings, data: Dataset, split: str) -> dict[str, Any]:
    """Return options of `evaluate` that follow from a run; baselines are as of the first moment of the slice."""
    baselines = baseline_scores(data, before=settings.span(split)["since"], thresholds=settings.task.thresholds)
    return {"k": settings.k, "calibration_negatives": settings.task.calibration_negatives, "baselines": baselines}


def expect_resumable(folder: Path, settings: FitSettings) -> None:
    """Raise unless a run can start or go on in a folder: FileExistsError, or ValueError for a run with other settings."""
    there, new = (folder / METADATA_FILE).is_file(), "a new folder or one of a run"
    expect(not there, str(folder), new, "a checkpoint; give another `out`", error=FileExistsError)
    if not Checkpoints(folder).steps:
        return
    record = settings_of(folder)
    expect(record is not None, str(folder), new, "checkpoints without settings; give another `out`", error=FileExistsError)
    if lines := differences(record, settings.to_json(), path="fit", source="run"):
        raise ValueError(f"{folder}: expected a run with these settings, found another:\n{listed(lines)}")


def load(folder: Path) -> tuple[FitSettings, Checkpoint]:
    """Return the settings of the run in a folder, and the checkpoint of its model; FileNotFoundError without a run."""
    record, saved = settings_of(folder), (folder / METADATA_FILE).is_file()
    if record is None:
        found = "a checkpoint; open it by aif.open" if saved else "no checkpoint of one; give the --out of train"
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found {found}")
    settings = FitSettings.from_json(record, str(folder))
    if saved:
        return settings, checkpoint.load(folder)
    with checkpoints_of(folder, record) as checkpoints:
        return settings, checkpoints.restore("best")


def ranking_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that a calibration does not change: those without log-loss and calibration, of objectives either."""
    changed = ("log_loss", "calibration", "calibration_error")
    return {name: value for name, value in figures.items() if name.rpartition(".")[2] not in changed}
