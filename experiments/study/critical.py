"""The critical path of every model, and the processor time of a whole request, by compiled functions alone.

The critical path is milliseconds from "candidates are there" to "top-k is ready". Staged models have their user state and item
rows ready, as AIF serves them. `cold` and `exact` have no part to prepare: they run user function, item function and
interaction when the candidates are there. A whole request of a staged model is the user function, from features on the host,
and the critical path; item rows are nearline. "..., sequential" is a staged model run as `exact` is.

Parameters are those that the study trained with seed 0, where its work folder has them, and random elsewhere: their values do
not change what is computed. All models take turns in one run; those of LONGER also with longer histories, under names such as
"exact, L=2048". A turn is two requests, of which the second is timed, so that the caches hold what the model itself uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import checkpoint
from aif_jax.blocks import PureSvd
from aif_jax.data.dataset import Dataset
from aif_jax.train.evaluate import item_rows
from aif_jax.types import Params
from experiments import common
from experiments.study import datasets, models
from experiments.study.evaluation import earlier
from experiments.study.models import FACTORS, SEQUENTIALLY
from experiments.study.runs import Run, fit_tables, kept

SEQUENTIAL = ("cold", "exact")
TOP = 100
LONGER = ("+ SimTier", "aif", "exact")
LENGTHS = (512, 2048)
SERVED = (FACTORS, FACTORS + SEQUENTIALLY)
ADDED = {"two_tower": (FACTORS,), "preset": SERVED, "preset, L=2048": SERVED}
"""Models that are also timed with the factors of co-engagement, and `presets.aif`, as it is served then, also sequentially."""


class Way(NamedTuple):
    """How a request is answered, by number and candidates: functions that return what is to be awaited."""

    critical: Callable[[int, np.ndarray], Any]  # when the candidates are there
    whole: Callable[[int, np.ndarray], Any]  # with all that the request needs before


def measure(
    data: datasets.StudyData,
    names: list[str],
    *,
    candidates: int = 1000,
    rounds: int = 200,
    lengths: tuple[int, ...] = LENGTHS,
    work: Path | None = None,
    smoke: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times every model in turn.

    Args:
      data: users and items; the requests are those of the longest histories.
      names: of models.
      candidates: C.
      rounds: requests of every model.
      lengths: L at which the models of LONGER are timed too.
      work: of the study, where it keeps trained models.
      smoke: small sizes.

    Returns:
      Model to `p50`, `p99` and `best` of the critical path, and `cpu` of a whole request, the median, in milliseconds, and
      `trained`: whether its parameters were.
    """
    log = data.dataset.log
    positions = np.argsort(-earlier(data.dataset, np.arange(len(log))), kind="stable")[: 64 * rounds : 64]
    count = min(candidates, len(data.dataset.catalogue) - 1)
    found = [np.random.default_rng(i).choice(len(data.dataset.catalogue) - 1, count, replace=False) + 1 for i in range(16)]
    wanted = {name: (name, "", {}) for name in names}
    wanted |= {name + more: (name, more, {}) for name in names for more in ADDED.get(name, ())}
    wanted |= {f"{name}, L={n}": (name, "", {"long_length": n}) for n in lengths for name in names if name in LONGER}
    critical, whole, trained = {}, {}, {}
    for name, (model, more, changes) in tqdm(wanted.items(), desc="compile models", unit="model"):
        config = models.config(model, data.dataset.schema, sim_fields=data.sim_fields, smoke=smoke, **changes)
        if FACTORS in more:
            config = config.replace(blocks=(*config.blocks, PureSvd()))
        run = Run(dataset=data.name, model=model, seed=0)
        params = trained_params(config, kept(run, work, more=FACTORS if FACTORS in more else "")) if work else None
        trained[name] = params is not None
        make = sequential if models.family(model) in SEQUENTIAL or SEQUENTIALLY in more else staged
        way = make(config, data.dataset, positions[:16], min(TOP, count), params)
        rows = [each.astype(np.int32) for each in found]
        critical[name] = partial(time_one, way.critical, rows, time.perf_counter)
        whole[name] = partial(time_one, way.whole, rows, time.process_time)
        for i in range(3):
            critical[name](i), whole[name](i)
    times, spent = common.interleaved(critical, rounds), common.interleaved(whole, rounds)
    return {
        name: {
            "p50": float(np.median(ms)),
            "p99": float(np.percentile(ms, 99)),
            "best": float(ms.min()),
            "cpu": float(np.median(spent[name])),
            "trained": trained[name],
        }
        for name, ms in times.items()
    }


def trained_params(config: aif.Config, folder: Path) -> Params | None:
    """Parameters of a trained model of just this config, None where the folder holds none."""
    if not folder.exists():
        return None
    restored = checkpoint.load(folder)
    return restored.params if restored.config == config else None


def time_one(once: Callable[[int, np.ndarray], Any], found: list[np.ndarray], clock: Callable[[], float], i: int) -> float:
    """Milliseconds of request i, after another one that warms the caches."""
    jax.device_get(once((i + 1) % len(found), found[(i + 1) % len(found)]))
    start = clock()
    jax.device_get(once(i % len(found), found[i % len(found)]))
    return (clock() - start) * 1e3


def longest(dataset: Dataset, candidates: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """16 requests of the longest histories: positions in the log, and at most so many candidates of each, drawn at random."""
    positions = np.argsort(-earlier(dataset, np.arange(len(dataset.log))), kind="stable")[: 64 * 16 : 64]
    rng, items = np.random.default_rng(0), len(dataset.catalogue) - 1
    return positions, [rng.choice(items, min(candidates, items), replace=False).astype(np.int32) + 1 for _ in range(16)]


def _prepared(config: aif.Config, dataset: Dataset, positions: np.ndarray, params: Params | None) -> tuple[Any, ...]:
    model = aif.build(config)
    params = jax.device_put(params or model.init(jax.random.key(0), None, fitted=fit_tables(dataset, config)))
    users = [dataset.user_features([at], length=config.history_length) for at in positions]
    return model, params, [jax.tree.map(lambda x: x[0], features) for features in users]


def staged(config: aif.Config, dataset: Dataset, positions: np.ndarray, k: int, params: Params | None) -> Way:
    """A model whose user states and item rows are ready when the candidates are there."""
    model, params, users = _prepared(config, dataset, positions, params)
    table = item_rows(model, params, dataset.catalogue, progress=False)
    user = jax.jit(model.user)
    states = [jax.block_until_ready(user(params, features)) for features in users]

    @jax.jit
    def answer(params: Any, state: Any, table: Any, found: jax.Array) -> Any:
        return jax.lax.top_k(model.interaction(params, state, jax.tree.map(lambda x: x[found], table)), k)

    return Way(
        lambda i, found: answer(params, states[i % len(states)], table, found),
        lambda i, found: answer(params, user(params, users[i % len(users)]), table, found),
    )


def sequential(config: aif.Config, dataset: Dataset, positions: np.ndarray, k: int, params: Params | None) -> Way:
    """A model that computes everything when the candidates are there."""
    model, params, users = _prepared(config, dataset, positions, params)
    items = dataset.catalogue.features(np.arange(len(dataset.catalogue)), content=config.reads_content)
    catalogue = jax.device_put(items)

    @jax.jit
    def answer(params: Any, features: Any, catalogue: Any, found: jax.Array) -> Any:
        return jax.lax.top_k(model.joint(params, features, jax.tree.map(lambda x: x[found], catalogue)), k)

    def once(i: int, found: np.ndarray) -> Any:
        return answer(params, users[i % len(users)], catalogue, found)

    return Way(once, once)
