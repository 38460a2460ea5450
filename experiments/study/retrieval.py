"""What retrieval finds for a request: the candidates that the models of `experiments.ranker_recall` cut.

It is of another kind than they are. MovieLens: PureSVD of users and items, films that the user has not met. Taobao: items that
the user has met, the latest first, then in turns EASE and popular items of the categories of the last events. Only items with a
training event are found, and only events strictly before the request are read.

Requests get the best `MOST` in order; the first of them are what a smaller retrieval finds. Training events get `TAUGHT` of
what retrieval finds for them, drawn at random: a ranker scores these once, to teach pre-rankers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aif_jax.blocks import PureSvd
from aif_jax.data import Dataset, EventLog
from aif_jax.train.edits import svd_factors
from experiments.peers import baselines, judge
from experiments.study import question
from experiments.study.datasets import StudyData
from experiments.study.question import Part, Requests

MOST, TAUGHT = 3000, 64
SVD = PureSvd(width=32, length=128, decay=0.5)
TOP = 1000  # the taught candidates of MovieLens are drawn among so many
MET, MET_TAUGHT = 300, 24  # met items of Taobao: of a request at most, of a training event
LAST, DECAY, POWER = 50, 0.7, 0.5  # events whose categories count, by place ** -DECAY, and by popularity ** POWER
BLOCK = 128  # requests whose scores of the catalogue are in memory


def of_requests(data: StudyData, part: Part, requests: Requests, counts: np.ndarray) -> np.ndarray:
    """Return int32 [R, n] catalogue rows, at most MOST, the best first, 0 after the last; `counts` [N] are training events."""
    at, none = requests.positions, (counts == 0) | (np.arange(len(counts)) == 0)
    most = min(MOST, len(counts) - 1)
    found = np.zeros((len(at), most), np.int32)
    if not data.repeats:
        for places, scores in _svd_scores(data.dataset, part, at, counts):
            top = _best(scores, most)
            found[places] = np.where(np.take_along_axis(scores, top, 1) > -np.inf, top, 0)
        return found
    on = question.Slice(data, part, requests, counts, question.catalogue_requests(requests))
    by_ease, log = baselines.ease(judge.lists_of(on), regularization=200.0, last=20), data.dataset.log
    category = data.dataset.catalogue.items.ids["category"]
    ends, popular = log.history_end(at), np.where(none, 0, counts.astype(np.float64) ** POWER)
    for places in _blocks(len(at)):
        first = np.array(by_ease(places)) * np.maximum(counts, 1) ** 0.25
        second = _category_weights(log, at[places], category)[:, category] * popular
        orders = [_best(np.where(none, -np.inf, scores), most) for scores in (first, second)]
        for row, place in enumerate(places):
            met = log.item[log.offsets[log.user[at[place]]] : ends[place]][::-1]
            met = _unique(met[~none[met]])[:MET]
            every = _unique(np.concatenate([met, np.stack([order[row] for order in orders], 1).ravel()]))[:most]
            found[place, : len(every)] = every
    return found


def of_training(data: StudyData, part: Part, positions: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return int32 [n, TAUGHT] catalogue rows of every event of the log, those of `positions` filled; 0 where there is none."""
    rng, rows = np.random.default_rng(seed), np.zeros((len(data.dataset.log), TAUGHT), np.int32)
    if data.repeats:
        rows[positions] = _met_and_categories(data.dataset, positions, counts, rng)
        return rows
    for places, scores in _svd_scores(data.dataset, part, positions, counts):
        top = _best(scores, TOP)
        drawn = np.take_along_axis(top, rng.random(top.shape).argpartition(TAUGHT, axis=1)[:, :TAUGHT], 1)
        rows[positions[places]] = np.where(np.take_along_axis(scores, drawn, 1) > -np.inf, drawn, 0)
    return rows


def _svd_scores(
    dataset: Dataset, part: Part, positions: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places and scores float32 [b, N] of requests by PureSVD; -inf for what is met, or has no training event."""
    log, none = dataset.log, (counts == 0) | (np.arange(len(counts)) == 0)
    factors = np.asarray(svd_factors(log.user[part.seen], log.item[part.seen], size=len(counts), block=SVD), np.float32)
    weight = (np.arange(1.0, SVD.length + 1) ** -SVD.decay).astype(np.float32)
    start, end = log.offsets[log.user[positions]], log.history_end(positions)
    for places in _blocks(len(positions)):
        at = end[places, None] - 1 - np.arange(SVD.length)
        there = at >= start[places, None]
        items = np.where(there, log.item[np.maximum(at, 0)], 0)
        users = np.einsum("bl,bld->bd", np.where(there & (items > 0), weight, 0).astype(np.float32), factors[items])
        scores = users @ factors.T
        scores[:, none] = -np.inf
        for row, place in enumerate(places):
            scores[row, log.item[start[place] : end[place]]] = -np.inf
        yield places, scores


def _category_weights(log: EventLog, positions: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Return weights [B, categories] of the categories of the last events before each request."""
    at = log.history_end(positions)[:, None] - 1 - np.arange(LAST)
    there = at >= log.offsets[log.user[positions]][:, None]
    weights = np.zeros((len(positions), int(category.max()) + 1))
    owner = np.broadcast_to(np.arange(len(positions))[:, None], at.shape)
    places = np.broadcast_to((1.0 + np.arange(LAST)) ** -DECAY, at.shape)
    np.add.at(weights, (owner[there], category[log.item[np.maximum(at, 0)]][there]), places[there])
    return weights


def _met_and_categories(dataset: Dataset, positions: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return int32 [B, TAUGHT]: some of the latest met items, and items of the last events' categories by popularity."""
    log, category = dataset.log, dataset.catalogue.items.ids["category"]
    start, end = log.offsets[log.user[positions]], log.history_end(positions)
    recent = np.minimum(end - start, MET)
    met = log.item[end[:, None] - 1 - (rng.random((len(positions), MET_TAUGHT)) * recent[:, None]).astype(np.int64)]
    popular = np.where(counts > 0, counts.astype(np.float64) ** POWER, 0)
    popular[0] = 0
    order = np.argsort(category, kind="stable")  # items by category: those of a category are a span of `upto`
    upto = np.concatenate([[0.0], np.cumsum(popular[order])])
    sizes = np.bincount(category, minlength=int(category.max()) + 1)
    first = np.cumsum(sizes) - sizes
    before, mass = upto[first], upto[first + sizes] - upto[first]
    at = end[:, None] - 1 - np.arange(LAST)
    of = category[log.item[np.maximum(at, 0)]]
    weights = np.cumsum(np.where(at >= start[:, None], (1.0 + np.arange(LAST)) ** -DECAY, 0) * mass[of], axis=1)
    draws = rng.random((len(positions), TAUGHT - MET_TAUGHT)) * weights[:, -1:]
    chosen = np.stack([np.minimum((weights <= draw[:, None]).sum(1), LAST - 1) for draw in draws.T], 1)
    own = np.take_along_axis(of, chosen, 1)
    place = np.searchsorted(upto[1:], before[own] + rng.random(own.shape) * mass[own], side="right")
    found = order[np.minimum(place, len(order) - 1)]
    rows = np.concatenate([met, np.where(weights[:, -1:] > 0, found, 0)], 1)
    return np.where(counts[rows] > 0, rows, 0).astype(np.int32)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return columns [B, count] of the highest scores, the best first."""
    count = min(count, scores.shape[1] - 1)
    best = np.argpartition(-scores, count, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def _unique(rows: np.ndarray) -> np.ndarray:
    """Return the same without repeats, in order."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def _blocks(count: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))
