"""A run: one data set, task, model, recipe and seed. It is trained and evaluated once, and leaves one record."""

from __future__ import annotations

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import checkpoint, train
from aif_jax.blocks.signatures import sign
from aif_jax.data import candidates
from aif_jax.data.candidates import NegativeSampler, SampleKey, item_counts
from aif_jax.data.dataset import Dataset
from aif_jax.data.pipeline import Pipeline
from aif_jax.data.split import eligible
from aif_jax.train import losses
from aif_jax.train.edits import fit_pure_svd, unseen_as_unknown
from aif_jax.train.evaluate import rank_catalogue
from aif_jax.train.loop import loop
from aif_jax.types import Params
from experiments import common
from experiments.signatures import random_projection
from experiments.study import catalogue, datasets, models, recipes
from experiments.study.evaluation import (
    MIN_HISTORY,
    Requests,
    by_history,
    earlier,
    held_out,
    hits,
    pick,
    ranker_recall,
    rested,
    sampled_figures,
    sampled_scores,
)

BOUNDS = (MIN_HISTORY, 20, 50, 100, 200, 500)  # of histories, for the figure
LARGE, OF_LARGE = 20_000, 1000  # items of a catalogue that is ranked for so many of the requests only, drawn at random
LONG = 200  # earlier events of a long user
SEEN = (32, 128, 512, 2048)  # last events that a state has seen, where it is evaluated on less or more than in training
WITHOUT_LIMIT = (
    "preset",
    *models.STREAMING,
    *models.RESTING,
)  # models that are evaluated on more history than they were trained on
IN_CATALOGUE = ("preset", "preset, L=2048", "two_tower", "streaming")  # models that rank the whole catalogue for every request
FACTORED = IN_CATALOGUE  # models that are evaluated with the factors of co-engagement too,
NOT_FACTORED = ("taobao",)  # but not where people come back to items: there they lose on the validation slice
USUAL = {"compute": "float32", "projection": "rotated", "batches": "mixed"}
"""Of a run, what is in its id only where it differs."""
BY_LENGTH = "length buckets"
KEPT = ("exact", *IN_CATALOGUE)  # models whose parameters are kept, for recipes and for times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is trained and evaluated."""

    batch: int = 256
    requests: int = 3000  # with sampled candidates
    catalogue: int = 500  # of them that score the whole catalogue
    smoke: bool = False


