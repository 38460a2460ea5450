"""The nearline item index: rows of every item, made ahead of requests and updated item by item; the N2O table of AIF."""

from aif_jax.index.build import capacity_for
from aif_jax.index.item_index import ItemIndex, Manifest, inspect, verify
from aif_jax.index.writer import IndexWriter, WriterConflict, snapshots
from aif_jax.store.codec import STORAGES, Storage

__all__ = [
    "ItemIndex", "IndexWriter", "WriterConflict", "snapshots", "capacity_for",
    "Storage", "STORAGES", "Manifest", "inspect", "verify",
]  # fmt: skip
