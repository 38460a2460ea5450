"""The requests of `question` as files, score files judged by its metrics, and the share of popularity in them.

Candidates are drawn by count ** 0.75 and the catalogue is not, so the right share of popularity in a score differs between GAUC
and HR@100, and depends on a model's negatives in training. This package's models get the shares that follow from their loss, 0
and 0.75. A peer gets for each metric the best one of POWERS on the validation slice: power log(count) is added to scores that
are logarithms of a likelihood (`logits`), others are multiplied by count ** power.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aif_jax.data.negatives import item_counts
from aif_jax.metrics import ByUser
from aif_jax.train.evaluate import rank_of
from experiments.peers import lists
from experiments.peers.lists import Lists
from experiments.peers.scores import BLOCK, Scores
from experiments.study import question
from experiments.study.datasets import StudyData
from experiments.study.question import UNTRAINED, Part, Requests, Trial

SLICES = ("validation", "test")
POWER = 0.75  # of the study's sampler
POWERS = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
GAUC, HIT_RATE = JUDGED = ("gauc_trained", "hr100_trained")
"""The headline's metrics: requests whose item has a training event."""


class Slice(NamedTuple):
    """What every peer is judged on: of one data set, "validation" or "test"."""

    data: StudyData
    name: str
    part: Part
    requests: Requests
    counts: np.ndarray  # [N] training events
    at: np.ndarray  # requests that rank the whole catalogue


def slice_of(data: StudyData, name: str) -> Slice:
    """Return the study's own requests."""
    trial = Trial(dataset=data.name, model="", split=name)
    (part,) = question.parts_of(trial, data)
    requests = question.requests_of(trial, part, data)
    return Slice(data, name, part, requests, item_counts(data.dataset, part.seen), question.catalogue_requests(requests))


def lists_of(on: Slice) -> Lists:
    """Return files' contents for one slice: "validation", trained on the first 80 % of events, or "test", on the first 90 %."""
    dataset, at, seen = on.data.dataset, on.requests.positions, on.part.seen
    log = dataset.log
    start, end = log.offsets[log.user[at]], log.history_end(at)
    places = np.concatenate([np.arange(first, last) for first, last in zip(start, end, strict=True)])
    about = {"dataset": on.data.name, "slice": on.name, "repeats": on.data.repeats, "power": POWER}
    return Lists(
        about={"format": lists.FORMAT} | about,
        count=on.counts,
        fields={name: ids for name, ids in dataset.catalogue.ids.items() if name != "item"},
        content=dataset.catalogue.content,
        events={name: getattr(log, name)[seen] for name in ("user", "item", "action", "time")},
        user=log.user[at],
        time=log.time[at],
        offsets=np.append(0, np.cumsum(end - start)),
        history={name: getattr(log, name)[places] for name in ("item", "action", "time")},
        candidates=np.sort(on.requests.rows, axis=1).astype(np.int32),
        whole=np.isin(at, on.at),
    )


def once(folder: Path, on: Slice) -> Lists:
    """Return the lists of a slice in a folder, written where there are none.

    Raises:
      ValueError: lists of another data set or slice are there.
    """
    if not (folder / "about.json").exists():
        lists.write(folder, lists_of(on))
    found = lists.read(folder)
    wanted, got = (on.data.name, on.name), (found.about["dataset"], found.about["slice"])
    if got != wanted:
        raise ValueError(f"{folder}: expected lists of {wanted}, got {got}; remove the folder")
    return found


def judged(found: Scores, on: Slice, powers: dict[str, float]) -> dict[str, ByUser]:
    """Return metrics of `question.evaluate` by user, with these powers, see `best_powers`; no hit rates without a catalogue."""
    made = gauc(found, on, powers.get(GAUC, 0.0))
    if found.catalogue is None:
        return made
    # what is no logarithm has no scale that a constant for items without a training event could be on: they come last
    values = UNTRAINED if found.logits else [-np.inf] * len(UNTRAINED)
    offsets = [np.where(on.counts > 0, 0.0, value) for value in values]
    scored = _catalogue(found, on, np.arange(len(on.at)), [powers.get(HIT_RATE, 0.0)])
    return made | question.catalogue_metrics(((rows, every) for rows, _, every in scored), on.at, on.data, on.counts, offsets)


def gauc(found: Scores, on: Slice, power: float) -> dict[str, ByUser]:
    """Return the metrics of `question.sampled_metrics`, with popularity of this power in the scores."""
    scores = np.empty(on.requests.rows.shape)
    np.put_along_axis(scores, np.argsort(on.requests.rows, axis=1, kind="stable"), found.candidates, 1)
    scores = _with_popularity(scores, on.counts[on.requests.rows], power, found.logits)
    return question.sampled_metrics(scores, on.requests, on.data, on.counts)


def best_powers(found: Scores, on: Slice) -> tuple[dict[str, float], dict[str, float]]:
    """Return the best of POWERS for each metric of the headline, and the metric with it; hit rates if the catalogue was scored.

    `on` is the validation slice.
    """
    tried = {GAUC: [gauc(found, on, power)[GAUC].mean for power in POWERS]}
    if found.catalogue is not None:
        target = on.data.dataset.log.item[on.at]
        rows = np.flatnonzero(on.counts[target] > 0)
        hits = dict.fromkeys(POWERS, 0)
        for some, power, every in _catalogue(found, on, rows, POWERS):
            hits[power] += (rank_of(np.where(on.counts > 0, every, -np.inf), target[some]) < 100).sum()
        tried[HIT_RATE] = [hits[power] / len(rows) for power in POWERS]
    powers = {name: POWERS[np.argmax(means)] for name, means in tried.items()}
    return powers, {name: max(means) for name, means in tried.items()}


def _catalogue(
    found: Scores, on: Slice, rows: np.ndarray, powers: Sequence[float]
) -> Iterator[tuple[np.ndarray, float, np.ndarray]]:
    """Yield blocks of these rows of `on.at` for every power: the rows, the power, the scores, -inf for what is no candidate."""
    assert found.catalogue is not None  # the callers look
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        for power in powers:
            every = _with_popularity(found.catalogue[some].astype(np.float64), on.counts, power, found.logits)
            yield some, power, question.hide_met(every, on.at[some], on.data)


def _with_popularity(scores: np.ndarray, counts: np.ndarray, power: float, logits: bool) -> np.ndarray:
    """Return scores with a share of popularity; an item without a training event counts as half of one."""
    popular = np.maximum(counts, 0.5)
    return scores + power * np.log(popular) if logits else scores * popular**power
