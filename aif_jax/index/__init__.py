"""The nearline item index: rows of every item, made ahead of requests and updated item by item.

`ItemIndex` is an immutable snapshot; `build`, `upsert`, `delete`, `lookup` are its methods. Source: the N2O (nearline-to-
online) table of AIF (arXiv 2511.12934).
"""

from aif_jax.index.files import Manifest, inspect, load, save, verify
from aif_jax.index.idmap import string_ids
from aif_jax.index.item_index import ItemIndex, capacity_for
from aif_jax.index.storage import STORAGES, Storage
from aif_jax.index.writer import IndexWriter, Update, snapshots

__all__ = [
    "STORAGES",
    "IndexWriter",
    "ItemIndex",
    "Manifest",
    "Storage",
    "Update",
    "capacity_for",
    "inspect",
    "load",
    "save",
    "snapshots",
    "string_ids",
    "verify",
]
