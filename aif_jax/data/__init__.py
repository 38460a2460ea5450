"""From a data set to batches: the event log, splits, samples, candidates, the pipeline of a training run."""

# ruff: noqa: I001

from aif_jax.data.candidates import (
    CandidateLists, CandidateSource, NegativeSampler, SampleKey, SeenPairs, impressions, item_counts, logged,
    pointwise_candidates, retrieved, sampled_negatives, staged,
)  # fmt: skip
from aif_jax.data.cascade import STAGES, Cascade
from aif_jax.data.dataset import CorruptRecord, Dataset
from aif_jax.data.events import EventLog, write_log
from aif_jax.data.pipeline import Batch, Pipeline, PrefetchedBatch, make_batch, to_device
from aif_jax.data.split import (
    Split, cuts_of_samples, eligible, eligible_positions, request_starts, split_by_time, time_cuts,
)  # fmt: skip
from aif_jax.encoding import hashing

__all__ = [
    "Dataset", "EventLog", "write_log", "CorruptRecord", "hashing",
    "Split", "split_by_time", "time_cuts", "cuts_of_samples", "eligible", "eligible_positions", "request_starts",
    "NegativeSampler", "SeenPairs", "item_counts",
    "CandidateSource", "CandidateLists", "SampleKey", "pointwise_candidates", "sampled_negatives", "impressions", "retrieved",
    "Cascade", "STAGES", "logged", "staged",
    "Pipeline", "PrefetchedBatch", "Batch", "make_batch", "to_device",
]  # fmt: skip
