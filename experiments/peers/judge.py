"""The requests of `question` for a peer, its scores judged by the same metrics, and the share of popularity in them.

Candidates are drawn by count ** 0.75 and the catalogue is not, so the right share of popularity in a score differs between GAUC
and HR@100, and depends on a model's negatives in training. This package's models get the shares that follow from their loss, 0
and 0.75. A peer's scores are multiplied by count ** power, for each metric the best one of POWERS on the validation slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aif_jax.metrics import ByUser
from aif_jax.train.evaluate import rank_of
from experiments.study import question
from experiments.study.datasets import StudyData
from experiments.study.question import UNTRAINED, Slice, Trial

SLICES = ("validation", "test")
POWERS = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
GAUC, HIT_RATE = JUDGED = ("gauc_trained", "hr100_trained")
"""The headline's metrics: requests whose item has a training event."""
BLOCK = 200  # requests whose whole catalogue is scored at a time
Scorer = Callable[[np.ndarray], np.ndarray]
"""`scorer(requests)`: float [b, N], the scores of the catalogue for some requests, by number; higher is better.

A user's requests are compared with each other too. Where scores are logarithms of a likelihood, give their exponential.
"""


class Lists(NamedTuple):
    """What a peer reads: training events, and the strictly earlier events of each request, which may be later than those."""

    repeats: bool  # whether users come back to items
    count: np.ndarray  # int64 [N] training events of each item
    events: dict[str, np.ndarray]  # training events: `user`, `item`, `action` int32 [n] and `time` int64 [n], by user and time
    item: np.ndarray  # int32, the items of all events: those of request r are `item[start[r] : end[r]]`, oldest first
    start: np.ndarray  # int64 [R]
    end: np.ndarray  # int64 [R]

    def recent(self, length: int) -> np.ndarray:
        """Return the last items of each request, int32 [R, length], the most recent first, 0 where there is none."""
        at = self.end[:, None] - 1 - np.arange(length)
        return np.where(at >= self.start[:, None], self.item[np.maximum(at, 0)], 0).astype(np.int32)


class Scores(NamedTuple):
    """What a peer gives the requests of a slice."""

    candidates: np.ndarray  # float32 [R, C] of the candidates
    catalogue: np.ndarray  # float32 [W, N] for each request that ranks the whole catalogue


def slice_of(data: StudyData, name: str) -> Slice:
    """Return the study's own requests."""
    trial = Trial(dataset=data.name, model="", split=name)
    (part,) = question.parts_of(trial, data)
    return question.slice_of(trial, part, data)


def lists_of(on: Slice) -> Lists:
    """Return what a peer reads of a slice."""
    log, at = on.data.dataset.log, on.requests.positions
    events = {name: getattr(log, name)[on.part.seen] for name in ("user", "item", "action", "time")}
    return Lists(on.data.repeats, on.counts, events, log.item, log.offsets[log.user[at]], log.history_end(at))


def scored(scorer: Scorer, on: Slice) -> Scores:
    """Return the scores of a peer."""
    candidates, catalogue, whole = [], [], np.isin(on.requests.positions, on.at)
    for start in range(0, len(whole), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(whole)))
        every = np.asarray(scorer(places), np.float32)
        candidates.append(np.take_along_axis(every, on.requests.rows[places].astype(np.int64), 1))
        catalogue.append(every[whole[places]])
    return Scores(np.concatenate(candidates), np.concatenate(catalogue))


def judged(found: Scores, on: Slice, powers: Mapping[str, float]) -> dict[str, ByUser]:
    """Return metrics of `question.evaluate` by user, with these powers, see `best_powers`.

    Scores have no scale that a constant for items without a training event could be on: these come last.
    """
    offsets = [np.where(on.counts > 0, 0.0, -np.inf)] * len(UNTRAINED)
    every = ((rows, scores) for rows, _, scores in _catalogue(found, on, np.arange(len(on.at)), [powers.get(HIT_RATE, 0.0)]))
    return gauc(found, on, powers.get(GAUC, 0.0)) | question.catalogue_metrics(every, on, offsets)


def gauc(found: Scores, on: Slice, power: float) -> dict[str, ByUser]:
    """Return the metrics of `question.sampled_metrics`, with popularity of this power in the scores."""
    scores = _with_popularity(found.candidates, on.counts[on.requests.rows], power)
    return question.sampled_metrics(scores, on)


def best_powers(found: Scores, on: Slice) -> tuple[dict[str, float], dict[str, float]]:
    """Return the best of POWERS for each metric of the headline, and the metric with it; `on` is the validation slice."""
    target = on.data.dataset.log.item[on.at]
    rows, hits = np.flatnonzero(on.counts[target] > 0), dict.fromkeys(POWERS, 0)
    for some, power, every in _catalogue(found, on, rows, POWERS):
        hits[power] += (rank_of(np.where(on.counts > 0, every, -np.inf), target[some]) < 100).sum()
    tried = {GAUC: [gauc(found, on, power)[GAUC].mean for power in POWERS]}
    tried[HIT_RATE] = [hits[power] / len(rows) for power in POWERS]
    powers = {name: POWERS[np.argmax(means)] for name, means in tried.items()}
    return powers, {name: max(means) for name, means in tried.items()}


def _catalogue(
    found: Scores, on: Slice, rows: np.ndarray, powers: Sequence[float]
) -> Iterator[tuple[np.ndarray, float, np.ndarray]]:
    """Yield blocks of these rows of `on.at` for every power: the rows, the power, the scores, -inf for what is no candidate."""
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        for power in powers:
            every = _with_popularity(found.catalogue[some], on.counts, power)
            yield some, power, _hide_met(every, on.at[some], on.data)


def _hide_met(every: np.ndarray, at: np.ndarray, data: StudyData) -> np.ndarray:
    """Return scores of the catalogue [b, N] for the requests `at` with -inf for no candidate, as `catalogue_scores` has it."""
    every[:, 0] = -np.inf  # no item
    log = data.dataset.log
    starts, ends = log.offsets[log.user[at]], log.history_end(at)
    for row in range(0 if data.repeats else len(at)):
        own = every[row, log.item[at[row]]]
        every[row, log.item[starts[row] : ends[row]]] = -np.inf
        every[row, log.item[at[row]]] = own
    return every


def _with_popularity(scores: np.ndarray, counts: np.ndarray, power: float) -> np.ndarray:
    """Return scores with a share of popularity; an item without a training event counts as half of one."""
    return scores.astype(np.float64) * np.maximum(counts, 0.5) ** power
