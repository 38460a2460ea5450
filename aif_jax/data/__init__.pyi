"""Public names of `aif_jax.data` and the modules that they come from; `__init__.py` reads this file."""

# ruff: noqa: I001

from .candidates import CandidateLists, CandidateSource, impressions, logged, retrieved, sampled_negatives
from .cascade import STAGES, Cascade
from .dataset import Dataset
from .events import EventLog
from .negatives import NegativeSampler, SeenPairs, item_counts
from .order import BatchKey
from .pipeline import Batch, Pipeline, PrefetchedBatch, make_batch, to_device
from .split import Split, sample_positions, split_by_time, time_cuts

__all__ = [
    "Dataset", "EventLog",
    "Split", "split_by_time", "time_cuts", "sample_positions",
    "NegativeSampler", "SeenPairs", "item_counts",
    "CandidateSource", "CandidateLists", "BatchKey", "sampled_negatives", "impressions", "retrieved",
    "Cascade", "STAGES", "logged",
    "Pipeline", "PrefetchedBatch", "Batch", "make_batch", "to_device",
]  # fmt: skip
