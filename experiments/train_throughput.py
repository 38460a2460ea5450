"""Training speed by table size and history.

Claim     a step costs the same whether the item table has 10^4 or 10^7 rows.
Command   python -m experiments.train_throughput --json FILE      (or --smoke)
Time      6 minutes and 10 GiB on two cores with --rounds 14
Model     `presets.aif` with an item table of so many rows, B=1024 pointwise samples; Adam, no clipping. The ids of a batch are
          drawn from 8,192 rows spread over the table, so that a batch has as many unique ids at every table size.
Figures   medians of runs interleaved in one process, batches ready on the device; compile time apart.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import optax

import aif_jax as aif
from aif_jax import train
from aif_jax.data.pipeline import Batch
from aif_jax.features import behaviours
from aif_jax.train import losses
from aif_jax.train.optimizers import MIN_ROWS
from aif_jax.types import Params
from experiments import common, drawn
from experiments.study import models

CATEGORIES, CONTENT, ACTIONS, HOT = 1000, 64, 6, 8192
ADAM = optax.adam(1e-3)


class Trainer:
    """One model with its state and its batches; a call makes a step."""

    def __init__(self, config: aif.Config, batches: list[Batch], *, fitted: Params):
        model = aif.build(config)
        self.step = train.make_step(model, ADAM, loss=losses.pointwise_bce)
        params = model.init(jax.random.key(0), None, fitted=fitted)
        self.batches = itertools.cycle([jax.tree.map(jax.numpy.asarray, batch) for batch in batches])
        self.state = train.init_state(params, ADAM)

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, next(self.batches))
        return self.state, metrics


def config_of(rows: int, **changes: Any) -> aif.Config:
    """Return `presets.aif` with an item table of so many rows."""
    attributes = (aif.Attribute(name="item", size=rows), aif.Attribute(name="category", size=CATEGORIES))
    return aif.presets.aif(aif.Schema(item_attributes=attributes, actions=ACTIONS, content=CONTENT), **changes)


def category_of(item: np.ndarray) -> np.ndarray:
    """Return the category of each item."""
    return np.where(item > 0, item % (CATEGORIES - 1) + 1, 0).astype(np.int32)


def batch_of(config: aif.Config, size: int, *, seed: int) -> Batch:
    """Return random features; histories between half and the whole of their length are filled."""
    rng, schema, length = np.random.default_rng(seed), config.schema, config.history_length
    rows = schema.table_sizes["item"]
    hot = rng.integers(1, rows, HOT).astype(np.int32)

    def items(shape: tuple[int, ...]) -> np.ndarray:
        return hot[rng.integers(0, HOT, shape)]

    users = drawn.users(schema, length, (size,), events=rng.integers(length // 2, length + 1, size), seed=seed)
    history = behaviours(items((size, length)), users.history.action, users.history.age, users.history.mask)
    candidate = items((size, 1))
    ids = {"item": candidate, "category": category_of(candidate)}
    return Batch(
        users=dataclasses.replace(users, history=history),
        items=dataclasses.replace(drawn.items(schema, (size, 1), seed=seed), ids=ids),
        labels=rng.integers(0, 2, (size, 1)).astype(np.float32),
        where=np.ones((size, 1), bool),
    )


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run every comparison and print its figures."""
    settings = {"rounds": (20, 2, "steps of each"), "batch_size": (1024, 16, "samples of a step")}
    options = common.options(__doc__, arguments, settings)
    smoke, rounds, size = options.smoke, options.rounds, options.batch_size
    few = tuple(b for b in config_of(10).blocks if isinstance(b, aif.blocks.LinearMemory | aif.blocks.DotProduct))

    def trainer(rows: int, **sizes: int) -> Trainer:
        config = config_of(rows, **(models.SMOKE | {"blocks": few} if smoke else {}) | sizes)
        made = [batch_of(config, size, seed=seed) for seed in range(2 if smoke else 4)]
        return Trainer(config, made, fitted={"fields": {"category": category_of(np.arange(rows))}})

    rows, lengths = ((1000, MIN_ROWS), (16, 32)) if smoke else ((10**4, 10**5, 10**6, 10**7), (64, 256, 512, 1024))
    by_rows = common.medians({str(count): trainer(count) for count in rows}, rounds, warm=2)
    by_length = {str(length): trainer(rows[0], long_length=length) for length in lengths}
    by_history = common.medians(by_length, rounds, warm=2)
    figures: dict[str, Any] = {
        "batch_size": size, "min_rows": MIN_ROWS, "step_ms_by_table_rows": by_rows,
        "step_ratio_1e7_over_1e4": by_rows[str(rows[-1])] / by_rows[str(rows[0])], "step_ms_by_history": by_history,
        "examples_per_s_by_history": {length: size / ms * 1e3 for length, ms in by_history.items()},
    }  # fmt: skip
    common.report(figures, options.json)


if __name__ == "__main__":
    main()
