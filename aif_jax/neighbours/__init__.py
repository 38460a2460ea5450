"""What stands around the engine: feature sources, shared states, update streams, snapshot stores, retrieval.

Each kind of server has one file, which alone imports its client, and only when it is used.
"""

from aif_jax.neighbours.snapshot_store import SnapshotError, SnapshotStore

__all__ = ["SnapshotStore", "SnapshotError"]
