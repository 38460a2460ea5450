"""The nearline index: how fast it is built, what an update costs, how soon a change is seen.

Claim     A rebuild runs at the rate of the bare item function (at least 0.85 of it); an update of 1,000 items costs the same at
          10^4 and at 10^7 rows (at most 2x); 10,000 ids are found among 10^7 in about a millisecond; with 1,000 changes a
          second a change is seen within a second (p99).
Command   python -m experiments.index_refresh --json index_refresh.json      (or --smoke; --help lists all)
Time      2 minutes on 2 CPU cores (6 GB of memory in all)
Method    interleaved round by round in one process, compilation left out. Items are drawn at random; 64 batches come again and
          again, under new ids; rows are stored in bfloat16. Update: `upsert` until the table has them. Freshness: from the
          moment when an item changes (1,000 a second, spread evenly) to the end of the first request that started after the
          engine took the snapshot with it; changes are applied every --interval seconds. Requests: `AsyncPreRanker.rank` over
          1,000 candidates, one at a time. Model: `presets.aif`; weights as initialised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax.index import STORAGES, ItemIndex, Storage, capacity_for
from aif_jax.serving import AsyncPreRanker, ServingConfig
from experiments import common, drawn

CHANGES = 1000
LOOKED_UP = 10_000
CANDIDATES = 1000
BATCH = 1024
VOCABULARY = 100_000


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run the study and print its figures."""
    settings = {
        "sizes": ([10**4, 10**5, 10**6, 10**7], [2000, 8000], "catalogue sizes"),
        "rounds": (21, 3, "rounds of each measurement"),
        "build_items": (200 * BATCH, 4 * BATCH, "items of one timed build"),
        "serving_items": (10**6, 4000, "catalogue size under requests"),
        "history": (512, 64, "long history of the users"),
        "seconds": (30.0, 0.5, "of requests under updates, after one tenth that does not count"),
        "interval": (0.5, 0.2, "seconds between two updates of the index"),
        "pause": (0.005, None, "seconds between two requests"),
    }
    options = common.options(__doc__, arguments, settings)
    world = World(options.history)
    figures: dict[str, Any] = build_rate(world, items=options.build_items, rounds=options.rounds)
    figures["bytes_per_row"] = {name: world.build(BATCH, storage=name).bytes_per_row for name in STORAGES}
    figures |= costs_by_size(world, sizes=options.sizes, rounds=options.rounds)
    figures |= asyncio.run(freshness(world, options))
    common.report(figures, options.json)


class World:
    """A model and 64 batches of items that stand in for a catalogue of any size."""

    def __init__(self, history: int):
        sizes = {"item": VOCABULARY, "category": 500, "brand": 5000}
        attributes = tuple(aif.Attribute(name=name, size=size) for name, size in sizes.items())
        schema = aif.Schema(item_attributes=attributes, actions=4, item_floats=4, content=64, side=("bid",))
        self.model = aif.build(aif.presets.aif(schema, long_length=history))
        self.params = jax.device_put(self.model.init(jax.random.key(0), drawn.catalogue(schema)))
        self.trained = aif.Trained(self.model, self.params)
        self.batches = [drawn.items(schema, (BATCH,), seed=number) for number in range(64)]

    def catalogue(self, count: int) -> Iterator[tuple[np.ndarray, aif.ItemFeatures]]:
        """Yield `count` items in batches, under ids all over int64."""
        for number, start in enumerate(range(0, count, BATCH)):
            size = min(BATCH, count - start)
            features = self.batches[number % len(self.batches)]
            yield ids_of(np.arange(start, start + size)), features if size == BATCH else first(features, size)

    def build(self, count: int, *, storage: Storage = "float32", progress: bool = False) -> ItemIndex:
        """Return an index of `count` items."""
        sizes: dict[str, Any] = dict(capacity=capacity_for(count), batch_size=BATCH)
        return ItemIndex.build(self.trained, self.catalogue(count), storage=storage, progress=progress, **sizes)


def ids_of(numbers: np.ndarray) -> np.ndarray:
    """Return distinct int64 ids for 0, 1, 2, ...: a product with an odd number, modulo 2^64."""
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def first(features: aif.ItemFeatures, count: int) -> aif.ItemFeatures:
    """Return the first items of a batch."""
    return jax.tree.map(lambda leaf: leaf[:count], features)


def await_table(index: ItemIndex) -> None:
    """Wait until the table of an index has all rows."""
    with index.reading() as table:
        jax.block_until_ready(table)


