"""How a request is answered when its candidates are there, by compiled functions alone; and what that takes.

The critical path is milliseconds from "candidates are there" to "top-k is ready". Staged models have their user state and item
rows ready, as AIF serves them. Sequential ones run user function, item function and interaction when the candidates are there.
A turn of a model is two requests, of which the second is timed, so that the caches hold what the model itself uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import aif_jax as aif
from aif_jax.data.dataset import Dataset
from aif_jax.train.evaluate import item_rows
from aif_jax.types import Params


class Way(NamedTuple):
    """How a request is answered, by number and candidates: functions that return what is to be awaited."""

    critical: Callable[[int, np.ndarray], Any]  # when the candidates are there
    whole: Callable[[int, np.ndarray], Any]  # with all that the request needs before


def time_one(once: Callable[[int, np.ndarray], Any], found: list[np.ndarray], clock: Callable[[], float], i: int) -> float:
    """Return milliseconds of request i, after another one that warms the caches."""
    jax.device_get(once((i + 1) % len(found), found[(i + 1) % len(found)]))
    start = clock()
    jax.device_get(once(i % len(found), found[i % len(found)]))
    return (clock() - start) * 1e3


def longest(dataset: Dataset, candidates: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return 16 requests of the longest histories: positions in the log, and some candidates of each, drawn at random."""
    log, every = dataset.log, np.arange(len(dataset.log))
    positions = np.argsort(log.offsets[log.user] - log.history_end(every), kind="stable")[: 64 * 16 : 64]
    rng, items = np.random.default_rng(0), len(dataset.catalogue) - 1
    return positions, [rng.choice(items, min(candidates, items), replace=False).astype(np.int32) + 1 for _ in range(16)]


def _prepared(config: aif.Config, dataset: Dataset, positions: np.ndarray, params: Params | None) -> tuple[Any, ...]:
    model = aif.build(config)
    fitted = aif.fit_tables(config, dataset.catalogue, seed=0)
    params = jax.device_put(params or model.init(jax.random.key(0), None, fitted=fitted))
    users = [dataset.user_features([at], length=config.history_length) for at in positions]
    return model, params, [jax.tree.map(lambda x: x[0], features) for features in users]


def staged(config: aif.Config, dataset: Dataset, positions: np.ndarray, k: int, params: Params | None) -> Way:
    """Return a model whose user states and item rows are ready when the candidates are there."""
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
    """Return a model that computes everything when the candidates are there."""
    model, params, users = _prepared(config, dataset, positions, params)
    items = dataset.catalogue.features(np.arange(len(dataset.catalogue)), content=config.reads_content)
    catalogue = jax.device_put(items)

    @jax.jit
    def answer(params: Any, features: Any, catalogue: Any, found: jax.Array) -> Any:
        return jax.lax.top_k(model.joint(params, features, jax.tree.map(lambda x: x[found], catalogue)), k)

    def once(i: int, found: np.ndarray) -> Any:
        return answer(params, users[i % len(users)], catalogue, found)

    return Way(once, once)
