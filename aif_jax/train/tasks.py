"""Training tasks: which events are samples, with which candidates and labels, under which loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np

from aif_jax.checks import Fields, expect, expect_types
from aif_jax.data.candidates import CandidateSource, impressions, logged, sampled_negatives
from aif_jax.data.cascade import STAGES
from aif_jax.data.dataset import Dataset
from aif_jax.data.negatives import NegativeSampler, counts_before
from aif_jax.data.split import sample_positions
from aif_jax.train.losses import Loss, listwise_softmax, pointwise_bce


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextItem(Fields):
    """Next-item prediction with negatives by popularity ** 0.75: each event of a known item is a sample.

    With `Columns.history_actions` each event of these actions is.

    The loss is listwise and pointwise: a softmax over a list does not fix the level of its scores, which a user's GAUC needs.

    Attributes:
      negatives: sampled candidates of each event in training.
      evaluated: the same in evaluation.
      logq_correction: correct the loss for how often the sampler draws a candidate (logQ), to rank the whole catalogue.
    """

    negatives: int = 15
    evaluated: int = 99
    logq_correction: bool = False

    loss = listwise_softmax + pointwise_bce
    ranks_catalogue = True
    thresholds: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self):
        expect_types(self)
        for field in ("negatives", "evaluated"):
            expect(getattr(self, field) >= 1, f"NextItem.{field}", "at least 1", getattr(self, field))

    @property
    def calibration_negatives(self) -> int:
        """Candidates after the first that log-loss and calibration are of: as many as in training."""
        return self.negatives

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """Return events of known items in a span of time, those that histories hold."""
        positions = _with_history(data, min_history=min_history, since=since, before=before)
        if data.history_log is data.log:
            return positions
        return positions[np.isin(data.log.action[positions], data.encoder.engaged)]  # type: ignore[union-attr]

    def source(self, data: Dataset, *, before: int, held_out: bool = False) -> CandidateSource:
        """Return event's item and negatives by popularity before a time, see `candidates.sampled_negatives`."""
        negatives = self.evaluated if held_out else self.negatives
        sampler, corrected = NegativeSampler(counts_before(data, before)), self.logq_correction and not held_out
        return sampled_negatives(data, sampler=sampler, negatives=negatives, logq_correction=corrected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impressions(Fields):
    """Clicks among the items that were shown: the log holds impressions, each request is a sample.

    A user's requests before the first one with an event below the threshold are no samples, as all would be positive: a log
    may begin with histories that hold clicks alone.

    Attributes:
      candidates: C, items of a list that count: of longer lists the positives and a random draw of the rest.
      threshold: the least action row that counts as a click; action rows must be in ascending order (seen, clicked). Of
        several objectives one by name, {"click": 2, "like": 3}: the default loss is then binary cross-entropy of each.
    """

    candidates: int
    threshold: int | Mapping[str, int]

    ranks_catalogue = False
    calibration_negatives = None  # all

    def __post_init__(self):
        expect_types(self)

    @property
    def thresholds(self) -> dict[str, int]:
        """The thresholds by name of the objective, "click" for the only one."""
        return dict(self.threshold) if isinstance(self.threshold, Mapping) else {"click": self.threshold}

    @property
    def loss(self) -> Loss | None:
        """Listwise and pointwise for one label, None for several."""
        return None if isinstance(self.threshold, Mapping) else listwise_softmax + pointwise_bce

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """Return the first event of every request in a span of time, from the first impression of its user on."""
        starts, log = _with_history(data, min_history=min_history, since=since, before=before, requests=True), data.log
        shown = np.flatnonzero((log.action > 0) & (log.action < min(self.thresholds.values())))
        users, place = np.unique(log.user[shown], return_index=True)
        first = np.full(log.users, len(log))
        first[users] = shown[place]
        return starts[log.request_end(starts) > first[log.user[starts]]]

    def source(self, data: Dataset, *, before: int, held_out: bool = False) -> CandidateSource:
        """Return the list that was shown, whether or not users come back to items: what was shown was a candidate."""
        return impressions(data, candidates=self.candidates, threshold=self.threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cascaded(Fields):
    """Logged requests of `Dataset.cascade` with their candidates of each stage; each request is a sample.

    The default loss is binary cross-entropy of every objective with a known label; a `Loss.of` can add the ranker's
    scores. Held-out requests are evaluated on all their candidates with known labels.

    Attributes:
      exposed, ranked, pre_ranked, retrieved: candidates of each stage in a list of training, drawn again for every batch.
    """

    exposed: int = 8
    ranked: int = 8
    pre_ranked: int = 8
    retrieved: int = 8

    loss = None
    ranks_catalogue = False
    thresholds: ClassVar[Mapping[str, int]] = {}
    calibration_negatives = None  # all

    def __post_init__(self):
        expect_types(self)

    def positions(self, data: Dataset, *, min_history: int, since: int | None, before: int | None) -> np.ndarray:
        """Return the requests of the cascade in a span of time."""
        expect(data.cascade is not None, "Cascaded", "data with a cascade", f"{data!r}")
        starts = _with_history(data, min_history=min_history, since=since, before=before, requests=True)
        return np.intersect1d(starts, data.cascade.positions)  # type: ignore[union-attr]

    def source(self, data: Dataset, *, before: int, held_out: bool = False) -> CandidateSource:
        """Return candidates by stage; held out, all of a request."""
        return logged(data, counts=None if held_out else {stage: getattr(self, stage) for stage in STAGES})


Task: TypeAlias = NextItem | Impressions | Cascaded
TASKS: dict[str, type[Task]] = {task.__name__: task for task in (NextItem, Impressions, Cascaded)}
"""Tasks by name, for the record of a run."""


def task_of(data: Dataset, task: Task | None) -> Task:
    """Return the task, or `NextItem` for None; ValueError where events have several actions and nothing names the positives."""
    if task is not None or (data.encoder is not None and data.encoder.engaged is not None):
        return task or NextItem()
    rows, names = np.flatnonzero(data.action_counts[1:]), data.action_names
    counts = {str(names[row]) if names else str(row + 1): int(data.action_counts[row + 1]) for row in rows}
    if len(counts) > 1:
        raise ValueError(
            f"task: expected a task, or positives by Columns.history_actions, for events of several actions, got none for"
            f" {', '.join(f'{count:,} {name!r}' for name, count in counts.items())}; give task=Impressions(candidates=...,"
            f" threshold=...) to rank what was shown, or Columns(history_actions=(...)) to name the positives of NextItem;"
            f" task=NextItem() takes every event as a positive"
        )
    return NextItem()


def _with_history(data: Dataset, *, min_history: int, **span: Any) -> np.ndarray:
    """Return `sample_positions` of the log whose history, of the events that histories hold, is long enough."""
    if data.history_log is data.log:
        return sample_positions(data.log, min_history=min_history, **span)
    positions = sample_positions(data.log, **span)
    return positions[data.history_lengths(positions) >= min_history]
