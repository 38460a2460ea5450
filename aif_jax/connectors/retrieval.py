"""Retrieval with a two-tower model: the user's vector, a search among the items' vectors; the `retrieval` of an engine.

Searches for retrieval: Faiss and usearch in this process, pgvector in a PostgreSQL server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import check_encoding, expect, expect_array, expect_finite, needs_extra
from aif_jax.connectors.records import Fetch
from aif_jax.encoding.times import PER_SECOND
from aif_jax.encoding.vocabulary import as_ids, id_array
from aif_jax.features import empty_items
from aif_jax.index import ItemIndex
from aif_jax.serving.requests import Request
from aif_jax.serving.versions import check_version
from aif_jax.store.trained import Trained
from aif_jax.types import Params, UserFeatures

ROW_BLOCK = 1024  # rows of a brute-force table are a multiple of it, so that a few more items do not compile again
TOLERANCE = 1e-3  # of a logit against the dot product
TWO_TOWER = "a two-tower model, whose logit is a dot product"


class SearchResult(NamedTuple):
    """What a search found, best first.

    Attributes:
      ids, scores: raw item ids [k], and dot products float32 [k].
    """

    ids: np.ndarray
    scores: np.ndarray


class TwoTower:
    """Vectors whose dot product is the logit of a two-tower model but for a constant: of users for each request, of items from
    its index.

    Args:
      trained: from `presets.two_tower`, trained like any other model, with its encoder.

    Attributes:
      width: D of the vectors.

    Raises:
      ValueError: a model whose logit is not a dot product with the item's vector, or one without an encoder.
    """

    def __init__(self, trained: Trained):
        config = trained.config
        expect(not config.head and config.towers is not None, "model", TWO_TOWER, f"one with head={config.head}")
        self.encoder = trained.need_encoder("TwoTower").with_length(config.history_length)
        self.trained = trained.on_device()
        self.version, self.width = trained.version, config.width
        self._query = jax.jit(self._direction)
        self._check()

    def query(self, features: UserFeatures) -> np.ndarray:
        """float32 [D] of one user; EncodingMismatch for features that another encoder made."""
        check_encoding("UserFeatures", expected=self.encoder.version, got=features.encoding)
        return np.asarray(self._query(self.trained.params, dataclasses.replace(features, encoding="")))

    def vectors(self, index: ItemIndex, ids: Any = None) -> tuple[Any, np.ndarray]:
        """Raw ids [n] and vectors float32 [n, D] of items.

        Args:
          ids: raw ids; None takes all of an index whose ids are integers. Those that the index lacks are left out.

        Raises:
          VersionMismatch: an index of another model.
          ValueError: no ids for an index of strings, which it holds as hashes.
        """
        check_version(index, self.version)
        if ids is None:
            expect(index.kind != "strings", "ids", "the raw ids of an index of strings", None)
            stored, rows = index.stored(decoded=True)
            return stored, np.asarray(rows.vector, np.float32)
        raw = id_array(as_ids(ids, "ids"))
        rows, there = index.take(raw)
        return raw[there], np.asarray(rows.vector, np.float32)[there]

    def _direction(self, params: Params, features: UserFeatures) -> jax.Array:
        """The gradient of the logit with respect to the item's vector: of a dot product it is the other factor."""
        state = self.trained.model.user(params, features)
        return jax.grad(lambda vector: self._logits(params, state, vector[None])[0])(jnp.zeros(self.width))

    def _logits(self, params: Params, state: Any, vectors: jax.Array) -> jax.Array:
        """Logits [n] of items that have these vectors [n, D], and are nothing else."""
        model = self.trained.model
        one = jax.tree.map(lambda leaf: leaf[0], empty_items(model.config.schema, 1))
        from_item = jax.eval_shape(model.item, params, one)
        rows = jax.tree.map(lambda leaf: jnp.zeros((len(vectors), *leaf.shape), leaf.dtype), from_item)
        return model.interaction(params, state, dataclasses.replace(rows, vector=vectors))

    def _check(self) -> None:
        encode, rng = self.encoder, np.random.default_rng(0)
        moment = 1_600_000_000 * PER_SECOND[encode.columns.time_unit]
        features = dataclasses.replace(encode.user(None, None, moment), encoding="")
        vectors = rng.normal(size=(8, self.width)).astype(np.float32)
        try:
            rows = jnp.asarray(np.pad(vectors, ((1, 0), (0, 0))))
            scored = jax.jit(lambda params, user: self._logits(params, self.trained.model.user(params, user), rows))
            logits = np.asarray(scored(self.trained.params, features))
            logits = logits[1:] - logits[0]  # a constant of the user changes no order
            wanted = vectors @ np.asarray(self._query(self.trained.params, features))
            good = logits.shape == wanted.shape and np.abs(logits - wanted).max() <= TOLERANCE * (1 + np.abs(wanted).max())
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"model: expected {TWO_TOWER}, got another: {error}") from error
        blocks = [block.name for block in self.trained.config.blocks]
        expected, got = f"{TWO_TOWER} with the item's vector", f"blocks {blocks}; retrieve with presets.two_tower"
        expect(good, "model", expected, got)


