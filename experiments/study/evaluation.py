"""Held-out requests of the study, and the scores of their sampled candidates.

A request is an event of the held-out slice whose user has at least MIN_HISTORY strictly earlier events. Its sampled candidates
are the event's item and items drawn by training popularity ** 0.75, the same for every model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import aif_jax as aif
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


def earlier(dataset: Dataset, positions: np.ndarray) -> np.ndarray:
    """How many strictly earlier events the user of each position has, int64 [R]."""
    return dataset.log.history_end(positions) - dataset.log.offsets[dataset.log.user[positions]]