SIZES = Sizes()
SMOKE = Sizes(batch=64, requests=64, catalogue=16, smoke=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What names a run.

    Attributes:
      dataset: see `datasets`.
      model: see `models`.
      seed: of parameters, order and negatives.
      task: "next" (which item comes next?) or "liked" (does the user like the item?).
      recipe: see `recipes`; of the next-item task.
      slice: "test", or "validation" for a trial of hyperparameters: then trained on `train` alone, else on all before the test.
      learning_rate, epochs, weight_decay: of the optimizer.
      compute: dtype of activations in training; parameters, scores and evaluation are float32.
      projection: behind the signatures, "rotated" (fitted on the catalogue, see `fit_projection`) or "random".
      batches: "mixed", or BY_LENGTH: samples share a batch with samples of like length, see `Pipeline.buckets`.
    """

    dataset: str
    model: str
    seed: int
    task: str = "next"
    recipe: str = recipes.DEFAULT
    slice: str = "test"
    learning_rate: float = 3e-3
    epochs: int = 1
    weight_decay: float = 1e-5
    compute: str = USUAL["compute"]
    projection: str = USUAL["projection"]
    batches: str = USUAL["batches"]

    @property
    def id(self) -> str:
        """The name of its record; hyperparameters are part of a trial's name alone, elsewhere they follow from the tuning."""
        parts = [self.dataset, self.task, self.slice, self.model, self.recipe]
        if self.slice == "validation":
            parts.append(f"lr={self.learning_rate:g} epochs={self.epochs} decay={self.weight_decay:g}")
        parts += [getattr(self, name) for name, usual in USUAL.items() if getattr(self, name) != usual]
        return "/".join([*parts, f"seed {self.seed}"])

    @property
    def file(self) -> str:
        """The id as a file's name."""
        return self.id.replace("/", "--").replace(" ", "_").replace("=", "")


def train_and_evaluate(
    run: Run, data: datasets.StudyData, work: Path, *, sizes: Sizes = SIZES, progress: bool = True
) -> dict[str, Any]:
    """Trains the run's model and evaluates it on the held-out requests.

    Args:
      run: what to do.
      data: its data set.
      work: a folder for what is too large for a record: the catalogue's best rows, parameters that recipes need.
      sizes: how much.
      progress: whether to show bars.

    Returns:
      The record.

    Raises:
      FileNotFoundError: the recipe needs a trained model that is not in `work`: run that model first.
    """
    began = time.perf_counter()
    dataset, parts = data.dataset, data.split
    config = models.config(run.model, dataset.schema, sim_fields=data.sim_fields, smoke=sizes.smoke)
    model = aif.build(config)
    seen = parts.train if run.slice == "validation" else np.sort(np.concatenate([parts.train, parts.validation]))
    counts = item_counts(dataset, seen)
    sampler = NegativeSampler(counts)
    if run.task == "next":
        source, loss = recipes.source(run.recipe, dataset, counts=counts, helper=load_helper(run, work)), run.recipe
    else:
        source, loss = candidates.pointwise_candidates(dataset, threshold=recipes.LIKED), "pointwise"
    feed = Pipeline(
        dataset=dataset,
        positions=eligible(dataset.log, seen, min_history=1),
        candidates=source,
        config=config,
        batch_size=sizes.batch,
        epochs=run.epochs,
        buckets=recipes.shorter(config.history_length) if run.batches == BY_LENGTH else (),
        id_dropout=recipes.HIDDEN.get(run.recipe, 0.0),
        seed=run.seed,
    )
    fitted = fit_tables(dataset, config, projection=run.projection)
    state, logged, seconds = fit(run, model, fitted, feed, loss=recipes.loss(loss), progress=progress)
    params = jax.block_until_ready(state.params)
    if run.recipe in recipes.HIDDEN:
        params = unseen_as_unknown(params, counts, config=config)
    if run.task == "next" and run.model in KEPT and run.recipe == recipes.DEFAULT:
        keep(params, config, kept(run, work))

    held = parts.validation if run.slice == "validation" else parts.test
    requests = requests_of(run, dataset, held, sampler, sizes)
    scores = sampled_scores(model, params, dataset, requests)
    figures: dict[str, Any] = sampled_figures(scores, requests, dataset)
    long = earlier(dataset, requests.positions) >= LONG
    if run.task == "next" and run.model in IN_CATALOGUE:
        figures["catalogue"] = ask_catalogue(run, model, params, data, requests.positions, counts, work)
    if run.task == "next" and run.model in FACTORED and run.dataset not in NOT_FACTORED:
        figures["factors"] = with_svd(run, model, params, data, requests, seen, work)
    if run.slice == "test":
        figures["by_history"] = by_history(scores, requests, dataset, BOUNDS)
        if long.any():
            figures["long_users"] = sampled_figures(scores[long], pick(requests, long), dataset)
        if run.model in WITHOUT_LIMIT:
            figures["by_seen"] = by_seen(model, params, dataset, requests, (16, 64) if sizes.smoke else SEEN)
        if data.world is not None and run.task == "next":
            figures["ceiling"] = ceiling(data, requests, sampler)
        if run.task == "next":
            figures |= catalogue_figures(run, model, params, data, requests, work, sizes)
    return {
        "id": run.id,
        **dataclasses.asdict(run),
        "figures": figures,
        "losses": logged,
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.trained)),
        "sizes": dataclasses.asdict(sizes),
        "config": {name: value for name, value in config.to_json().items() if name != "schema"},
        "train_seconds": seconds,
        "seconds": time.perf_counter() - began,
        "commit": common.machine()["commit"],
    }


def fit_tables(dataset: Dataset, config: aif.Config, *, seed: int = 0, projection: str = "rotated") -> Params:
    """The fitted group of a model; with projection "random" signatures have a Gaussian one."""
    fitted = aif.fit_tables(config, dataset.catalogue, seed=seed)
    if projection == "random":
        content = jnp.asarray(dataset.catalogue.content)
        for table in config.tables:
            drawn = random_projection(content.shape[1], bits=table.bits, seed=seed)
            fitted[table.name] = drawn | {"table": sign(drawn, content).at[0].set(0)}
    return fitted


