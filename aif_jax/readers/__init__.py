"""Your Parquet, CSV and TSV files: `read` makes a `Dataset` of them, `check` lists what is wrong, `read_items` feeds an index.

Needs the `data` extra (Apache Arrow).
"""

from aif_jax.readers.cascade import read_candidates, read_cascade
from aif_jax.readers.check import Report, check
from aif_jax.readers.read import encode_items, read, read_items
from aif_jax.readers.tables import Problem

__all__ = ["Problem", "Report", "check", "encode_items", "read", "read_candidates", "read_cascade", "read_items"]
