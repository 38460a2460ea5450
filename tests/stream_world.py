"""A small world for update streams, and a process that follows one; a fork server imports it, so nothing runs then."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # noqa: F401 (imported once by the fork server)

import aif_jax as aif
from aif_jax.connectors import Follower, KafkaStream, follow
from aif_jax.index.writer import snapshots
from tests.killed import compile_into

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


def first_index() -> aif.ItemIndex:
    """The item i0."""
    trained = aif.Trained(model(), PARAMS, encoder())
    return aif.ItemIndex.build(trained, [items({"i0": 1.0})], batch_size=8, capacity=64, progress=False)


def prices(index: aif.ItemIndex) -> dict[str, float]:
    """Price of each item in an index."""
    rows, mask = index.take(NAMES)
    return {name: float(row[0]) / 3 for name, row, there in zip(NAMES, rows["vector"], mask, strict=True) if there}


def work(address: str, topic: str, folder: str, cache: str) -> None:
    """Follows until all messages are in, from wherever the index is; notes where it started and what is saved."""
    compile_into(cache)
    root = Path(folder)
    if snapshots(root / "w"):
        writer = aif.IndexWriter.resume(root / "w", aif.Trained(model(), PARAMS, encoder()), every_updates=2)
    else:
        writer = aif.IndexWriter.start(root / "w", first_index(), every_updates=2)
    follow.MAX_BATCH = 4  # this process does nothing else
    follower = Follower(KafkaStream(f"kafka://{address}/{topic}"), writer)
    with open(root / "log", "a", buffering=1) as log:
        print(json.dumps(["start", writer.positions]), file=log)
        wanted = json.loads((root / "ends").read_text()).items()
        while True:
            follower.step(0.02)
            print(json.dumps(["saved", writer.saved_positions]), file=log)
            if all(writer.positions.get(int(partition), -1) >= at for partition, at in wanted):
                break
    writer.close()