class BruteForce:
    """The exact search: one dot product with every item and top-k, on the device.

    Args:
      ids: raw item ids [n], integers or strings.
      vectors: float32 [n, D].

    Raises:
      TypeError, ValueError: arrays that do not fit together, or are not finite.

    Example:
      >>> search = BruteForce([7, 8, 9], np.eye(3, dtype=np.float32))
      >>> search(np.array([0.1, 3.0, 2.0], np.float32), 2).ids.tolist()
      [8, 9]
    """

    def __init__(self, ids: Any, vectors: Any):
        self.ids, vectors = checked(ids, vectors)
        rows = -(-max(1, len(vectors)) // ROW_BLOCK) * ROW_BLOCK
        self._table = jax.device_put(np.pad(vectors, ((0, rows - len(vectors)), (0, 0))))
        self._count = jax.device_put(np.int32(len(vectors)))

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, query: np.ndarray, k: int) -> SearchResult:
        """The k items of the largest dot product with `query` float32 [D], best first; all where there are fewer."""
        k = min(k, len(self.ids))
        scores, places = _best(self._table, self._count, np.asarray(query, np.float32), k)
        return SearchResult(self.ids[np.asarray(places)], np.asarray(scores))


class Retrieval:
    """`retrieval(request)`: reads the user, computes their vector, searches; the ids go to the engine.

    The read is shared with the engine's own fetch of the same request (`Fetch.record`), so it is made once.

    Args:
      fetch: as the engine's `features`.
      tower: tower of the same vocabularies.
      search: `search(query, k) -> SearchResult`, async or not: `BruteForce`, `FaissSearch`, `UsearchSearch`, `PgvectorSearch`.
        It may be replaced between requests, such as by one over newer vectors.
      k: candidates.
    """

    def __init__(self, fetch: Fetch, tower: TwoTower, search: Callable[[np.ndarray, int], Any], *, k: int = 1000):
        expect(k >= 1, "k", "at least 1", k)
        self.search, self.k, self._fetch, self._tower = search, k, fetch, tower

    async def __call__(self, request: Request) -> np.ndarray:
        """Raw ids of the candidates [k]; raises what the source and the search raise."""
        features = await self._fetch.features(request, self._tower.encoder)
        found = await asyncio.to_thread(lambda: self.search(self._tower.query(features), self.k))
        return (await found if inspect.isawaitable(found) else found).ids


def recall(found: Any, exact: Any) -> float:
    """The share of the ids `exact` [k] that are among the ids `found` [k]: what an approximate search loses."""
    wanted = set(np.asarray(exact).tolist())
    return len(wanted & set(np.asarray(found).tolist())) / max(1, len(wanted))


def checked(ids: Any, vectors: Any) -> tuple[np.ndarray, np.ndarray]:
    """Raw ids [n] and finite vectors float32 [n, D] that fit together; raises TypeError, ValueError."""
    raw = id_array(as_ids(ids, "ids"))
    vectors = expect_array(vectors, "vectors", dtype=np.float32, shape=(len(raw), None))
    expect_finite(vectors, "vectors")
    return raw, vectors


@functools.partial(jax.jit, static_argnums=3)
def _best(table: jax.Array, count: jax.Array, query: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    scores = jnp.where(jnp.arange(len(table)) < count, table @ query, -jnp.inf)
    return jax.lax.top_k(scores, k)


class FaissSearch:
    """Inner products by an index of Faiss.

    Args:
      ids, vectors: see `BruteForce`.
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
            expect(hasattr(self._index, name), "parameters", f"those of {type(self._index).__name__}", repr(name))
            setattr(self._index, name, value)

    def __call__(self, query: np.ndarray, k: int) -> SearchResult:
        """As `BruteForce`; an approximate index may find fewer."""
        scores, places = self._index.search(np.asarray(query, np.float32)[None], min(k, len(self.ids)))
        there = places[0] >= 0
        return SearchResult(self.ids[places[0][there]], scores[0][there])


class UsearchSearch:
    """Inner products by an HNSW graph.

    Args:
      ids, vectors: see `BruteForce`.
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

    Raises:
      ValueError: a table name that PostgreSQL would not take.
    """

    def __init__(self, pool: Any, table: str):
        expect(NAME.fullmatch(table), "table", "a lower-case name of PostgreSQL", repr(table))
        self._pool, self._table = pool, table
        order = "vector <#> $1::text::vector"  # the negative inner product
        self._search = f"SELECT id, -({order}) AS score FROM {table} ORDER BY {order} LIMIT $2"

    async def load(self, ids: Any, vectors: Any, *, approximate: bool = False) -> None:
        """Writes all items into a new table and puts it in the place of the old one, in one transaction.

        Args:
          ids, vectors: see `BruteForce`.
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
