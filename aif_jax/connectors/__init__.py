"""What stands around the engine: feature sources, update streams, snapshot stores.

Each kind of server has one file, which alone imports its client, and only when it is used.
"""

# ruff: noqa: I001

from aif_jax.connectors.follow import Follower, IndexTarget, SinkTarget, StreamEntry, Target
from aif_jax.connectors.kafka import KafkaStream
from aif_jax.connectors.records import (
    EventLayout, EventSink, FeatureSource, Fetch, MemoryFeatures, ParquetFeatures, Reads, Record,
)  # fmt: skip
from aif_jax.connectors.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.connectors.streams import (
    Change, MemoryStream, Message, MessageError, StreamError, UpdateStream, decode, encode, encode_deleted, tombstone_key,
)  # fmt: skip
from aif_jax.connectors.valkey import ValkeyFeatures, ValkeyFeatureWriter, ValkeyStream, open_stream

__all__ = [
    "Record", "FeatureSource", "EventSink", "EventLayout", "MemoryFeatures", "ValkeyFeatures", "ValkeyFeatureWriter",
    "ParquetFeatures", "Fetch", "Reads",
    "UpdateStream", "Message", "StreamError", "MemoryStream", "KafkaStream", "ValkeyStream", "open_stream",
    "encode", "encode_deleted", "tombstone_key", "decode", "Change", "MessageError",
    "Follower", "Target", "StreamEntry", "IndexTarget", "SinkTarget",
    "SnapshotStore", "SnapshotError",
]  # fmt: skip
