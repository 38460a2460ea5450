"""What stands around the engine: feature sources, shared states, update streams, snapshot stores, retrieval.

Each kind of server has one file, which alone imports its client, and only when it is used.
"""

from aif_jax.neighbours.connect import open_stream
from aif_jax.neighbours.faiss_search import FaissSearch
from aif_jax.neighbours.fetch import Fetch
from aif_jax.neighbours.follow import Entry, Follower, IndexTarget, SinkTarget, Target, UserTarget
from aif_jax.neighbours.kafka import KafkaStream
from aif_jax.neighbours.messages import Change, MessageError, decode, encode, encode_deleted, tombstone_key
from aif_jax.neighbours.packing import EventLayout
from aif_jax.neighbours.parquet_features import ParquetFeatures
from aif_jax.neighbours.pgvector_search import PgvectorSearch
from aif_jax.neighbours.records import EventSink, FeatureSource, MemoryFeatures, Record
from aif_jax.neighbours.retrieval import BruteForce, Found, Retrieval, TwoTower, recall
from aif_jax.neighbours.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.neighbours.streams import MemoryStream, Message, StreamError, UpdateStream
from aif_jax.neighbours.usearch_search import UsearchSearch
from aif_jax.neighbours.valkey_features import ValkeyFeatures, ValkeyFeatureWriter
from aif_jax.neighbours.valkey_states import ValkeyStates
from aif_jax.neighbours.valkey_stream import ValkeyStream

__all__ = [
    "Record", "FeatureSource", "EventSink", "EventLayout", "MemoryFeatures", "ValkeyFeatures", "ValkeyFeatureWriter",
    "ParquetFeatures", "Fetch", "ValkeyStates",
    "UpdateStream", "Message", "StreamError", "MemoryStream", "KafkaStream", "ValkeyStream", "open_stream",
    "encode", "encode_deleted", "tombstone_key", "decode", "Change", "MessageError",
    "Follower", "Target", "Entry", "IndexTarget", "UserTarget", "SinkTarget",
    "SnapshotStore", "SnapshotError",
    "TwoTower", "Retrieval", "Found", "BruteForce", "FaissSearch", "UsearchSearch", "PgvectorSearch", "recall",
]  # fmt: skip
