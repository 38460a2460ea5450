"""Batches: features of one user and C candidates for each sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
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
    length: int | None = None,
) -> Batch:
    """The features of samples and their candidates, as NumPy arrays.

    Args:
      dataset: the data.
      positions: [B] positions in the event log.
      rows: int32 [B, C] candidates; row 0 marks the absence of one.
      labels: float32 [B, C].
      config: of the model; gives the length of the history, and whether content is read.
      log_q: float32 [B, C] of sampled candidates.
      length: places of the history, where fewer than `config.history_length` hold all events of these users.
    """
    return Batch(
        users=dataset.user_features(positions, length=length or config.history_length),
        items=dataset.catalogue.features(rows, content=config.reads_content),
        labels=labels,
        where=rows > 0,
        log_q=log_q,
    )
