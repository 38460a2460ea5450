"""Positions to training and evaluation batches: features of one user and C candidates for each sample.

Source: ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, Seen, epoch_batches, lists
from aif_jax.types import Array, ItemFeatures, UserFeatures, record


@record
class Batch:
    """B samples of one user and C candidates each."""

    users: UserFeatures  # [B]
    items: ItemFeatures  # [B, C]
    labels: Array  # float32 [B, C]
    where: Array  # bool [B, C] false where there is no candidate
    log_q: Array | None = None  # float32 [B, C] of sampled candidates, for a corrected softmax


def make_batch(
    dataset: Dataset,
    positions: Any,
    rows: np.ndarray,
    labels: np.ndarray,
    *,
    config: Config,
    log_q: np.ndarray | None = None,
    long: int | None = None,
) -> Batch:
    """The features of samples and their candidates, as NumPy arrays.

    A catalogue with signatures sends them in place of the content where the model needs nothing else of it.

    Args:
      dataset: the data.
      positions: [B] positions in the event log.
      rows: int32 [B, C] candidates; row 0 marks the absence of one.
      labels: float32 [B, C].
      config: of the model; gives the history lengths.
      log_q: float32 [B, C] of sampled candidates.
      long: places of the long history, where fewer than `config.long_length` hold all events of these users.
    """
    return Batch(
        users=dataset.user_features(positions, short=config.short_length, long=long or config.long_length),
        items=candidate_features(dataset, rows, config=config),
        labels=labels,
        where=rows > 0,
        log_q=log_q,
    )


def candidate_features(dataset: Dataset, rows: Any, *, config: Config) -> ItemFeatures:
    """Item features of catalogue rows of any shape, without the content embedding where the model does not read it."""
    features = dataset.catalogue.features(rows)
    needs_content = config.item_content or config.architecture == "exact"
    if not needs_content and features.signature is not None:
        features = dataclasses.replace(features, content=None)
    return features


def next_item_batches(
    dataset: Dataset,
    positions: Any,
    *,
    config: Config,
    sampler: NegativeSampler,
    batch_size: int,
    negatives: int,
    seed: int,
    epoch: int,
    start: int = 0,
    seen: Seen | None = None,
    drop_last: bool = True,
) -> Iterator[Batch]:
    """One epoch of the next-item task: the event's item against sampled ones, in an order fixed by (seed, epoch).

    Args:
      dataset: the data; with signatures where the config uses them.
      positions: of the samples.
      config: of the model.
      sampler: of negatives, from training counts.
      batch_size: B.
      negatives: n; C = 1 + n.
      seed, epoch: of order and negatives.
      start: the step to begin with, for resuming.
      seen: pairs that are no negatives.
      drop_last: leave out a last, smaller batch.

    Yields:
      Batch.
    """
    order = epoch_batches(positions, batch_size, seed=seed, epoch=epoch, drop_last=drop_last, start=start)
    for step, at in enumerate(order, start):
        rows, labels = lists(dataset, at, sampler=sampler, negatives=negatives, seed=seed, epoch=epoch, step=step, seen=seen)
        yield make_batch(dataset, at, rows, labels, config=config)
