"""What `fit` trains a model for: which events are samples, with which candidates and labels, under which loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from aif_jax.checks import expect, expect_types
from aif_jax.data.candidates import CandidateSource, impressions, pointwise_candidates, sampled_negatives
from aif_jax.data.cascade import STAGES
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, counts_before
from aif_jax.data.split import eligible_positions, request_starts
from aif_jax.data.stages import logged, staged
from aif_jax.train.losses import Loss, listwise_softmax, pointwise_bce


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextItem:
    """Which item does the user turn to next, among sampled ones? Every event of a known item is a sample.

    The loss is listwise and pointwise: a softmax over a list does not fix the level of its scores, which GAUC, pooled over a
    user's lists, depends on.

    Attributes:
      negatives: sampled candidates of each event in training.
      evaluated: the same in evaluation.
      power: candidates are drawn with probability proportional to popularity ** power.
      uniform: share of the training candidates that are drawn uniformly from the whole catalogue, items that training never
        meets among them; candidates in evaluation are drawn by popularity alone.
      logq_correction: correct the loss for how often the sampler draws a candidate (logQ), to rank the whole catalogue.

    Raises:
      ValueError: fewer than one negative, a share that is none.
    """

    negatives: int = 15
    evaluated: int = 99
    power: float = 0.75
    uniform: float = 0.0
    logq_correction: bool = False

    loss = listwise_softmax + pointwise_bce
    ranks_catalogue = True
    samples = "events"
    no_sample = "of items that the catalogue lacks"

    def __post_init__(self):
        expect_types(self)
        for field in ("negatives", "evaluated"):
            expect(getattr(self, field) >= 1, f"NextItem.{field}", "at least 1", getattr(self, field))
        expect(0 <= self.uniform <= 1, "NextItem.uniform", "a share from 0 to 1", self.uniform)

    @property
    def calibration_negatives(self) -> int:
        """Candidates after the first that log-loss and calibration are of: as many as in training."""
        return self.negatives

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """Events of known items in a span of time."""
        return eligible_positions(data.log, min_history=min_history, since=since, before=before)

    def source(self, data: Dataset, *, before: int, held_out: bool = False, repeats: bool | None = None) -> CandidateSource:
        """The event's item and negatives by popularity before a time; `repeats` as for `candidates.sampled_negatives`."""
        counts = counts_before(data, before)
        if held_out:
            sampler = NegativeSampler(counts, power=self.power)
            return sampled_negatives(data, sampler=sampler, negatives=self.evaluated, repeats=repeats)
        sampler = NegativeSampler(counts, power=self.power, uniform=self.uniform, rows=data.catalogue.rows)
        options: dict[str, Any] = {"negatives": self.negatives, "logq_correction": self.logq_correction, "repeats": repeats}
        return sampled_negatives(data, sampler=sampler, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Liked:
    """Does the user like the item? Every event of a known item and action is a sample, its item the only candidate.

    Attributes:
      threshold: the least action row that counts as liked; action rows must be in ascending order of liking.
    """

    threshold: int

    loss = pointwise_bce
    ranks_catalogue = False
    calibration_negatives = 0
    samples = "events"
    no_sample = "of unknown items or actions"

    def __post_init__(self):
        expect_types(self)

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """Events of known items and actions in a span of time."""
        positions = eligible_positions(data.log, min_history=min_history, since=since, before=before)
        return positions[data.log.action[positions] > 0]

    def source(self, data: Dataset, *, before: int, held_out: bool = False, repeats: bool | None = None) -> CandidateSource:
        """The event's item, whether or not users come back to items."""
        return pointwise_candidates(data, threshold=self.threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impressions:
    """Which of the items that were shown does the user click? The log holds impressions; a request is a sample.

    Attributes:
      candidates: C, items of a list that count, the first ones.
      threshold: the least action row that counts as a click; action rows must be in ascending order (seen, clicked). Of
        several objectives one by name, {"click": 2, "like": 3}: the default loss is then binary cross-entropy of each.
    """

    candidates: int
    threshold: int | Mapping[str, int]

    ranks_catalogue = False
    samples = "requests"
    no_sample = ""

    def __post_init__(self):
        expect_types(self)

    @property
    def loss(self) -> Loss | None:
        """Listwise and pointwise for one label, None for several."""
        return None if isinstance(self.threshold, Mapping) else listwise_softmax + pointwise_bce

    @property
    def calibration_negatives(self) -> int:
        """The whole list."""
        return self.candidates

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """The first event of every request in a span of time."""
        return _requests(data, min_history=min_history, since=since, before=before)

    def source(self, data: Dataset, *, before: int, held_out: bool = False, repeats: bool | None = None) -> CandidateSource:
        """The list that was shown, whether or not users come back to items: what was shown was a candidate."""
        return impressions(data, candidates=self.candidates, threshold=self.threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cascaded:
    """What does each objective say of the candidates that retrieval finds? A logged request of `Dataset.cascade` is a sample.

    The default loss is binary cross-entropy of every objective where the log knows its label; `Goals` says more: other stages,
    the ranker's scores. Held-out requests are evaluated on all their candidates with known labels.

    Attributes:
      exposed, ranked, pre_ranked, retrieved: candidates of each stage in a list of training, drawn anew for every batch.
      in_batch, sampled: others' exposed items, and items drawn by popularity.
      power: of the popularity of sampled ones.

    Raises:
      ValueError: no candidates.
    """

    exposed: int = 8
    ranked: int = 8
    pre_ranked: int = 8
    retrieved: int = 8
    in_batch: int = 0
    sampled: int = 0
    power: float = 0.75

    loss = None
    ranks_catalogue = False
    samples = "requests"
    no_sample = ""
    calibration_negatives = 1 << 20  # all

    def __post_init__(self):
        expect_types(self)
        counts = self.counts
        expect(min(counts.values()) >= 0 and sum(counts.values()) > 0, "Cascaded", "candidates of some stage", counts)

    @property
    def counts(self) -> dict[str, int]:
        """Candidates by stage."""
        return {stage: getattr(self, stage) for stage in STAGES}

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """The requests of the cascade in a span of time."""
        expect(data.cascade is not None, "Cascaded", "data with a cascade", f"{data!r}")
        starts = _requests(data, min_history=min_history, since=since, before=before)
        return np.intersect1d(starts, data.cascade.positions)  # type: ignore[union-attr]

    def source(self, data: Dataset, *, before: int, held_out: bool = False, repeats: bool | None = None) -> CandidateSource:
        """Candidates by stage; held out, all of a request; `repeats` as for `stages.staged`."""
        if held_out:
            return logged(data, repeats=repeats)
        sampler = NegativeSampler(counts_before(data, before), power=self.power) if self.sampled else None
        return staged(data, self.counts, sampler=sampler, repeats=repeats)


def _requests(data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
    """The first event of every request in a span of time whose history, in the log or as served, is long enough."""
    if data.served is None:
        return request_starts(data.log, min_history=min_history, since=since, before=before)
    starts = request_starts(data.log, since=since, before=before)
    return starts[data.served.history_lengths(starts) >= min_history]


Task: TypeAlias = NextItem | Liked | Impressions | Cascaded
TASKS: dict[str, type[Task]] = {task.__name__: task for task in (NextItem, Liked, Impressions, Cascaded)}
"""Tasks by name, for the record of a run."""
