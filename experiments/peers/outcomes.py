"""From scores to what figures are made of: the AUC of every user and the rank of every target.

All of it is by request or by user, so that two models can be compared on the same resampled users.

Each question is put twice. "Asked" takes the scores as they are. "Corrected" asks what the model knows, whatever it was trained
against: where scores are logarithms of a likelihood over count ** p (`sampler_power`),

- the catalogue asks for the likelihood: p log(count) is added;
- lists with negatives drawn by count ** w ask for the likelihood over that: (p - w) log(count) is added, with count at least 1.

In the corrected catalogue items without a training event are masked for every model.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from aif_jax import metrics
from experiments.peers.lists import Lists
from experiments.peers.scores import Pairs, Scores

BLOCK = 256  # requests whose catalogue scores are copied at a time
QUESTIONS = ("asked", "corrected")
MISSED = np.iinfo(np.int64).max  # the rank of a target that is no candidate: no k reaches it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ByUser:
    """A weighted mean over U users: of AUC with candidates as weights, or of hits with requests as weights."""

    value: np.ndarray  # float64 [U]
    weight: np.ndarray  # float64 [U]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """What one model does on the lists.

    Attributes:
      aucs: by user of the lists, "asked", "corrected", and of the mixed ones, "mixed asked", "mixed corrected"; those that the
        score files allow.
      ranks: "asked", "corrected", "asked retrieved", "corrected retrieved" to the rank int64 [R] of each target, 0 the best;
        those that the score files allow.
      untrained_at_top: share of items without a training event in each request's hundred best as asked [R], or None.
    """

    aucs: dict[str, ByUser] = dataclasses.field(default_factory=dict)
    ranks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    untrained_at_top: np.ndarray | None = None


def outcomes(lists: Lists, scores: Scores, *, retrieved: np.ndarray | None = None) -> Outcomes:
    """Everything that a model's score files allow.

    Args:
      lists: the slice.
      scores: of one model.
      retrieved: int [R, M] rows that a retrieval found, see `retrieval`; adds the ranks among them.

    Raises:
      ValueError: a file of candidates that lacks one.
    """
    aucs: dict[str, ByUser] = {}
    if scores.catalogue is not None or scores.candidates is not None:
        popular = np.log(np.maximum(lists.count, 1))
        for prefix, negatives in (("", lists.negatives), ("mixed ", lists.mixed_negatives)):
            rows = np.concatenate([lists.target[:, None], negatives], axis=1)
            given = _of_candidates(scores, rows).astype(np.float64)
            power = lists.about["power"] if scores.sampler_power is None else scores.sampler_power
            for question, added in (("asked", 0.0), ("corrected", power - lists.about["power"])):
                aucs[prefix + question] = auc_by_user(given + added * popular[rows], lists.user)
    ranks: dict[str, np.ndarray] = {}
    at_top = None
    if scores.catalogue is not None:
        for question in QUESTIONS:
            ranks[question] = catalogue_ranks(lists, scores, question)
            if retrieved is not None:
                ranks[f"{question} retrieved"] = ranks_within(lists, scores, question, retrieved)
        best = best_rows(lists, scores, "asked", k=min(100, len(lists.count) - 1))
        known = best > 0
        at_top = ((lists.count[best] == 0) & known).sum(1) / np.maximum(known.sum(1), 1)
    elif scores.top is not None:
        ranks["asked"] = ranks_of_top(lists, scores.top)
    return Outcomes(aucs=aucs, ranks=ranks, untrained_at_top=at_top)


def auc_by_user(scores: np.ndarray, user: np.ndarray) -> ByUser:
    """The AUC of each user's requests [R, 1 + n] pooled, the target in column 0; users ascending.

    Their mean weighted by candidates is the study's GAUC.
    """
    labels = np.zeros(scores.shape[1], np.float64)
    labels[0] = 1
    values, weights = [], []
    for one in np.unique(user):
        mine = scores[user == one]
        values.append(metrics.auc(mine, np.broadcast_to(labels, mine.shape)))
        weights.append(mine.size)
    return ByUser(value=np.array(values), weight=np.array(weights, np.float64))


def hits_by_user(ranks: np.ndarray, user: np.ndarray, *, k: int) -> ByUser:
    """HR@k of each user's requests, users ascending; their mean weighted by requests is HR@k of all requests."""
    place = np.unique(user, return_inverse=True)[1]
    weight = np.bincount(place).astype(np.float64)
    return ByUser(value=np.bincount(place, ranks < k) / weight, weight=weight)


def catalogue_ranks(lists: Lists, scores: Scores, question: str) -> np.ndarray:
    """The rank of each target among the items that its user has not met; ties count against it.

    A target that the question masks, an untrained one in "corrected", has the rank MISSED.
    """
    ranks = []
    for start, block in _blocks(lists, scores, question):
        target = lists.target[start : start + len(block)]
        own = block[np.arange(len(block)), target]
        rank = (block >= own[:, None]).sum(1) - 1
        ranks.append(np.where(own == -np.inf, MISSED, rank))
    return np.concatenate(ranks)


