"""Held-out requests: on what every model of an experiment is evaluated, and the figures of its answers.

A request is an event of the held-out slice whose user has at least MIN_HISTORY strictly earlier events. Each is evaluated in
two ways:

- *sampled*: the event's item against items drawn by training popularity ** 0.75, the same for every model. AUC, GAUC by user
  (impression-weighted) and log-loss of these candidates.
- *catalogue*: the event's item against every item that the user has not met before. HR@k: is it among the k highest scores?

`evaluate` gives the few figures of the quickstart; the functions below it those of the study, for any subset of requests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import metrics, train
from aif_jax.data import candidates
from aif_jax.data.batches import make_batch
from aif_jax.data.candidates import Draw
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler
from aif_jax.data.split import eligible
from aif_jax.types import Params

MIN_HISTORY = 5


class Requests(NamedTuple):
    """Held-out requests with their sampled candidates, the event's item in column 0."""

    positions: np.ndarray  # int64 [R] positions in the event log
    rows: np.ndarray  # int32 [R, 1 + n]
    labels: np.ndarray  # float32 [R, 1 + n]


class Figures(NamedTuple):
    """What one model reached."""

    log_loss: float
    auc: float
    gauc: float
    hr: float


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
    rows, labels, _ = candidates.sampled(dataset, sampler=sampler, negatives=negatives)(at, Draw(seed, 0, 0))
    return Requests(at, rows, labels)


def evaluate(
    model: aif.PreRanker, params: Params, dataset: Dataset, requests: Requests, *, k: int = 100, calibrated: int = 15
) -> Figures:
    """The figures of both ways.

    Args:
      model, params: the trained model.
      dataset: the data.
      requests: from `held_out`.
      k: of HR@k.
      calibrated: negatives of the log-loss; as many as in training, because log-loss compares probabilities.
    """
    scores = sampled_scores(model, params, dataset, requests)
    users = np.broadcast_to(dataset.log.user[requests.positions][:, None], scores.shape)
    part = slice(0, 1 + calibrated)
    return Figures(
        log_loss=metrics.log_loss(scores[:, part], requests.labels[:, part]),
        auc=metrics.auc(scores, requests.labels),
        gauc=metrics.gauc(scores, requests.labels, users).value,
        hr=float((catalogue_ranks(model, params, dataset, requests.positions) < k).mean()),
    )


def sampled_scores(
    model: aif.PreRanker, params: Params, dataset: Dataset, requests: Requests, *, batch: int = 128
) -> np.ndarray:
    """Joint scores of the sampled candidates, float32 [R, 1 + n]."""
    count = len(requests.positions)
    whole = np.arange(-(-count // batch) * batch) % count  # the last batch is filled up, so that one shape is compiled

    def batches():
        for at in tqdm(np.split(whole, len(whole) // batch), desc="score", unit="batch", leave=False):
            yield make_batch(dataset, requests.positions[at], requests.rows[at], requests.labels[at], config=model.config)

    return np.concatenate(list(train.predict(model, params, batches())))[:count]


def catalogue_rows(model: aif.PreRanker, params: Params, dataset: Dataset, *, batch: int = 1024) -> Any:
    """The nearline job in its simplest form: the item function over the whole catalogue -> rows [N] on the device."""
    compute = jax.jit(jax.vmap(model.item, (None, 0)))
    total = len(dataset.catalogue)
    starts = range(0, total, batch)
    parts = []
    for start in tqdm(starts, desc="item rows", unit="batch", leave=False):
        rows = np.minimum(np.arange(start, start + batch), total - 1)
        parts.append(compute(params, dataset.catalogue.features(rows, content=model.config.reads_content)))
    return jax.tree.map(lambda *leaves: jax.numpy.concatenate(leaves)[:total], *parts)


class Catalogue(NamedTuple):
    """The whole catalogue ranked for R requests."""

    ranks: np.ndarray  # int64 [R] of each event's item, 0 the best; ties count against it
    top: np.ndarray  # int32 [R, k] the best rows, best first


def catalogue_ranks(
    model: aif.PreRanker, params: Params, dataset: Dataset, positions: np.ndarray, *, batch: int = 16
) -> np.ndarray:
    """Rank of each event's item among all items that its user has not met before, 0 the best; ties count against it."""
    return rank_catalogue(model, params, dataset, positions, batch=batch).ranks


def rank_catalogue(
    model: aif.PreRanker,
    params: Params,
    dataset: Dataset,
    positions: np.ndarray,
    *,
    k: int = 1,
    batch: int = 16,
    repeats: bool = False,
) -> Catalogue:
    """Scores the whole catalogue for the user of each event.

    Args:
      model, params, dataset: as in `evaluate`.
      positions: [R] of events.
      k: how many of the best rows to keep.
      batch: requests scored at a time; every batch holds `batch` x N scores.
      repeats: whether users come back to items: then what they have met stays a candidate.
    """
    config, log = model.config, dataset.log
    rows = catalogue_rows(model, params, dataset)
    user = jax.jit(jax.vmap(model.user, (None, 0)))
    interaction = jax.jit(jax.vmap(model.interaction, (None, 0, None)))
    count = len(positions)
    whole = np.arange(-(-count // batch) * batch) % count
    ranks, top = [], []
    for at in tqdm(np.split(whole, len(whole) // batch), desc="rank", unit="batch", leave=False):
        here = positions[at]
        features = dataset.user_features(here, length=config.history_length)
        scores = np.array(interaction(params, user(params, features), rows))
        target, each = log.item[here], np.arange(batch)
        score = scores[each, target]
        scores[:, 0] = -np.inf  # row 0 is no item
        if not repeats:
            for i, (position, end) in enumerate(zip(here, log.history_end(here), strict=True)):
                scores[i, log.item[log.offsets[log.user[position]] : end]] = -np.inf
        scores[each, target] = score
        ranks.append((scores >= score[:, None]).sum(1) - 1)
        best = np.argpartition(scores, -k, axis=1)[:, -k:]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
        top.append(np.take_along_axis(best, order, 1).astype(np.int32))
    return Catalogue(np.concatenate(ranks)[:count], np.concatenate(top)[:count])


def sampled_figures(
    scores: np.ndarray, requests: Requests, dataset: Dataset, *, calibrated: int = 15, k: int = 10
) -> dict[str, float]:
    """What the sampled candidates say, for any subset of requests.

    Args:
      scores: [R, 1 + n] of the candidates.
      requests: the same requests.
      dataset: for the users.
      calibrated: negatives of the log-loss, see `evaluate`.
      k: of NDCG@k and HR@k among the sampled candidates.

    Returns:
      `auc`; `gauc` by user, weighted by impressions, and `gauc_mean`, the plain mean over users; `log_loss`; `ndcg10` and
      `hr10` by request; `requests` and `users`, how many these stand on.
    """
    users = np.broadcast_to(dataset.log.user[requests.positions][:, None], scores.shape)
    part = slice(0, 1 + calibrated)
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
