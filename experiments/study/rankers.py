"""The rankers of `experiments.ranker_recall`, of several families: what each of them wants is what a cut may lose.

attention  full attention with a larger head, the mean of two seeds that no pre-ranker has: the family of `presets.aif`
trees      LambdaMART on raw features, see `experiments.study.trees`
sequence   SASRec, see `experiments.study.sequence`

A ranker gives scores of requests and of teaching candidates that the popularity correction of serving is added to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax.blocks import popularity_offset
from aif_jax.train.distillation import Scores, model_scores
from experiments.study import question, sequence, trees
from experiments.study.datasets import StudyData
from experiments.study.question import Part, fitted

HEAD, SEEDS = aif.heads.Mlp((128, 64)), (11, 12)
POWER = 0.75  # of popularity, in the draws of negatives and so in the correction


class Ranker(NamedTuple):
    """A trained ranker."""

    scores: Scores
    version: str


class Training(NamedTuple):
    """What rankers are trained on."""

    data: StudyData
    part: Part
    positions: np.ndarray  # int64 [n] training events with a history
    teaching: np.ndarray  # int32 [events of the log, 64], see `retrieval.of_training`
    counts: np.ndarray  # int64 [N] training events of each item


def correction(counts: np.ndarray) -> np.ndarray:
    """Return what serving adds to the scores of items: float32 [N]."""
    return popularity_offset(counts, power=POWER, untrained=None)


def attention(on: Training, *, folder: Path) -> Ranker:
    """Return the mean of full attention's scores."""
    config = question.config_of(question.Trial(dataset=on.data.name, model=question.FULL), on.data).replace(head=HEAD)
    models = [
        fitted(config, on.data, on.part, recipe={"seed": seed}, folder=folder / str(seed))
        for seed in (SEEDS[:1] if on.data.name == "smoke" else SEEDS)
    ]
    each = [model_scores(one.model, one.params, on.data.dataset) for one in models]

    def scores(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.mean([one(positions, rows) for one in each], axis=0, dtype=np.float32)

    return Ranker(scores, " ".join(one.version for one in models))


def of_trees(on: Training, *, folder: Path) -> Ranker:
    """Return trees; see `trees.fit`."""
    groups = trees.groups(on.data, on.positions, on.teaching, on.counts)
    fit = trees.fit(on.data, on.part, groups, offset=correction(on.counts), folder=folder / "trees")
    return Ranker(*fit)


def of_sequences(on: Training, *, folder: Path) -> Ranker:
    """Return self-attention over the last events; see `sequence.fit`."""
    steps = 2 if on.data.name == "smoke" else sequence.STEPS
    given: dict[str, Any] = dict(counts=on.counts, offset=correction(on.counts), steps=steps)
    return Ranker(*sequence.fit(on.data, on.part, folder=folder / "model", **given))


RANKERS: dict[str, Callable[..., Ranker]] = {"attention": attention, "trees": of_trees, "sequence": of_sequences}
"""Functions of a `Training` and the folder of what is trained."""
