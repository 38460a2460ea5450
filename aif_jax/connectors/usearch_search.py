"""`UsearchSearch`: an approximate search in this process by usearch (HNSW), which takes changes one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from aif_jax.checks import needs_extra
from aif_jax.connectors.retrieval import SearchResult, checked


class UsearchSearch:
    """Inner products by an HNSW graph.

    Args:
      ids: raw item ids [n], integers or strings.
      vectors: float32 [n, D].
      options: of `usearch.index.Index`, such as `connectivity`, `expansion_search`, `dtype`.

    Raises:
      ImportError: usearch is missing.
      TypeError, ValueError: as `BruteForce`.
    """

    def __init__(self, ids: Any, vectors: Any, **options: Any):
        with needs_extra("UsearchSearch needs usearch", "usearch"):
            from usearch.index import Index
        self.ids, vectors = checked(ids, vectors)
        settings: dict[str, Any] = {"dtype": "f32", **options}
        self._index = Index(ndim=vectors.shape[1], metric="ip", **settings)
        self._index.add(np.arange(len(vectors)), np.ascontiguousarray(vectors))

    def __call__(self, query: np.ndarray, k: int) -> SearchResult:
        """As `BruteForce`, approximately."""
        found: Any = self._index.search(np.asarray(query, np.float32), min(k, len(self.ids)))
        return SearchResult(self.ids[np.asarray(found.keys, np.int64)], 1 - np.asarray(found.distances, np.float32))
