"""`PgvectorSearch`: vectors in PostgreSQL with pgvector, searched by asyncpg; the remote one, shared by replicas."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.retrieval import SearchResult, checked

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
