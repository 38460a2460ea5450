"""What stands around the engine: feature sources, shared states, update streams, snapshot stores, retrieval.

Each kind of server has one file, which alone imports its client, and only when it is used.
"""

from aif_jax.neighbours.fetch import Fetch
from aif_jax.neighbours.packing import EventLayout
from aif_jax.neighbours.parquet_features import ParquetFeatures
from aif_jax.neighbours.records import EventSink, FeatureSource, MemoryFeatures, Record
from aif_jax.neighbours.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.neighbours.valkey_features import ValkeyFeatures, ValkeyFeatureWriter

__all__ = [
    "Record", "FeatureSource", "EventSink", "EventLayout", "MemoryFeatures", "ValkeyFeatures", "ValkeyFeatureWriter",
    "ParquetFeatures", "Fetch",
    "SnapshotStore", "SnapshotError",
]  # fmt: skip
