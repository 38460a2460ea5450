"""The protocol of the pre-ranking literature on MovieLens-1M, by name, and the same without its leak.

Ratings above 3 are positives, a rating of 3 is dropped, the rest are negatives; 80 % of the ratings, drawn at random, are
trained on, 20 % tested; user and item means of the ratings are features. In the literature (IntTower, arXiv 2210.09890)
the means are computed over the test ratings too: the label leaks into the features. And a random split trains on ratings that
are later than the tested ones. Here "leak" repeats both, "no leak" takes the means from the training ratings alone;
histories never show the rating of a test event. Honest figures are those of the split by time, see experiments/notes/study.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import metrics
from aif_jax.data.candidates import CandidateLists
from aif_jax.data.dataset import Dataset
from aif_jax.data.pipeline import Pipeline
from aif_jax.train.evaluate import list_scores
from experiments import common
from experiments.datasets import movielens
from experiments.study import models, recipes, runs
from experiments.study.datasets import reduced

NEUTRAL = 6  # action row of three stars
LITERATURE = {"two_tower": 0.8697, "cold": 0.8836, "IntTower": 0.8974}
TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Protocol:
    """A data set, which events are trained on and tested, and their labels."""

    dataset: Dataset
    train: np.ndarray  # int64 positions
    test: np.ndarray  # int64 positions
    labels: np.ndarray  # float32 [events] 1 where the rating is above 3


def prepare(dataset: Dataset, *, leak: bool, seed: int = 0) -> Protocol:
    """Splits at random and adds the means of the ratings as features.

    Args:
      dataset: MovieLens of any release, without float features; actions are twice the ratings.
      leak: means over the test ratings too, as in the literature.
      seed: of the split.
    """
    log = dataset.log
    kept = np.random.default_rng(seed).permutation(np.flatnonzero(log.action != NEUTRAL))
    cut = round(len(kept) * TEST_SHARE)
    test, trained = np.sort(kept[:cut]), np.sort(kept[cut:])
    counted = np.sort(kept) if leak else trained
    ratings = log.action / 2
    user_mean = _means(log.user[counted], ratings[counted], len(dataset.users))
    item_mean = _means(log.item[counted], ratings[counted], len(dataset.items))
    schema = dataclasses.replace(dataset.schema, user_floats=1, item_floats=1, encoding="")
    shown = log.action.copy()
    shown[test] = 0
    return Protocol(
        dataset=dataclasses.replace(
            dataset,
            schema=schema,
            log=dataclasses.replace(log, action=shown),
            catalogue=dataclasses.replace(dataset.catalogue, schema=schema, floats=item_mean),
            user_floats=user_mean,
            encoder=None,  # means of ratings are no columns of the files
        ),
        train=trained,
        test=test,
        labels=(log.action > NEUTRAL).astype(np.float32),
    )


def _means(rows: np.ndarray, ratings: np.ndarray, size: int) -> np.ndarray:
    """Mean of each row less the mean of all, float32 [size, 1]; 0 for a row without ratings."""
    count = np.bincount(rows, minlength=size)
    total = np.bincount(rows, weights=ratings, minlength=size)
    made = np.where(count > 0, total / np.maximum(count, 1) - ratings.mean(), 0)
    made[0] = 0
    return made[:, None].astype(np.float32)


def run(
    name: str, protocol: Protocol, *, seed: int, sizes: runs.Sizes, epochs: int = 1, progress: bool = True
) -> dict[str, float]:
    """Trains a model and tests it: `auc`, `gauc` and `log_loss` of the test ratings."""
    dataset = protocol.dataset
    config = models.config(name, dataset.schema, sim_fields=("category",), smoke=sizes.smoke)
    model = aif.build(config)
    feed = Pipeline(
        dataset=dataset,
        positions=protocol.train,
        candidates=recipes.labelled(dataset, protocol.labels),
        config=config,
        batch_size=sizes.batch,
        epochs=epochs,
        seed=seed,
    )
    named = runs.Run(dataset="inttower", model=name, seed=seed, recipe="pointwise", epochs=epochs)
    fitted = runs.fit_tables(dataset, config)
    state, _, _ = runs.fit(named, model, fitted, feed, loss=recipes.loss("pointwise"), progress=progress)
    labels = protocol.labels[protocol.test]
    lists = CandidateLists(dataset.log.item[protocol.test][:, None], labels[:, None])
    scores = list_scores(model, state.params, dataset, protocol.test, lists, batch_size=512)[:, 0]
    return {
        "auc": metrics.auc(scores, labels),
        "gauc": metrics.gauc(scores, labels, dataset.log.user[protocol.test]).value,
        "log_loss": metrics.log_loss(scores, labels),
    }


def main(options: Any) -> None:
    """The command `--protocol inttower --data DIR`, where DIR holds MovieLens files of any release."""
    if options.data is None:
        raise SystemExit("--protocol inttower: expected --data DIR, a folder with MovieLens files (the literature uses 1M)")
    dataset = read(options.data)
    sizes = runs.SMOKE if options.smoke else runs.SIZES
    names = options.model or ["two_tower", "cold", "aif", "exact"]
    seeds = options.seeds[:1] if options.smoke else options.seeds
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("leak", "no leak"):
        protocol = prepare(dataset, leak=kind == "leak")
        for model in tqdm(names, desc=f"inttower protocol, {kind}", unit="model"):
            found = [run(model, protocol, seed=seed, sizes=sizes) for seed in seeds]
            values = {name: [one[name] for one in found] for name in found[0]}
            means = {name: float(np.mean(entries)) for name, entries in values.items()}
            spread = {f"{name}_std": float(np.std(entries, ddof=1)) for name, entries in values.items() if len(entries) > 1}
            figures.setdefault(kind, {})[model] = means | spread
            jax.clear_caches()
    for kind, rows in figures.items():
        table = [[model, row["auc"], row["gauc"], LITERATURE.get(model, "")] for model, row in rows.items()]
        print(f"\n{kind}: means of ratings {'over all ratings' if kind == 'leak' else 'of the training ratings'}")
        print(common.table(table, ["model", "AUC", "GAUC", "AUC in the literature (1M, with the leak)"]))
    common.write_json(options.json, {"protocol": "inttower", "dataset": dataset.name, **figures})


def read(folder: Path) -> Dataset:
    """MovieLens files with content: their own, where there is a content.npz, else from titles, genres and tags."""
    given = folder / "content.npz"
    dataset = movielens.read(folder, content=given if given.exists() else "text")
    content = dataset.catalogue.content
    assert content is not None  # read with it
    return dataset.with_content(reduced(content))