def fit(
    run: Run, model: aif.PreRanker, fitted: Params, feed: Pipeline, *, loss: losses.Loss, progress: bool
) -> tuple[train.TrainState, list[list[float]], float]:
    """Trains on every batch.

    Returns:
      The state; [step, loss] at twenty places of every epoch; seconds.
    """
    optimizer = train.default_optimizer(len(feed), learning_rate=run.learning_rate, weight_decay=run.weight_decay)
    state = train.init_state(model.init(jax.random.key(run.seed), None, fitted=fitted), optimizer)
    step = train.make_step(model, optimizer, loss=loss, compute_dtype=jnp.dtype(run.compute))
    logged: list[list[float]] = []
    began = time.perf_counter()
    state = loop(
        state,
        step,
        feed.batches(),
        total=len(feed),
        label=run.id,
        log_every=max(1, feed.steps_per_epoch // 20),
        on_log=lambda at, values: logged.append([at, values["loss"]]),
        progress=progress,
    )
    jax.block_until_ready(state.params)
    return state, logged, time.perf_counter() - began


def requests_of(run: Run, dataset: Dataset, positions: np.ndarray, sampler: NegativeSampler, sizes: Sizes) -> Requests:
    """The held-out requests: the same for every model and seed."""
    if run.task == "next":
        return held_out(dataset, positions, sampler, requests=sizes.requests, seed=0)
    kept = eligible(dataset.log, positions, min_history=MIN_HISTORY)
    at = np.sort(np.random.default_rng(0).permutation(kept)[: 4 * sizes.requests])
    rows, labels, _ = candidates.pointwise_candidates(dataset, threshold=recipes.LIKED)(at, SampleKey(0, 0, 0))
    return Requests(at, rows, labels)


def by_seen(
    model: aif.PreRanker, params: Params, dataset: Dataset, requests: Requests, lengths: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """The figures of states that have seen the last n events, and "all" for the whole history, each with those of users with
    more events than the model was trained on, and of requests whose category comes back after more than 520 events.
    """
    whole, found = int(earlier(dataset, requests.positions).max()), {}
    more = earlier(dataset, requests.positions) > model.config.long_length
    returns = rested(dataset, requests.positions, events=520)
    for length in (*(n for n in lengths if n < whole), whole):
        longer = aif.build(model.config.replace(long_length=length))
        scores = sampled_scores(longer, params, dataset, requests)
        figures: dict[str, Any] = sampled_figures(scores, requests, dataset)
        if more.any():
            figures["more_than_trained"] = sampled_figures(scores[more], pick(requests, more), dataset)
        if returns.any():
            figures["rested"] = sampled_figures(scores[returns], pick(requests, returns), dataset)
        found["all" if length == whole else str(length)] = figures
    return found


def catalogue_figures(
    run: Run,
    model: aif.PreRanker,
    params: Params,
    data: datasets.StudyData,
    requests: Requests,
    work: Path,
    sizes: Sizes,
) -> dict[str, Any]:
    """HR@100 and NDCG@100 by request, also of long users, and with whole histories where a model reads more than it was trained
    on; writes the best rows to `work`.
    """
    dataset = data.dataset
    chosen = np.sort(np.random.default_rng(1).permutation(len(requests.positions))[: sizes.catalogue])
    at = requests.positions[chosen]
    batch = min(4, len(at))
    k = min(100, len(dataset.catalogue) - 1)
    ranked = partial(rank_catalogue, params=params, data=dataset, positions=at, k=k, batch_size=batch, repeats=data.repeats)
    found = ranked(model)
    folder = work / "top"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{run.file}.npy", found.top)
    long = earlier(dataset, at) >= LONG
    figures: dict[str, Any] = hits(found.ranks)
    if long.any():
        figures |= {f"{name}_long_users": value for name, value in hits(found.ranks[long]).items()}
    if run.model in WITHOUT_LIMIT:
        whole = aif.build(model.config.replace(long_length=int(earlier(dataset, at).max())))
        figures |= {f"{name}_without_limit": value for name, value in hits(ranked(whole).ranks).items()}
    if (share := recall_of_ranker(run, work)) is not None:
        figures["ranker_top10_in_top100"] = share
    return figures


def ask_catalogue(
    run: Run,
    model: aif.PreRanker,
    params: Params,
    data: datasets.StudyData,
    at: np.ndarray,
    counts: np.ndarray,
    work: Path,
    *,
    more: str = "",
) -> dict[str, Any]:
    """Hit rates of all requests in the catalogue (of some, where it is large), and among the best that the two-tower model
    retrieves (same seed, default recipe) where it has run; keeps ranks and best rows in `work`.
    """
    if len(data.dataset.catalogue) > LARGE:
        at = np.sort(np.random.default_rng(2).permutation(at)[:OF_LARGE])
    folder = work / "catalogue"
    folder.mkdir(parents=True, exist_ok=True)
    retrieval = folder / f"{of_default(run, 'two_tower').file}.npz"
    retrieved = np.load(retrieval)["top"] if retrieval.exists() else None
    given = dict(
        offset=recipes.offset(run.recipe, counts, model=run.model, dataset=run.dataset),
        retrieved=retrieved,
        repeats=data.repeats,
        batch_size=4,
    )
    asked = catalogue.ask(model, params, data.dataset, at, counts, **given)
    ranks = {name: value for name, value in asked._asdict().items() if value is not None}
    np.savez_compressed(folder / f"{run.file}{_file(more)}.npz", positions=at, **ranks)
    return catalogue.figures(asked, counts[data.dataset.log.item[at]] == 0)


def with_svd(
    run: Run, model: aif.PreRanker, params: Params, data: datasets.StudyData, requests: Requests, seen: np.ndarray, work: Path
) -> dict[str, Any]:
    """The figures of the trained model with a `PureSvd` whose factors are fitted on the events that training saw."""
    dataset = data.dataset
    params, config = fit_pure_svd(params, dataset.log.user[seen], dataset.log.item[seen], config=model.config)
    if run.slice == "test" and run.recipe == recipes.DEFAULT:
        keep(params, config, kept(run, work, more=models.FACTORS))
    model, counts = aif.build(config), item_counts(dataset, seen)
    figures: dict[str, Any] = sampled_figures(sampled_scores(model, params, dataset, requests), requests, dataset)
    return figures | {
        "catalogue": ask_catalogue(run, model, params, data, requests.positions, counts, work, more=models.FACTORS)
    }


def recall_of_ranker(run: Run, work: Path) -> float | None:
    """Share of the `exact` model's ten best rows among the run's hundred best, same seed; None until both are known."""
    ranker = of_default(run, "exact")
    theirs, ours = (work / "top" / f"{one.file}.npy" for one in (ranker, run))
    if run.id == ranker.id or not theirs.exists() or not ours.exists():
        return None
    return ranker_recall(np.load(theirs)[:, :10], np.load(ours))


def ceiling(data: datasets.StudyData, requests: Requests, sampler: NegativeSampler) -> dict[str, float]:
    """What the truth of a synthetic world scores on the same requests."""
    world = data.world
    assert world is not None  # the caller looks
    q = sampler.probabilities
    arguments = (requests.positions, requests.rows, requests.labels)
    return {"auc": world.ceiling_auc(*arguments, sampling=q), "gauc": world.ceiling_gauc(*arguments, sampling=q).value}


def of_default(run: Run, model: str) -> Run:
    """The run of another model, same seed and slice, that this one is compared with or helped by."""
    return dataclasses.replace(run, model=model, recipe=recipes.DEFAULT, batches=USUAL["batches"])


def kept(run: Run, work: Path, *, more: str = "") -> Path:
    """The folder of a trained model; `more` is what follows the model's name, such as `models.FACTORS`."""
    return work / "models" / (run.file + _file(more))


def _file(more: str) -> str:
    return more.replace(",", "").replace(" ", "_")


def keep(params: Params, config: aif.Config, folder: Path) -> None:
    """Keeps a trained model for the recipes that need it and for `--critical`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, aif.Trained(aif.build(config), params))


def load_helper(run: Run, work: Path) -> recipes.Helper | None:
    """The trained model of the same seed that a recipe needs."""
    if run.recipe not in recipes.HELPERS:
        return None
    needed = of_default(run, recipes.HELPERS[run.recipe])
    folder = kept(needed, work)
    if not folder.exists():
        raise FileNotFoundError(f"{run.id}: expected the trained model of {needed.id!r} in {folder}; run that first")
    restored = checkpoint.load(folder)
    return recipes.Helper(aif.build(restored.config), restored.params)
