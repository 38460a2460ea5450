"""Distillation: a teacher scores the candidates of every batch, and one more term of the loss reads its scores.

Source: Hinton et al. 2015 (arXiv 1503.02531); a ranker as the teacher of a pre-ranker over its candidates, RankFlow (Qin et al.
2022). The losses are `losses.distill_listwise`, `losses.distill_pointwise` and `pairwise_ndcg`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from aif_jax.checks import expect, expect_array, expect_finite
from aif_jax.data.candidates import CandidateLists, CandidateSource, SampleKey, SourceFn, describe, name_of
from aif_jax.data.dataset import Dataset
from aif_jax.data.pipeline import make_batch
from aif_jax.model import PreRanker
from aif_jax.scores import objective_names
from aif_jax.store.trained import Trained
from aif_jax.store.version import check_encoding
from aif_jax.train.evaluate import predict
from aif_jax.train.losses import Loss
from aif_jax.train.tasks import Goal, Goals
from aif_jax.types import Params

LABEL, TEACHER = "label", "teacher"
"""Names of the labels of a batch that a teacher has scored."""
SHORTEST, PARTS = 64, 4  # the shortest history that scoring compiles for; parts of a batch with histories of like length

Teacher: TypeAlias = Trained | Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A trained model, or `teacher(positions [B] of the log, catalogue rows int32 [B, C]) -> logits float32 [B, C]`."""


def name_of_teacher(teacher: Teacher) -> str:
    """What a record says of a teacher: the version of a model, the name of a function."""
    return teacher.version if isinstance(teacher, Trained) else name_of(teacher)


def distilled(source: SourceFn, teacher: Teacher, data: Dataset) -> CandidateSource:
    """The same candidates with the teacher's logits as one more label; a label without a name is called `LABEL`.

    Raises:
      ValueError: a teacher of several objectives; scores of another shape or that are not finite, when it is called.
      EncodingMismatch: a teacher of data of another encoder.
    """
    if isinstance(teacher, Trained):
        check_encoding("teacher", expected=data.encoding, got=teacher.config.schema.encoding)
        several = objective_names(teacher.config.objectives)
        expect(len(several) < 2, "teacher", "a model of one objective, or a function", f"one of {list(several)}")
        scores = partial(teacher_scores, teacher.model, teacher.params, data)
    else:
        scores = teacher

    def lists(positions: np.ndarray, draw: SampleKey) -> CandidateLists:
        rows, labels, log_q = source(positions, draw)
        logits = expect_array(scores(positions, rows), "teacher scores", dtype=np.float32, shape=rows.shape)
        expect_finite(np.where(rows > 0, logits, 0), "teacher scores")
        named = labels if isinstance(labels, dict) else {LABEL: labels}
        return CandidateLists(rows, {**named, TEACHER: logits}, log_q)

    return CandidateSource(lists, {"kind": "distilled", "teacher": name_of_teacher(teacher), "of": describe(source)})


def with_teacher(loss: Any, term: Loss, objectives: tuple[str, ...] = ()) -> Goals:
    """The loss of the labels and, added to it, a loss of the teacher's logits.

    Raises:
      ValueError: a model of several objectives, or a loss that does not add up over terms.
    """
    names = objective_names(objectives)
    expect(len(names) < 2, "fit teacher", "a model of one objective; give Goals with the label of each", list(names))
    expect(isinstance(loss, Loss | Goals), "fit loss", "a losses.Loss or Goals next to a teacher", f"{loss!r}")
    goals = loss.goals if isinstance(loss, Goals) else (Goal(loss, LABEL),)
    return Goals(*goals, Goal(term, TEACHER))


def teacher_scores(model: PreRanker, params: Params, data: Dataset, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A model's logits float32 [B, C] of candidates; histories of like length are read together, without the padding."""
    longest = model.config.history_length
    choices = [longest >> n for n in range(longest.bit_length()) if longest >> n >= SHORTEST][::-1] or [longest]
    lengths = data.history_lengths(positions)
    scores = np.empty(rows.shape, np.float32)
    for part in np.array_split(np.argsort(lengths, kind="stable"), PARTS):
        if len(part):
            length = choices[min(np.searchsorted(choices, lengths[part[-1]]), len(choices) - 1)]
            labels = np.zeros((len(part), rows.shape[1]), np.float32)
            batch = make_batch(data, positions[part], rows[part], labels, config=model.config, length=length)
            (scores[part],) = predict(model, params, [batch])
    return scores
