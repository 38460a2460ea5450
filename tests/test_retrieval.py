"""Retrieval: the vectors of a two-tower model, the same best items by every search, candidates for an engine."""

from __future__ import annotations

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checks import EncodingMismatch, VersionMismatch
from aif_jax.connectors import (
    BruteForce,
    EventLayout,
    FaissSearch,
    Fetch,
    MemoryFeatures,
    PgvectorSearch,
    Retrieval,
    TwoTower,
    UsearchSearch,
    recall,
)
from aif_jax.index import ItemIndex
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig
from tests import demo, servers
from tests.test_user_table import ARRIVAL, DATA, ENCODER, raw

pytestmark = pytest.mark.usefixtures("light_compilation")
MODEL = aif.build(aif.presets.two_tower(DATA.schema, width=16, towers=(16,), short_length=12))
PARAMS = demo.init(MODEL, items=DATA.catalogue)
NOW = int(DATA.log.time.max()) + 100
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(2000, 16)).astype(np.float32)
QUERIES = RNG.normal(size=(8, 16)).astype(np.float32)
IDS = {"integers": np.arange(2000) * 7 + 5, "strings": [f"sku-{n}" for n in range(2000)]}


@pytest.fixture(scope="module")
def tower():
    return TwoTower(aif.Trained(MODEL, PARAMS, ENCODER))


@pytest.fixture(scope="module")
def index():
    return ItemIndex.build(aif.Trained(MODEL, PARAMS, ENCODER), DATA.catalogue, batch_size=64, progress=False)


def features(user: int):
    return ENCODER.with_length(12).user(None, raw(ARRIVAL[DATA.log.user[ARRIVAL] == user]), NOW)


def best(query: np.ndarray, k: int, kind: str) -> list:
    """The reference: all products, sorted."""
    return np.asarray(IDS[kind])[np.argsort(-(VECTORS @ query), kind="stable")[:k]].tolist()


def test_the_dot_product_is_the_logit(tower, index):
    ids, vectors = tower.vectors(index)
    rows = DATA.catalogue.features(np.searchsorted(DATA.items.raw, ids) + 1)
    for user in (1, 5):
        found = features(user)
        logits = jax.jit(MODEL.joint)(PARAMS, dataclasses.replace(found, encoding=""), rows)
        products = vectors @ tower.query(found)
        np.testing.assert_allclose(products - products[0], logits - logits[0], rtol=1e-4, atol=1e-5)
    some, part = tower.vectors(index, [*ids[:3].tolist(), 10**9])
    np.testing.assert_array_equal(some, ids[:3])
    np.testing.assert_array_equal(part, vectors[:3])


def test_another_model_is_refused(tower, index):
    for preset in (aif.presets.aif, aif.presets.cold):
        with pytest.raises(ValueError, match="model: expected a two-tower model"):
            TwoTower(aif.Trained(aif.build(preset(DATA.schema)), {}, ENCODER))
    crooked = MODEL._replace(interaction=lambda params, state, rows: (rows.vector**2).sum(-1))
    with pytest.raises(ValueError, match="model: expected a two-tower model"):
        TwoTower(aif.Trained(crooked, PARAMS, ENCODER))
    trained = {group: part for group, part in PARAMS.items() if group != "fitted"}
    other = jax.tree.map(lambda leaf: leaf * 1.5, trained) | {"fitted": PARAMS["fitted"]}
    newer = TwoTower(aif.Trained(MODEL, other, ENCODER))
    with pytest.raises(VersionMismatch):
        newer.vectors(index)
    with pytest.raises(EncodingMismatch):
        tower.query(dataclasses.replace(features(1), encoding="x"))


@pytest.mark.parametrize("kind", IDS)
def test_exact_searches_find_the_best(kind):
    pytest.importorskip("faiss", reason="needs the extra 'faiss'")
    for search in (BruteForce(IDS[kind], VECTORS), FaissSearch(IDS[kind], VECTORS)):
        for query in QUERIES:
            found = search(query, 100)
            assert found.ids.tolist() == best(query, 100, kind)
            np.testing.assert_allclose(found.scores, np.sort(VECTORS @ query)[::-1][:100], rtol=1e-5)
        assert len(search(QUERIES[0], 5000).ids) == 2000


def test_approximate_searches_find_nearly_the_best():
    pytest.importorskip("faiss", reason="needs the extra 'faiss'")
    pytest.importorskip("usearch", reason="needs the extra 'usearch'")
    searches = {
        "hnsw": FaissSearch(IDS["integers"], VECTORS, factory="HNSW16", parameters={}),
        "ivf": FaissSearch(IDS["integers"], VECTORS, factory="IVF16,Flat", parameters={"nprobe": 8}),
        "usearch": UsearchSearch(IDS["integers"], VECTORS),
    }
    for name, search in searches.items():
        shares = [recall(search(query, 100).ids, best(query, 100, "integers")) for query in QUERIES]
        assert np.mean(shares) > 0.7, (name, shares)
        found = search(QUERIES[0], 10)
        place = np.searchsorted(IDS["integers"], found.ids)
        np.testing.assert_allclose(found.scores, VECTORS[place] @ QUERIES[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="parameters: expected those of IndexFlat, got 'probes'"):
        FaissSearch(IDS["integers"], VECTORS, parameters={"probes": 3})


@pytest.mark.parametrize("kind", IDS)
def test_pgvector_finds_the_best(kind):
    asyncpg = pytest.importorskip("asyncpg", reason="needs the extra 'pgvector'")

    async def test(url: str) -> None:
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
            search = PgvectorSearch(pool, "items")
            await search.load(IDS[kind][:50], VECTORS[:50])
            await search.load(IDS[kind], VECTORS)  # in the place of the old table
            for query in QUERIES[:3]:
                found = await search(query, 100)
                assert found.ids.tolist() == best(query, 100, kind)
                np.testing.assert_allclose(found.scores, np.sort(VECTORS @ query)[::-1][:100], rtol=1e-5)
            await search.load(IDS[kind][:300], VECTORS[:300], approximate=True)
            exact = BruteForce(IDS[kind][:300], VECTORS[:300])
            assert recall((await search(QUERIES[0], 20)).ids, exact(QUERIES[0], 20).ids) > 0.5

    with servers.postgres() as url:
        asyncio.run(asyncio.wait_for(test(url), 60))


async def test_an_engine_ranks_what_retrieval_finds(tower, index):
    """One read of the source serves the engine's features and the retrieval."""
    source = MemoryFeatures(EventLayout.of(ENCODER))
    source.update(raw(ARRIVAL))
    reads = []

    class Counted:
        async def get(self, user):
            reads.append(user)
            await asyncio.sleep(0.01)
            return await source.get(user)

    fetch = Fetch(Counted(), ENCODER.with_length(12), now=lambda request: NOW)
    search = BruteForce(*tower.vectors(index))
    retrieval = Retrieval(fetch, tower, search, k=20)
    config = ServingConfig(buckets=(64,), max_k=8)
    async with AsyncPreRanker(
        aif.Trained(MODEL, PARAMS, ENCODER), index, features=fetch, retrieval=retrieval, config=config
    ) as engine:
        ranking = await engine.rank(Request(user=3), 8)
        assert reads == [3] and ranking.candidates == 20 and not ranking.degraded
        # the same model retrieves and ranks: its best are the first ones found
        assert ranking.ids.tolist() == search(tower.query(features(3)), 8).ids.tolist()
        unknown = await engine.rank(Request(user="nobody"), 8)
        assert unknown.mask.all()
