"""One training step of whatever `aif_jax` is imported, on request: `train_throughput --before` runs two of these in turn.

It imports nothing but `aif_jax`, by names that older commits have too, so one file measures both. It writes the folder that the
package came from, then the milliseconds of a step for every line that it reads.
Sizes are those of the quickstart on MovieLens-100K: B=256, C=16, 1,682 items, L=512 of which 80 % is padding.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np

import aif_jax as aif
from aif_jax import train
from aif_jax.data.pipeline import Batch
from aif_jax.features import behaviours
from aif_jax.train import losses

SIZES = dict(samples=256, candidates=16, items=1683, length=512, content=64)
SMALL = dict(samples=4, candidates=3, items=30, length=16, content=8)


def batch_of(schema: aif.Schema, *, samples: int, candidates: int, items: int, length: int, content: int) -> Batch:
    """Random samples, the first candidate of each the positive one."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < rng.integers(1, 2 * length // 5 + 1, samples)[:, None]
    history = rng.integers(1, items, mask.shape).astype(np.int32)
    age, action = np.sort(rng.exponential(1e6, mask.shape), 1), rng.integers(1, 6, mask.shape)
    shape = samples, candidates
    ids = {a.name: rng.integers(1, a.size, shape).astype(np.int32) for a in schema.item_attributes}
    floats, vectors = np.zeros((*shape, 0), np.float32), rng.normal(size=(items, content)).astype(np.float32)
    labels = np.zeros(shape, np.float32)
    labels[:, 0] = 1
    return Batch(
        users=aif.UserFeatures(
            ids={}, floats=np.zeros((samples, 0), np.float32), history=behaviours(history, action, age, mask)
        ),
        items=aif.ItemFeatures(ids=ids, floats=floats, content=vectors[ids["item"]] if content else None),
        labels=labels,
        where=np.ones(shape, bool),
    )


def main() -> None:
    """Compiles, then makes a step a line."""
    sizes = SMALL if "--smoke" in sys.argv else SIZES
    attributes = (aif.Attribute(name="item", size=sizes["items"]), aif.Attribute(name="category", size=19))
    schema = aif.Schema(item_attributes=attributes, actions=6, content=sizes["content"])
    changes = dict(width=8, short_length=8, towers=(8,), head=(8,)) if "--smoke" in sys.argv else {}
    model = aif.build(aif.presets.aif(schema, long_length=sizes["length"], **changes))
    rng, count = np.random.default_rng(1), sizes["items"]
    catalogue = aif.ItemFeatures(
        ids={"item": np.arange(count, dtype=np.int32), "category": (np.arange(count) % 18 + 1).astype(np.int32)},
        floats=np.zeros((count, 0), np.float32),
        content=rng.normal(size=(count, sizes["content"])).astype(np.float32),
    )
    optimizer, batch = train.default_optimizer(10_000), jax.device_put(batch_of(schema, **sizes))
    step = train.make_step(model, optimizer, loss=losses.listwise_softmax)
    state, _ = step(train.init_state(model.init(jax.random.key(0), catalogue), optimizer), batch)
    print(Path(aif.__file__).resolve().parents[1], flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
