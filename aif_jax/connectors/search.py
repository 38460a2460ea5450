"""Searches for retrieval: Faiss and usearch in this process, pgvector in a PostgreSQL server."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from aif_jax.checks import expect, needs_extra
from aif_jax.connectors.retrieval import SearchResult, checked


class FaissSearch:
    """Inner products by an index of Faiss.

    Args:
      ids: raw item ids [n], integers or strings.
      vectors: float32 [n, D].
      factory: factory of the index, as `faiss.index_factory` takes it: "Flat" is exact, "HNSW32" or "IVF256,Flat" are not.
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


class UsearchSearch:
    """Inner products by an HNSW graph.

    Args:
      ids: raw item ids [n], integers or strings.
      vectors: float32 [n, D].
      options: keyword arguments of `usearch.index.Index`, such as `connectivity`, `expansion_search`, `dtype`.

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


NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


class PgvectorSearch:
    """Inner products over a table of ids and vectors; `load` writes it.

    Args:
      pool: from `asyncpg.create_pool`, with the timeouts that suit you. Its errors come through.
      table: name of the table.

    Raises:
      ValueError: a name that is none.
    """

    def __init__(self, pool: Any, table: str):
        expect(NAME.fullmatch(table), "table", "a lower-case name of PostgreSQL", repr(table))
        self._pool, self._table = pool, table
        order = "vector <#> $1::text::vector"  # the negative inner product
        self._search = f"SELECT id, -({order}) AS score FROM {table} ORDER BY {order} LIMIT $2"

    async def load(self, ids: Any, vectors: Any, *, approximate: bool = False) -> None:
        """Writes all items into a new table and puts it in the place of the old one, in one transaction.

        Args:
          ids: raw item ids [n], integers or strings.
          vectors: float32 [n, D].
          approximate: with an HNSW index; without, a search reads all vectors and is exact.

        Raises TypeError, ValueError as `BruteForce`.
        """
        raw, vectors = checked(ids, vectors)
        kind, new = "bigint" if raw.dtype.kind == "i" else "text", f"{self._table[:57]}_new"
        rows = zip(raw.tolist(), map(_text, vectors), strict=True)
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            await connection.execute(f"DROP TABLE IF EXISTS {new}")
            await connection.execute(f"CREATE TABLE {new} (id {kind} PRIMARY KEY, vector vector({vectors.shape[1]}) NOT NULL)")
            await connection.executemany(f"INSERT INTO {new} VALUES ($1, $2::text::vector)", rows)
            if approximate:
                await connection.execute(f"CREATE INDEX ON {new} USING hnsw (vector vector_ip_ops)")
            await connection.execute(f"DROP TABLE IF EXISTS {self._table}")
            await connection.execute(f"ALTER TABLE {new} RENAME TO {self._table}")

    async def __call__(self, query: np.ndarray, k: int) -> SearchResult:
        """As `BruteForce`."""
        found = await self._pool.fetch(self._search, _text(np.asarray(query, np.float32)), k)
        ids = [row["id"] for row in found]
        scores = np.array([row["score"] for row in found], np.float32)
        return SearchResult(np.array(ids) if ids else np.zeros(0, np.int64), scores)


def _text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it, to the last bit of float32."""
    return "[" + ",".join(f"{value:.9g}" for value in vector.tolist()) + "]"
