"""A cell: one data set, task, arm, recipe and seed. It is trained and asked once, and leaves one record."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import checkpoint, loop, lsh, train
from aif_jax.data.batches import Batch
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, item_counts, liked_or_not
from aif_jax.data.split import eligible
from aif_jax.types import Params
from experiments import common
from experiments.evaluation import (
    MIN_HISTORY,
    Requests,
    by_history,
    earlier,
    held_out,
    hits,
    pick,
    rank_catalogue,
    sampled_figures,
    sampled_scores,
    survival,
)
from experiments.study import arms, benches, recipes

BOUNDS = (MIN_HISTORY, 20, 50, 100, 200, 500)  # of histories, for the figure
Batches = Callable[[int], Iterator[Batch]]
LONG = 200  # earlier events of a long user
KEPT = ("exact", "two_tower")  # arms whose parameters are kept for recipes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is trained and asked."""

    batch: int = 256
    requests: int = 3000  # with sampled candidates
    catalogue: int = 500  # of them that score the whole catalogue
    smoke: bool = False


SIZES = Sizes()
SMOKE = Sizes(batch=64, requests=64, catalogue=16, smoke=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What names a cell.

    Attributes:
      bench: data set, see `benches`.
      arm: model, see `arms`.
      seed: of parameters, order and negatives.
      task: "next" (which item comes next?) or "liked" (does the user like the item?).
      recipe: see `recipes`; of the next-item task.
      slice: "test", or "validation" for a trial of hyperparameters: then trained on `train` alone, else on all before the test.
      learning_rate, epochs, weight_decay: of the optimizer.
      compute: dtype of activations in training; parameters, scores and evaluation are float32.
      projection: behind the signatures, "rotated" (fitted on the catalogue, see `lsh.fit`) or "random".
    """

    bench: str
    arm: str
    seed: int
    task: str = "next"
    recipe: str = recipes.DEFAULT
    slice: str = "test"
    learning_rate: float = 3e-3
    epochs: int = 1
    weight_decay: float = 1e-5
    compute: str = "float32"
    projection: str = "rotated"

    @property
    def id(self) -> str:
        """The name of its record; hyperparameters are part of a trial's name alone, elsewhere they follow from the tuning."""
        parts = [self.bench, self.task, self.slice, self.arm, self.recipe]
        if self.slice == "validation":
            parts.append(f"lr={self.learning_rate:g} epochs={self.epochs} decay={self.weight_decay:g}")
        parts += [value for value, usual in ((self.compute, "float32"), (self.projection, "rotated")) if value != usual]
        return "/".join([*parts, f"seed {self.seed}"])

    @property
    def file(self) -> str:
        """The id as a file's name."""
        return self.id.replace("/", "--").replace(" ", "_").replace("=", "")


def run(cell: Cell, bench: benches.Bench, work: Path, *, sizes: Sizes = SIZES, progress: bool = True) -> dict[str, Any]:
    """Trains the cell's model and asks it the held-out requests.

    Args:
      cell: what to do.
      bench: its data set.
      work: a folder for what is too large for a record: the catalogue's best rows, parameters that recipes need.
      sizes: how much.
      progress: whether to show bars.

    Returns:
      The record.

    Raises:
      FileNotFoundError: the recipe needs a trained model that is not in `work`: run that arm first.
    """
    began = time.perf_counter()
    config = arms.config(cell.arm, bench.dataset.schema, sim_fields=bench.sim_fields, smoke=sizes.smoke)
    model = aif.build(config)
    dataset, frozen = signed(bench.dataset, config, projection=cell.projection)
    log = dataset.log
    parts = bench.split
    seen = parts.train if cell.slice == "validation" else np.sort(np.concatenate([parts.train, parts.validation]))
    sampler = NegativeSampler(item_counts(dataset, seen))
    positions = eligible(log, seen, min_history=1)
    helper = load_helper(cell, dataset, work)
    made = batches_of(cell, model, dataset, positions, sampler, helper, sizes)
    loss = recipes.loss(cell.recipe if cell.task == "next" else "pointwise")
    steps = len(positions) // sizes.batch
    state, logged, seconds = fit(cell, model, frozen, made, steps=steps, loss=loss, progress=progress)
    params = jax.block_until_ready(state.params)

    asked = parts.validation if cell.slice == "validation" else parts.test
    requests = ask(cell, dataset, asked, sampler, sizes)
    scores = sampled_scores(model, params, dataset, requests)
    figures: dict[str, Any] = sampled_figures(scores, requests, dataset)
    long = earlier(dataset, requests.positions) >= LONG
    if cell.slice == "test":
        figures["by_history"] = by_history(scores, requests, dataset, BOUNDS)
        if long.any():
            figures["long_users"] = sampled_figures(scores[long], pick(requests, long), dataset)
        if bench.world is not None and cell.task == "next":
            figures["ceiling"] = ceiling(bench, requests, sampler)
        if cell.task == "next":
            figures |= catalogue_figures(cell, model, params, dataset, requests, bench, work, sizes)
            if cell.arm in KEPT and cell.recipe == recipes.DEFAULT:
                keep(params, config, work / "models" / cell.file)
    return {
        "id": cell.id,
        **dataclasses.asdict(cell),
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


def signed(
    dataset: Dataset, config: aif.Config, *, seed: int = 0, projection: str = "rotated"
) -> tuple[Dataset, Params | None]:
    """The data set with the signatures that a config needs, and the fixed parameters behind them."""
    content = dataset.catalogue.content
    if content is None:
        return dataset, None
    frozen = lsh.fit(content, config, seed=seed)
    if projection == "random" and config.uses_signatures:
        frozen |= lsh.random_projection(jax.random.key(seed), content=content.shape[1], bits=config.signature_bits)
    if config.uses_signatures:
        dataset = dataset.with_signatures(np.asarray(lsh.sign(frozen, jnp.asarray(content))))
    return dataset, frozen


def fit(
    cell: Cell, model: aif.PreRanker, frozen: Params | None, batches: Batches, *, steps: int, loss: train.LossFn, progress: bool
) -> tuple[train.TrainState, list[list[float]], float]:
    """Trains over `batches(epoch)` of `steps` each.

    Returns:
      The state; [step, loss] at twenty places of every epoch; seconds.
    """
    if not steps:
        raise ValueError(f"{cell.id}: expected training samples for at least one batch, got fewer")
    optimizer = train.default_optimizer(steps * cell.epochs, learning_rate=cell.learning_rate, weight_decay=cell.weight_decay)
    state = train.init_state(model.init(jax.random.key(cell.seed), frozen=frozen), optimizer)
    step = train.make_step(model, optimizer, loss=loss, compute_dtype=jnp.dtype(cell.compute))
    logged: list[list[float]] = []
    began = time.perf_counter()
    for epoch in range(cell.epochs):
        state = loop.fit(
            state,
            step,
            batches(epoch),
            total=steps,
            label=f"{cell.id} {epoch + 1}/{cell.epochs}",
            log_every=max(1, steps // 20),
            on_log=lambda at, values: logged.append([at, values["loss"]]),
            progress=progress,
        )
    jax.block_until_ready(state.params)
    return state, logged, time.perf_counter() - began


def batches_of(
    cell: Cell,
    model: aif.PreRanker,
    dataset: Dataset,
    positions: np.ndarray,
    sampler: NegativeSampler,
    helper: recipes.Helper | None,
    sizes: Sizes,
) -> Batches:
    """Epoch to its batches, for the task and the recipe of a cell."""
    options: dict[str, Any] = dict(config=model.config, batch_size=sizes.batch, seed=cell.seed)
    if cell.task == "next":
        return lambda epoch: recipes.batches(
            cell.recipe, dataset, positions, sampler=sampler, epoch=epoch, helper=helper, **options
        )
    _, labels = liked_or_not(dataset, positions, threshold=recipes.LIKED)
    return lambda epoch: recipes.labelled_batches(dataset, positions, labels[:, 0], epoch=epoch, **options)


def ask(cell: Cell, dataset: Dataset, positions: np.ndarray, sampler: NegativeSampler, sizes: Sizes) -> Requests:
    """The held-out requests: the same for every arm and seed."""
    if cell.task == "next":
        return held_out(dataset, positions, sampler, requests=sizes.requests, seed=0)
    kept = eligible(dataset.log, positions, min_history=MIN_HISTORY)
    at = np.sort(np.random.default_rng(0).permutation(kept)[: 4 * sizes.requests])
    return Requests(at, *liked_or_not(dataset, at, threshold=recipes.LIKED))


def catalogue_figures(
    cell: Cell,
    model: aif.PreRanker,
    params: Params,
    dataset: Dataset,
    requests: Requests,
    bench: benches.Bench,
    work: Path,
    sizes: Sizes,
) -> dict[str, Any]:
    """HR@100 and NDCG@100 by request, also of long users; writes the best rows to `work`."""
    chosen = np.sort(np.random.default_rng(1).permutation(len(requests.positions))[: sizes.catalogue])
    at = requests.positions[chosen]
    batch = min(4, len(at))
    k = min(100, len(dataset.catalogue) - 1)
    found = rank_catalogue(model, params, dataset, at, k=k, batch=batch, repeats=bench.repeats)
    folder = work / "top"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{cell.file}.npy", found.top)
    long = earlier(dataset, at) >= LONG
    figures: dict[str, Any] = hits(found.ranks)
    if long.any():
        figures |= {f"{name}_long_users": value for name, value in hits(found.ranks[long]).items()}
    if (share := survived(cell, work)) is not None:
        figures["ranker_top10_in_top100"] = share
    return figures


def survived(cell: Cell, work: Path) -> float | None:
    """Share of the `exact` model's ten best rows among the cell's hundred best, same seed; None until both are known."""
    ranker = dataclasses.replace(cell, arm="exact", recipe=recipes.DEFAULT)
    theirs, ours = (work / "top" / f"{one.file}.npy" for one in (ranker, cell))
    if cell.id == ranker.id or not theirs.exists() or not ours.exists():
        return None
    return survival(np.load(theirs)[:, :10], np.load(ours))


def ceiling(bench: benches.Bench, requests: Requests, sampler: NegativeSampler) -> dict[str, float]:
    """What the truth of a synthetic world scores on the same requests."""
    world = bench.world
    assert world is not None  # the caller looks
    q = sampler.probabilities
    arguments = (requests.positions, requests.rows, requests.labels)
    return {"auc": world.ceiling_auc(*arguments, sampling=q), "gauc": world.ceiling_gauc(*arguments, sampling=q).value}


def keep(params: Params, config: aif.Config, folder: Path) -> None:
    """Keeps a trained model for the recipes that ask it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, params, config)


def load_helper(cell: Cell, dataset: Dataset, work: Path) -> recipes.Helper | None:
    """The trained model of the same seed that a recipe needs."""
    if cell.task != "next" or cell.recipe not in recipes.HELPERS:
        return None
    own = dataclasses.replace(cell, arm=recipes.HELPERS[cell.recipe], recipe=recipes.DEFAULT)
    folder = work / "models" / own.file
    if not folder.exists():
        raise FileNotFoundError(f"{cell.id}: expected the trained model of {own.id!r} in {folder}; run that cell first")
    restored = checkpoint.load(folder)
    return recipes.Helper(aif.build(restored.config), restored.params, dataset)
