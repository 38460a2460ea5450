"""Held-out requests of the study: on what every model is evaluated, and the figures of its answers, for any subset of requests.

A request is an event of the held-out slice whose user has at least MIN_HISTORY strictly earlier events. Each is evaluated in
two ways:

- *sampled*: the event's item against items drawn by training popularity ** 0.75, the same for every model. AUC, GAUC by user
  (impression-weighted) and log-loss of these candidates.
- *catalogue*: the event's item against every item that the user has not met before. HR@k: is it among the k highest scores?
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import metrics
from aif_jax.data import candidates
from aif_jax.data.candidates import CandidateLists, NegativeSampler, SampleKey
from aif_jax.data.dataset import Dataset
from aif_jax.data.split import eligible
from aif_jax.train.evaluate import list_scores
from aif_jax.types import Params

MIN_HISTORY = 5


class Requests(NamedTuple):
    """Held-out requests with their sampled candidates, the event's item in column 0."""

    positions: np.ndarray  # int64 [R] positions in the event log
    rows: np.ndarray  # int32 [R, 1 + n]
    labels: np.ndarray  # float32 [R, 1 + n]


def held_out(
    dataset: Dataset, positions: np.ndarray, sampler: NegativeSampler, *, requests: int, negatives: int = 99, seed: int = 0
) -> Requests:
    """At most `requests` of the eligible positions, drawn without replacement, with `negatives` sampled candidates each."""
    kept = eligible(dataset.log, positions, min_history=MIN_HISTORY)
    if not len(kept):
        raise ValueError(
            f"held_out: expected an event with {MIN_HISTORY} earlier events of its user, got none of {len(positions)}"
        )
    drawn = np.random.default_rng(seed).permutation(kept)[:requests]
    at = np.sort(drawn)
    source = candidates.sampled_negatives(
        dataset, sampler=sampler, negatives=negatives, repeats=True
    )  # met items too: callers mask them
    rows, labels, _ = source(at, SampleKey(seed, 0, 0))
    return Requests(at, rows, labels)


def sampled_scores(
    model: aif.PreRanker, params: Params, dataset: Dataset, requests: Requests, *, progress: bool = True
) -> np.ndarray:
    """Joint scores of the sampled candidates, float32 [R, 1 + n]."""
    lists = CandidateLists(requests.rows, requests.labels)
    return list_scores(model, params, dataset, requests.positions, lists, progress=progress)


def sampled_figures(
    scores: np.ndarray, requests: Requests, dataset: Dataset, *, calibration_negatives: int = 15, k: int = 10
) -> dict[str, float]:
    """What the sampled candidates say, for any subset of requests.

    Args:
      scores: [R, 1 + n] of the candidates.
      requests: the same requests.
      dataset: for the users.
      calibration_negatives: negatives of the log-loss; as many as in training, because log-loss compares probabilities.
      k: of NDCG@k and HR@k among the sampled candidates.

    Returns:
      `auc`; `gauc` by user, weighted by impressions, and `gauc_mean`, the plain mean over users; `log_loss`; `ndcg10` and
      `hr10` by request; `requests` and `users`, how many there are.
    """
    users = np.broadcast_to(dataset.log.user[requests.positions][:, None], scores.shape)
    part = slice(0, 1 + calibration_negatives)
    found = {
        "auc": metrics.auc(scores, requests.labels),
        "gauc": metrics.gauc(scores, requests.labels, users).value,
        "gauc_mean": metrics.gauc(scores, requests.labels, users, weighting="mean").value,
        "log_loss": metrics.log_loss(scores[:, part], requests.labels[:, part]),
    }
    if scores.shape[1] > 1:
        found[f"ndcg{k}"] = metrics.ndcg_at_k(scores, requests.labels, k=k).value
        found[f"hr{k}"] = metrics.hit_rate_at_k(scores, requests.labels, k=k).value
    return found | {"requests": len(scores), "users": len(np.unique(users[:, 0]))}


def earlier(dataset: Dataset, positions: np.ndarray) -> np.ndarray:
    """How many strictly earlier events the user of each position has, int64 [R]."""
    return dataset.log.history_end(positions) - dataset.log.offsets[dataset.log.user[positions]]


def rested(dataset: Dataset, positions: np.ndarray, *, events: int) -> np.ndarray:
    """Which requests are for a category that the user has met, but not in the last `events` events; bool [R]."""
    log, category = dataset.log, dataset.catalogue.ids["category"]
    start, end = log.offsets[log.user[positions]], log.history_end(positions)
    found = np.zeros(len(positions), bool)
    for i, (at, first, last) in enumerate(zip(positions, start, end, strict=True)):
        near = max(first, last - events)
        wanted = category[log.item[at]]
        found[i] = (category[log.item[first:near]] == wanted).any() and (category[log.item[near:last]] != wanted).all()
    return found


def pick(requests: Requests, kept: np.ndarray) -> Requests:
    """The requests for which `kept` [R] is true."""
    return Requests(requests.positions[kept], requests.rows[kept], requests.labels[kept])


def by_history(
    scores: np.ndarray, requests: Requests, dataset: Dataset, bounds: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """`sampled_figures` of the requests whose users have bounds[i] <= earlier events < bounds[i + 1], without empty bins."""
    length, found = earlier(dataset, requests.positions), {}
    for low, high in zip(bounds, [*bounds[1:], np.inf], strict=True):
        kept = (length >= low) & (length < high)
        if kept.any():
            found[f"{low}+" if high == np.inf else f"{low}-{high - 1}"] = sampled_figures(
                scores[kept], pick(requests, kept), dataset
            )
    return found


def hits(ranks: np.ndarray, k: int = 100) -> dict[str, float]:
    """HR@k and NDCG@k by request of the catalogue: each request has one item that counts."""
    return {f"hr{k}": float((ranks < k).mean()), f"ndcg{k}": float(np.where(ranks < k, 1 / np.log2(ranks + 2), 0).mean())}


def ranker_recall(ranker: np.ndarray, top: np.ndarray) -> float:
    """Share of a ranker's best rows [R, 10] that are among the pre-ranker's best [R, 100], mean over requests."""
    return float((ranker[:, :, None] == top[:, None, :]).any(2).mean())
