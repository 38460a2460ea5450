"""The nearline item index: rows of every item, made ahead of requests and updated item by item.

`ItemIndex` is an immutable snapshot; `build`, `upsert`, `delete`, `lookup` are its methods. Source: the N2O (nearline-to-
online) table of AIF (arXiv 2511.12934).
"""

from aif_jax.index.build import capacity_for
from aif_jax.index.files import Manifest, inspect, verify
from aif_jax.index.ids import string_ids
from aif_jax.index.item_index import ItemIndex
from aif_jax.index.lease import WriterConflict
from aif_jax.index.storage import STORAGES, Storage
from aif_jax.index.writer import IndexWriter, snapshots

__all__ = [
    "STORAGES",
    "IndexWriter",
    "ItemIndex",
    "Manifest",
    "Storage",
    "WriterConflict",
    "capacity_for",
    "inspect",
    "snapshots",
    "string_ids",
    "verify",
]