def ranks_within(lists: Lists, scores: Scores, question: str, retrieved: np.ndarray) -> np.ndarray:
    """The same among the rows int [R, M] that a retrieval found, 0 where it found fewer; MISSED for a target it lacks."""
    ranks = []
    for start, block in _blocks(lists, scores, question):
        target, rows = (array[start : start + len(block)] for array in (lists.target, retrieved))
        own = block[np.arange(len(block)), target]
        inside = np.take_along_axis(block, rows, 1)
        rank = ((inside >= own[:, None]) & (rows > 0)).sum(1) - 1
        missed = (own == -np.inf) | ~(rows == target[:, None]).any(1)
        ranks.append(np.where(missed, MISSED, rank))
    return np.concatenate(ranks)


def best_rows(lists: Lists, scores: Scores, question: str, *, k: int) -> np.ndarray:
    """The k best unmet rows of each request int32 [R, k], best first, 0 where there are fewer."""
    found = []
    for _, block in _blocks(lists, scores, question):
        best = np.argpartition(block, -k, axis=1)[:, -k:]
        values = np.take_along_axis(block, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        rows = np.take_along_axis(best, order, 1)
        found.append(np.where(np.take_along_axis(values, order, 1) == -np.inf, 0, rows).astype(np.int32))
    return np.concatenate(found)


def ranks_of_top(lists: Lists, top: Pairs) -> np.ndarray:
    """The rank of each target among a file's pairs that its user has not met; MISSED for one that the file lacks.

    Only ranks below the file's depth mean something: see `depth`.
    """
    size = len(lists.count)
    own = _look_up(top, np.arange(len(lists.target)), lists.target, size)
    counts = ~_met(lists, top.request, top.item) & (top.item > 0)
    better = counts & (top.score >= own[top.request])
    rank = np.bincount(top.request, better, minlength=len(own)).astype(np.int64) - 1
    return np.where(np.isnan(own), MISSED, rank)


def depth(lists: Lists, top: Pairs) -> int:
    """The least number of unmet items that a file has of a request: HR@k is known up to this k."""
    counts = ~_met(lists, top.request, top.item) & (top.item > 0)
    return int(np.bincount(top.request, counts, minlength=len(lists.target)).min())


def _blocks(lists: Lists, scores: Scores, question: str):
    """Blocks of catalogue scores [B, N] with their first request; -inf for what is no candidate."""
    if question not in QUESTIONS:
        raise ValueError(f"question: expected one of {QUESTIONS}, got {question!r}")
    assert scores.catalogue is not None  # the callers look
    added = np.zeros(len(lists.count))
    if question == "corrected":
        popular = (scores.sampler_power or 0) * np.log(np.maximum(lists.count, 1))
        added = np.where(lists.count > 0, popular, -np.inf)
    for start in range(0, len(scores.catalogue), BLOCK):
        block = scores.catalogue[start : start + BLOCK].astype(np.float64) + added
        block[:, 0] = -np.inf
        if not lists.about["repeats"]:
            first, last = lists.offsets[start], lists.offsets[start + len(block)]
            lengths = np.diff(lists.offsets[start : start + len(block) + 1])
            target = lists.target[start : start + len(block)]
            own = block[np.arange(len(block)), target]
            block[np.repeat(np.arange(len(block)), lengths), lists.history["item"][first:last]] = -np.inf
            block[np.arange(len(block)), target] = own
        yield start, block


def _of_candidates(scores: Scores, rows: np.ndarray) -> np.ndarray:
    """Scores of rows [R, C] from either file."""
    if scores.catalogue is not None:
        return np.take_along_axis(scores.catalogue, rows.astype(np.int64), 1)
    assert scores.candidates is not None  # the caller looks
    request = np.repeat(np.arange(len(rows)), rows.shape[1])
    size = int(max(scores.candidates.item.max(), rows.max())) + 1
    found = _look_up(scores.candidates, request, rows.reshape(-1), size)
    missing = np.flatnonzero(np.isnan(found))
    if len(missing):
        at = missing[0]
        raise ValueError(
            f"{scores.name}: expected a score of every candidate, got none of item {rows.reshape(-1)[at]} "
            f"for request {request[at]} ({len(missing)} such entries)"
        )
    return found.reshape(rows.shape)


def _look_up(pairs: Pairs, request: np.ndarray, item: np.ndarray, size: int) -> np.ndarray:
    """The score of each (request, item), NaN where there is none."""
    keys, wanted = pairs.request * size + pairs.item, request * size + item.astype(np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, pairs.score[at], np.nan)


def _met(lists: Lists, request: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Whether the user had met the item before the request; never where users come back to items, nor the target."""
    if lists.about["repeats"]:
        return np.zeros(len(request), bool)
    size = len(lists.count)
    requests = np.repeat(np.arange(len(lists.target)), np.diff(lists.offsets))
    met = np.isin(request * size + item, requests * size + lists.history["item"].astype(np.int64))
    return met & (item != lists.target[request])
