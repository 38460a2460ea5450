"""`FaissSearch`: a search in this process by Faiss, exact or approximate."""

from __future__ import annotations

from typing import Any

import numpy as np

from aif_jax.checks import needs_extra
from aif_jax.connectors.retrieval import SearchResult, checked


class FaissSearch:
    """Inner products by an index of Faiss.

    Args:
      ids: raw item ids [n], integers or strings.
      vectors: float32 [n, D].
      factory: of the index, as `faiss.index_factory` takes it: "Flat" is exact, "HNSW32" or "IVF256,Flat" are not.
      parameters: set on the index, such as {"nprobe": 16}.

    Raises:
      ImportError: Faiss is missing.
      TypeError, ValueError: as `BruteForce`; an unknown parameter.
    """

    def __init__(self, ids: Any, vectors: Any, *, factory: str = "Flat", parameters: dict[str, Any] | None = None):
        with needs_extra("FaissSearch needs Faiss", "faiss"):
            import faiss
        self.ids, vectors = checked(ids, vectors)
        vectors = np.ascontiguousarray(vectors)
        self._index: Any = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        self._index.train(vectors)
        self._index.add(vectors)
        for name, value in (parameters or {}).items():
            if not hasattr(self._index, name):
                raise ValueError(f"parameters: expected those of {type(self._index).__name__}, got {name!r}")
            setattr(self._index, name, value)

    def __call__(self, query: np.ndarray, k: int) -> SearchResult:
        """As `BruteForce`; an approximate index may find fewer."""
        scores, places = self._index.search(np.asarray(query, np.float32)[None], min(k, len(self.ids)))
        there = places[0] >= 0
        return SearchResult(self.ids[places[0][there]], scores[0][there])
