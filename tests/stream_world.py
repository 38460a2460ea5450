"""A small world for update streams: an index whose items are known by a price, and a process that follows until it is killed.

Nothing runs when this is imported, so that a fork server may import it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow  # noqa: F401 (imported once by the fork server)
import redis

import aif_jax as aif
from aif_jax.connectors import EventLayout, Follower, IndexTarget, KafkaStream, SinkTarget, ValkeyFeatureWriter, ValkeyStream
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.store.snapshots import snapshots

T = 1_600_000_000
NAMES = [f"i{n}" for n in range(12)]
PARTITIONS = 2
PARAMS = {"item": {"scale": np.float32(3)}, "fitted": {}}


@functools.cache
def encoder() -> aif.Encoder:
    """Of items with a price."""
    data = aif.read(
        {"user": [1, 2], "item": ["i0", "i1"], "time": [T, T]},
        items={"item": NAMES, "category": ["a", "b"] * 6, "price": np.arange(12.0)},
        columns=aif.Columns(item_floats=("price",), scale=False),
    )
    assert data.encoder is not None
    return data.encoder


@functools.cache
def model() -> aif.PreRanker:
    """An item function that compiles in no time: this is about streams."""
    made = aif.build(aif.presets.two_tower(encoder().schema, width=4, short_length=4))
    item = lambda params, f: {"vector": f.floats * params["item"]["scale"]}  # noqa: E731
    return made._replace(init=lambda *given, **options: PARAMS, item=item)


def items(numbers: dict[str, float]) -> dict[str, Any]:
    """Raw items by column, each known by its price."""
    return {"item": list(numbers), "category": ["a"] * len(numbers), "price": np.array(list(numbers.values()), float)}


def first_index() -> ItemIndex:
    """The item i0."""
    return ItemIndex.build(
        aif.Trained(model(), PARAMS, encoder()), [items({"i0": 1.0})], batch_size=8, capacity=64, progress=False
    )


def prices(index: ItemIndex) -> dict[str, float]:
    """Price of each item in an index."""
    rows, mask = index.take(NAMES)
    return {name: float(row[0]) / 3 for name, row, there in zip(NAMES, rows["vector"], mask, strict=True) if there}


def open_stream(kind: str, address: str, name: str, **options):
    """A stream that another process made."""
    if kind == "kafka":
        return KafkaStream(address, name, **options)
    return ValkeyStream(redis.Redis.from_url(address), [f"{name}:{partition}" for partition in range(PARTITIONS)])


def work(kind: str, address: str, name: str, folder: str, updates: int, cache: str) -> None:
    """Follows until all messages are in, from wherever the index is; notes where it started and what is saved."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    root = Path(folder)
    if snapshots(root / "w"):
        writer = IndexWriter.resume(root / "w", aif.Trained(model(), PARAMS, encoder()), every_updates=2)
    else:
        writer = IndexWriter.start(root / "w", first_index(), every_updates=2)
    client = redis.Redis.from_url(address.split()[-1])
    sink = ValkeyFeatureWriter(client, EventLayout(), prefix=name)
    follower = Follower(open_stream(kind, address.split()[0], name), IndexTarget(writer), max_batch=4)
    events = Follower(open_stream(kind, address.split()[0], f"{name}-events"), SinkTarget(sink), max_batch=5)
    with open(root / "log", "a", buffering=1) as log:
        print(json.dumps(["start", writer.positions]), file=log)
        wanted = json.loads((root / "ends").read_text())
        while True:
            follower.step(0.02)
            events.step(0.02)
            print(json.dumps(["saved", writer.saved_positions]), file=log)
            there = [dict(map(lambda p: (str(p[0]), p[1]), t.positions.items())) for t in (follower.target, events.target)]
            if all(one.get(p, -1) >= at for one, want in zip(there, wanted, strict=True) for p, at in want.items()):
                break
    writer.close()
