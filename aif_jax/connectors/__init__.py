"""What stands around the engine: feature sources, update streams, snapshot stores.

Each kind of server has one file, which alone imports its client, and only when it is used.
"""

# ruff: noqa: I001

from aif_jax.connectors.features import FeatureSource, Fetch, Record
from aif_jax.connectors.follow import Follower
from aif_jax.connectors.kafka import KafkaStream
from aif_jax.connectors.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.connectors.streams import Message, StreamError, decode, encode, tombstone_key
from aif_jax.connectors.valkey import ValkeyFeatures

__all__ = [
    "Record", "FeatureSource", "ValkeyFeatures", "Fetch",
    "Message", "StreamError", "KafkaStream",
    "encode", "tombstone_key", "decode",
    "Follower", "SnapshotStore", "SnapshotError",
]  # fmt: skip