def build_rate(world: World, *, items: int, rounds: int) -> dict[str, Any]:
    """Return items a second of a rebuild, and of the bare item function on the same batches, fed without a pause."""
    bare = jax.jit(jax.vmap(world.model.item, (None, 0)))

    def run_bare(_: int) -> float:
        return common.milliseconds(lambda: [bare(world.params, features) for _, features in world.catalogue(items)])

    def run_build(_: int) -> float:
        return common.milliseconds(lambda: await_table(world.build(items, storage="bfloat16")))

    arms = {"bare": run_bare, "build": run_build}
    common.interleaved(arms, 1)
    times = common.interleaved(arms, rounds)
    rate = {f"{name}_items_per_s": items / (np.median(t) / 1e3) for name, t in times.items()}
    return rate | {"build_over_bare": float(np.median(times["bare"] / times["build"]))}


def costs_by_size(world: World, *, sizes: list[int], rounds: int) -> dict[str, Any]:
    """Return update and look-up time by catalogue size, all sizes in turn."""
    held = {size: world.build(size, storage="bfloat16", progress=size > 10**6) for size in sizes}
    rng = np.random.default_rng(1)

    def update(size: int) -> float:
        ids, features = ids_of(rng.choice(size, CHANGES, replace=False)), first(world.batches[rng.integers(64)], CHANGES)
        start = time.perf_counter()
        held[size] = held[size].upsert(ids, features)
        await_table(held[size])
        return (time.perf_counter() - start) * 1e3

    def look_up(size: int) -> float:
        ids = ids_of(rng.integers(0, size * 10 // 9, LOOKED_UP))  # a tenth unknown
        return common.milliseconds(lambda: held[size].lookup(ids))

    work = {f"upsert {size}": lambda _, size=size: update(size) for size in sizes}
    work |= {f"lookup {size}": lambda _, size=size: look_up(size) for size in sizes}
    common.interleaved(work, 2)
    times = common.interleaved(work, 3 * rounds)
    medians = {key: float(np.median(t)) for key, t in times.items()}
    upserts = {str(size): medians[f"upsert {size}"] for size in sizes}
    return {
        "upsert_1000_ms": upserts,
        "upsert_largest_over_smallest": upserts[str(max(sizes))] / upserts[str(min(sizes))],
        "lookup_10k_ms": {str(size): medians[f"lookup {size}"] for size in sizes},
    }


async def freshness(world: World, options: Any) -> dict[str, Any]:
    """Return requests one after another under a stream of changes."""
    index = world.build(options.serving_items, storage="bfloat16")
    config = world.model.config
    users: dict[Any, Any] = {number: drawn.users(config.schema, config.history_length, seed=number) for number in range(16)}
    rng = np.random.default_rng(2)
    candidates = [ids_of(rng.choice(options.serving_items, CANDIDATES, replace=False)) for _ in range(64)]
    engine = AsyncPreRanker(
        world.trained,
        index,
        features=lambda request: users[request.user],
        retrieval=lambda request: candidates[rng.integers(64)],
        config=ServingConfig(buckets=(CANDIDATES,), cache_bytes=0),
    )
    fresh: list[float] = []
    waiting: list[tuple[float, np.ndarray]] = []  # (when the engine took a snapshot, when its items had changed)

    async def requests(until: float) -> None:
        while (start := time.perf_counter()) < until:
            await engine.rank(int(rng.integers(16)), 100)
            end = time.perf_counter()
            for _, changed in (entry for entry in waiting if entry[0] <= start):
                fresh.extend((end - changed) * 1e3)
            waiting[:] = [entry for entry in waiting if entry[0] > start]
            await asyncio.sleep(options.pause)

    async def updates(until: float) -> None:
        nonlocal index
        done = time.perf_counter()
        while (due := done + options.interval) < until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            now = time.perf_counter()
            changed = np.arange(done, now, 1 / CHANGES)
            ids = ids_of(rng.choice(options.serving_items, len(changed), replace=False))
            pool = [first(world.batches[rng.integers(64)], min(BATCH, len(ids) - i)) for i in range(0, len(ids), BATCH)]
            features = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pool)
            index = await asyncio.to_thread(index.upsert, ids, features)
            await engine.update_index(index)
            waiting.append((time.perf_counter(), changed))
            done = now

    async with engine:
        for seconds in (0.1 * options.seconds + options.interval, options.seconds + options.interval):
            fresh.clear()  # of the warm-up
            until = time.perf_counter() + seconds
            await asyncio.gather(requests(until), updates(until))
            waiting.clear()
    return {f"freshness_p{p}_ms": float(np.percentile(fresh, p)) for p in (50, 99)}


if __name__ == "__main__":
    main()
