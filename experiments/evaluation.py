"""Held-out requests: what every model of an experiment is asked, and how its answers are counted.

A request is an event of the held-out slice whose user has at least MIN_HISTORY strictly earlier events. Two questions are
asked of each:

- *sampled*: the event's item against items drawn by training popularity ** 0.75, the same for every model. AUC, GAUC by user
  (impression-weighted) and log-loss of these candidates.
- *catalogue*: the event's item against every item that the user has not met before. HR@k: is it among the k highest scores?
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import metrics, train
from aif_jax.data.batches import candidate_features, make_batch
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, lists
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
    rows, labels = lists(dataset, at, sampler=sampler, negatives=negatives, seed=seed, epoch=0, step=0)
    return Requests(at, rows, labels)


def evaluate(
    model: aif.PreRanker, params: Params, dataset: Dataset, requests: Requests, *, k: int = 100, calibrated: int = 15
) -> Figures:
    """Asks both questions of every request.

    Args:
      model, params: the trained model.
      dataset: with signatures where the model uses them.
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
        for at in tqdm(
            np.split(whole, len(whole) // batch), desc=f"score {model.config.architecture}", unit="batch", leave=False
        ):
            yield make_batch(dataset, requests.positions[at], requests.rows[at], requests.labels[at], config=model.config)

    return np.concatenate(list(train.predict(model, params, batches())))[:count]


def catalogue_rows(model: aif.PreRanker, params: Params, dataset: Dataset, *, batch: int = 1024) -> Any:
    """The nearline job in its simplest form: the item function over the whole catalogue -> rows [N] on the device."""
    compute = jax.jit(jax.vmap(model.item, (None, 0)))
    total = len(dataset.catalogue)
    starts = range(0, total, batch)
    parts = []
    for start in tqdm(starts, desc=f"item rows {model.config.architecture}", unit="batch", leave=False):
        rows = np.minimum(np.arange(start, start + batch), total - 1)
        parts.append(compute(params, candidate_features(dataset, rows, config=model.config)))
    return jax.tree.map(lambda *leaves: jax.numpy.concatenate(leaves)[:total], *parts)


def catalogue_ranks(
    model: aif.PreRanker, params: Params, dataset: Dataset, positions: np.ndarray, *, batch: int = 16
) -> np.ndarray:
    """Rank of each event's item among all items that its user has not met before, 0 the best; ties count against it."""
    config, log = model.config, dataset.log
    rows = catalogue_rows(model, params, dataset)
    user = jax.jit(jax.vmap(model.user, (None, 0)))
    interaction = jax.jit(jax.vmap(model.interaction, (None, 0, None)))
    count = len(positions)
    whole = np.arange(-(-count // batch) * batch) % count
    ranks = []
    for at in tqdm(np.split(whole, len(whole) // batch), desc=f"rank {config.architecture}", unit="batch", leave=False):
        here = positions[at]
        features = dataset.user_features(here, short=config.short_length, long=config.long_length)
        scores = np.asarray(interaction(params, user(params, features), rows))
        met = np.zeros(scores.shape, bool)
        met[:, 0] = True  # row 0 is no item
        for i, (position, end) in enumerate(zip(here, log.history_end(here), strict=True)):
            met[i, log.item[log.offsets[log.user[position]] : end]] = True
        target = log.item[here]
        own = scores[np.arange(batch), target]
        met[np.arange(batch), target] = True
        ranks.append(((scores >= own[:, None]) & ~met).sum(1))
    return np.concatenate(ranks)[:count]
