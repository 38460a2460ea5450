"""What a delta costs to publish, and whether an engine under load fails or mixes versions; a part of `experiments.refresh`.

A model of the size of the study's with a large catalogue serves while callers score, each waiting for its answer. Twenty times
a thousand item rows move: the delta is made (index rows by the item function), saved and synced to disk, read back with its
checksums, applied, and published to the engine. An answer is mixed unless it is what `joint` says under the parameters of its
version.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax.export import Delta, MovedRows
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.store.trained import Trained

MOVED, PUBLISHES, CALLERS, CANDIDATES = 1000, 20, 4, 200
NOW = 1_700_100_000
PARTS = ("make", "save", "load", "apply", "publish")


def world(items: int) -> tuple[aif.Dataset, Trained]:
    """A catalogue and an untrained model of it: a publish costs the same."""
    rng, users = np.random.default_rng(0), 500
    ids = np.arange(items)
    events = {"user": rng.integers(0, users, 4000), "item": rng.integers(0, items, 4000), "time": NOW - 1 - np.arange(4000)}
    data = aif.read(events, items={"item": ids, "category": ids % 20}, columns=aif.Columns(), progress=False)
    model = aif.build(aif.presets.aif(data.schema, width=16, long_length=64))
    return data, Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder)


def measured(*, items: int, moved: int = MOVED) -> dict[str, Any]:
    """Times of twenty publishes without and with load, and what the callers met."""
    data, base = world(items)
    index = aif.ItemIndex.build(base, data.catalogue, progress=False)
    return asyncio.run(_publishes(data, base, index, moved))


async def _publishes(data: aif.Dataset, base: Trained, index: aif.ItemIndex, moved: int) -> dict[str, Any]:
    rng, encode = np.random.default_rng(1), data.encoder.with_length(base.config.history_length)  # type: ignore[union-attr]
    raw = data.items.raw
    times = [NOW - 60 - n for n in range(20)]
    features = {
        user: encode.user({"user": user}, {"item": rng.choice(raw, 20).tolist(), "time": times}, NOW) for user in range(CALLERS)
    }
    asked = {user: rng.choice(raw, CANDIDATES, replace=False) for user in range(CALLERS)}
    joint, params = jax.jit(base.model.joint), {base.version: base.params}
    answers: list[tuple[int, Any]] = []
    failed = 0

    async def call(engine: AsyncPreRanker, user: int, stop: asyncio.Event) -> None:
        nonlocal failed
        while not stop.is_set():
            try:
                answers.append((user, await engine.score(user, asked[user])))
            except Exception as error:  # whatever it is, the caller has no answer
                failed += 1
                print(f"failed: {type(error).__name__}: {error}")

    config = ServingConfig(buckets=(256,), max_k=8)
    engine = AsyncPreRanker(base, index, features=lambda request: features[request.user], config=config)
    spent: dict[str, list[dict[str, float]]] = {}
    async with engine:
        applied: Any = (base, index)
        for load in ("warm-up", "idle", "load"):
            stop = asyncio.Event()
            calls = [asyncio.create_task(call(engine, user, stop)) for user in range(CALLERS) if load == "load"]
            spent[load] = []
            for _ in range(2 if load == "warm-up" else PUBLISHES):
                seen = len(answers)
                table = np.asarray(applied[0].params["embedding"]["item"])
                at = np.sort(1 + rng.choice(len(table) - 1, moved, replace=False)).astype(np.int32)
                rows = {"item": MovedRows(at, table[at] + rng.normal(0, 0.1, table[at].shape).astype(np.float32))}
                row, applied = await asyncio.to_thread(_publish, applied, rows, data)
                began, cpu = time.perf_counter(), time.process_time()
                await engine.publish(*applied)
                row |= {"publish": time.perf_counter() - began, "publish cpu": time.process_time() - cpu}
                spent[load].append(row)
                params[applied[0].version] = applied[0].params
                while load == "load" and len(answers) < seen + 2 * CALLERS and not failed:
                    await asyncio.sleep(0.001)
            stop.set()
            await asyncio.gather(*calls)
    rows_of = {user: data.catalogue.features(data.items.encode(asked[user])) for user in asked}
    wanted: dict[tuple[str, int], np.ndarray] = {}
    mixed = 0
    for user, answer in answers:
        key = answer.version, user
        if key not in wanted:
            wanted[key] = np.asarray(joint(params[answer.version], features[user], rows_of[user]))
        mixed += bool(answer.degraded or np.abs(wanted[key] - answer.logits).max() > 1e-4)
    size = moved / 1000

    def median(load: str, *names: str) -> float:
        return 1000 * float(np.median([sum(row[name] for name in names) for row in spent[load]])) / size

    return {
        "items": len(raw), "moved_items": moved, "publishes": PUBLISHES,
        "delta_publish_ms_per_1000_items": median("idle", *PARTS),
        "delta_publish_cpu_ms_per_1000_items": median("idle", *(f"{part} cpu" for part in PARTS)),
        "delta_publish_ms_per_1000_items_under_load": median("load", *PARTS),
        "ms_by_part": {part: median("idle", part) for part in PARTS},
        "table_bytes": int(np.asarray(base.params["embedding"]["item"]).nbytes),
        "publish_answers": len(answers), "publish_versions_answered": len({answer.version for _, answer in answers}),
        "publish_failed": failed, "publish_mixed": mixed,
    }  # fmt: skip


def _publish(before: tuple[Trained, aif.ItemIndex], rows: Any, data: aif.Dataset) -> tuple[dict[str, float], Any]:
    """The delta from rows to what the engine takes, through a folder; seconds of each part."""
    spent: dict[str, float] = {}

    def timed(name: str, run: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        made = jax.block_until_ready(run())
        spent[name], spent[f"{name} cpu"] = time.perf_counter() - began, time.process_time() - cpu
        return made

    with tempfile.TemporaryDirectory() as folder:
        delta = timed("make", lambda: Delta.make(before[0], rows, data.catalogue))
        timed("save", lambda: delta.save(Path(folder) / "delta"))
        read = timed("load", lambda: Delta.load(Path(folder) / "delta"))
        applied = timed("apply", lambda: read.apply(*before))
        jax.block_until_ready(applied.trained.params["embedding"])
    return spent, (applied.trained, applied.item_index)
