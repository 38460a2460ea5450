"""The critical path of every model: milliseconds from "candidates are there" to "top-k is ready", compiled functions alone.

Staged models have their user state and item rows ready, as AIF serves them. `cold` and `exact` have no part to prepare: they
run user function, item function and interaction when the candidates are there. Parameters are random: their values do not
matter here. All models take turns in one run; those of LONGER also with longer histories, under names such as "exact, L=2048".
A turn is two requests, of which the second is timed, so that the caches hold what the model itself uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax.data.dataset import Dataset
from aif_jax.train.evaluate import item_rows
from experiments import common
from experiments.study import datasets, models
from experiments.study.evaluation import earlier
from experiments.study.runs import fit_tables

SEQUENTIAL = ("cold", "exact")
TOP = 100
LONGER = ("+ SimTier", "aif", "exact")
LENGTHS = (512, 2048)


def measure(
    data: datasets.StudyData,
    names: list[str],
    *,
    candidates: int = 1000,
    rounds: int = 200,
    lengths: tuple[int, ...] = LENGTHS,
    smoke: bool = False,
) -> dict[str, dict[str, float]]:
    """Times every model in turn.

    Args:
      data: users and items; the requests are those of the longest histories.
      names: of models.
      candidates: C.
      rounds: requests of every model.
      lengths: L at which the models of LONGER are timed too.
      smoke: small sizes.

    Returns:
      Model to `p50`, `p99` and `best` in milliseconds.
    """
    log = data.dataset.log
    positions = np.argsort(-earlier(data.dataset, np.arange(len(log))), kind="stable")[: 64 * rounds : 64]
    count = min(candidates, len(data.dataset.catalogue) - 1)
    found = [np.random.default_rng(i).choice(len(data.dataset.catalogue) - 1, count, replace=False) + 1 for i in range(16)]
    wanted: dict[str, tuple[str, dict[str, int]]] = {name: (name, {}) for name in names}
    wanted |= {f"{name}, L={n}": (name, {"long_length": n}) for n in lengths for name in names if name in LONGER}
    timed = {}
    for name, (model, changes) in tqdm(wanted.items(), desc="compile models", unit="model"):
        config = models.config(model, data.dataset.schema, sim_fields=data.sim_fields, smoke=smoke, **changes)
        make = _sequential if models.family(model) in SEQUENTIAL else _staged
        once = make(config, data.dataset, positions[:16], min(TOP, count))
        timed[name] = partial(_time, once, [rows.astype(np.int32) for rows in found])
        for i in range(3):
            timed[name](i)
    times = common.interleaved(timed, rounds)
    return {
        name: {"p50": float(np.median(ms)), "p99": float(np.percentile(ms, 99)), "best": float(ms.min())}
        for name, ms in times.items()
    }


def _time(once: Callable[[int, np.ndarray], Any], found: list[np.ndarray], i: int) -> float:
    jax.device_get(once((i + 1) % len(found), found[(i + 1) % len(found)]))
    start = time.perf_counter()
    jax.device_get(once(i % len(found), found[i % len(found)]))
    return (time.perf_counter() - start) * 1e3


def _prepared(config: aif.Config, dataset: Dataset, positions: np.ndarray) -> tuple[Any, ...]:
    model = aif.build(config)
    params = jax.device_put(model.init(jax.random.key(0), None, fitted=fit_tables(dataset, config)))
    users = [dataset.user_features([at], length=config.history_length) for at in positions]
    return model, params, [jax.tree.map(lambda x: x[0], features) for features in users]


def _staged(config: aif.Config, dataset: Dataset, positions: np.ndarray, k: int) -> Callable[[int, np.ndarray], Any]:
    model, params, users = _prepared(config, dataset, positions)
    table = item_rows(model, params, dataset.catalogue, progress=False)
    user = jax.jit(model.user)
    states = [jax.block_until_ready(user(params, features)) for features in users]

    @jax.jit
    def answer(params: Any, state: Any, table: Any, found: jax.Array) -> Any:
        return jax.lax.top_k(model.interaction(params, state, jax.tree.map(lambda x: x[found], table)), k)

    return lambda i, found: answer(params, states[i % len(states)], table, found)


def _sequential(config: aif.Config, dataset: Dataset, positions: np.ndarray, k: int) -> Callable[[int, np.ndarray], Any]:
    model, params, users = _prepared(config, dataset, positions)
    items = dataset.catalogue.features(np.arange(len(dataset.catalogue)), content=config.reads_content)
    catalogue = jax.device_put(items)

    @jax.jit
    def answer(params: Any, features: Any, catalogue: Any, found: jax.Array) -> Any:
        return jax.lax.top_k(model.joint(params, features, jax.tree.map(lambda x: x[found], catalogue)), k)

    return lambda i, found: answer(params, users[i % len(users)], catalogue, found)
