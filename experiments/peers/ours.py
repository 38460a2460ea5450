"""A score file from a checkpoint of this package: any model, AIF or two-tower, that was trained on the study's data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import checkpoint
from aif_jax.data.dataset import Dataset
from aif_jax.train.evaluate import item_rows
from aif_jax.types import ItemRow, Params, UserFeatures
from experiments.peers.lists import Lists

BATCH = 8  # requests scored at a time


def checkpoint_scores(folder: Path, dataset: Dataset, lists: Lists, *, power: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores of the whole catalogue for every request, the staged way.

    Args:
      folder: what `checkpoint.save` wrote.
      dataset: that the lists are of.
      lists: one of its slices.
      power: the model's `sampler_power`, see `scores`: 0.75 for the study's default recipe, 0 for a model whose loss is
        corrected for the sampler.

    Returns:
      float32 [R, N], and what the score file says of the model.

    Raises:
      ValueError: a model of another schema than the data set's.
    """
    restored = checkpoint.load(folder)
    if restored.config.schema != dataset.schema:
        raise ValueError(f"{folder}: expected a model of the schema {dataset.schema}, got {restored.config.schema}")
    model = aif.build(restored.config)
    rows = item_rows(model, restored.params, dataset.catalogue, progress=False)
    size = min(BATCH, len(lists.position))
    made = np.empty((len(lists.position), len(dataset.catalogue)), np.float32)
    for start in range(0, len(made), size):
        at = np.resize(lists.position[start : start + size], size)  # one shape, compiled once
        features = dataset.user_features(at, length=model.config.history_length)
        found = np.asarray(_scores(restored.params, features, rows, model=model))
        made[start : start + size] = found[: len(made) - start]
    return made, {"sampler_power": power, "model_version": restored.version, "checkpoint": folder.name}


@partial(jax.jit, static_argnames="model")
def _scores(params: Params, features: UserFeatures, rows: ItemRow, *, model: aif.PreRanker) -> jax.Array:
    """Logits [B, N] of B users and all items."""
    states = jax.vmap(model.user, (None, 0))(params, features)
    return jax.vmap(model.interaction, (None, 0, None))(params, states, rows)
