"""How a request is answered by compiled functions alone, and what that takes.

The critical path is milliseconds from "candidates are there" to "top-k is ready". Split models have their user state and item
rows ready, as AIF serves them; others run user function, item function and interaction when the candidates are there.
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
from experiments import drawn

Once = Callable[[int, np.ndarray], Any]
"""Answers the request of a number with these candidates: what is to be awaited."""


class Way(NamedTuple):
    """How a request is answered."""

    critical: Once  # when the candidates are there
    whole: Once  # with all that the request needs before
    head: Once | None  # the head's MLP alone on ready inputs, and top-k


def time_one(once: Once, found: list[np.ndarray], clock: Callable[[], float], i: int) -> float:
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


def way(config: aif.Config, dataset: Dataset, positions: np.ndarray, count: int, params: Params | None, *, split: bool) -> Way:
    """Return the functions of a model for the best 100 of `count` candidates; without parameters, as initialised."""
    model, k = aif.build(config), min(100, count)
    params = params or model.init(jax.random.key(0), None, fitted=aif.fit_tables(config, dataset.catalogue, seed=0))
    params = jax.device_put(params)
    users = [jax.tree.map(lambda x: x[0], dataset.user_features([at], length=config.history_length)) for at in positions]
    head = None
    if config.head != aif.heads.LogitSum():
        alone, inputs = drawn.head_alone(config, count)
        best = jax.jit(lambda weights, inputs: jax.lax.top_k(alone(weights, inputs), k))

        def head(i: int, found: np.ndarray) -> Any:
            return best(params["head"], inputs)

    if split:
        table = item_rows(model, params, dataset.catalogue, progress=False)
        user = jax.jit(model.user)
        states = [jax.block_until_ready(user(params, features)) for features in users]

        @jax.jit
        def answer(params: Any, state: Any, table: Any, found: jax.Array) -> Any:
            return jax.lax.top_k(model.interaction(params, state, jax.tree.map(lambda x: x[found], table)), k)

        return Way(
            lambda i, found: answer(params, states[i], table, found),
            lambda i, found: answer(params, user(params, users[i]), table, found),
            head,
        )
    items = dataset.catalogue.features(np.arange(len(dataset.catalogue)), content=config.reads_content)
    catalogue = jax.device_put(items)

    @jax.jit
    def joint(params: Any, features: Any, catalogue: Any, found: jax.Array) -> Any:
        return jax.lax.top_k(model.joint(params, features, jax.tree.map(lambda x: x[found], catalogue)), k)

    def once(i: int, found: np.ndarray) -> Any:
        return joint(params, users[i], catalogue, found)

    return Way(once, once, head)
