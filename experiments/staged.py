"""One request answered two ways with the same model: staged as AIF does it, and sequentially.

    staged       features, then the user function beside retrieval  |  interaction on rows of the table, top-k
    sequential   features, then retrieval                           |  user function, item function, interaction, top-k

The critical path is what stands right of the bar: from "candidates are there" to "top-k is ready". Retrieval is real work
in both: the two-tower model's user function and a dot product with its whole item table.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.data.batches import candidate_features
from aif_jax.data.dataset import Dataset
from aif_jax.types import Params
from experiments.evaluation import catalogue_rows


class Answer(NamedTuple):
    """Of one request; spans are (start, end) in milliseconds from its arrival."""

    items: np.ndarray  # int32 [k] catalogue rows, best first
    scores: np.ndarray  # float32 [k]
    candidates: np.ndarray  # int32 [C]
    critical_ms: float
    spans: dict[str, tuple[float, float]]


class Server:
    """Both ways over one model, one table and one retrieval stage."""

    def __init__(
        self,
        model: aif.PreRanker,
        params: Params,
        retrieval: tuple[aif.PreRanker, Params],
        dataset: Dataset,
        *,
        candidates: int,
        k: int,
    ):
        self.model, self.params, self.dataset = model, params, dataset
        self.candidates, self.k = min(candidates, len(dataset.catalogue) - 1), min(k, len(dataset.catalogue) - 1)
        self.table = catalogue_rows(model, params, dataset)
        self.catalogue = jax.device_put(candidate_features(dataset, np.arange(len(dataset.catalogue)), config=model.config))
        self._tower, self._tower_params = retrieval
        self._tower_items = np.asarray(catalogue_rows(*retrieval, dataset).vector)
        self._tower_user = jax.jit(lambda params, features: self._tower.user(params, features).vector)
        self._user = jax.jit(model.user)
        self._realtime = jax.jit(self._score_rows)
        self._late = jax.jit(self._score_features)
        self._joint = jax.jit(model.joint)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="user-function")

    def staged(self, position: int) -> Answer:
        """The user function runs in a thread of its own while retrieval runs; only the interaction is left for the end."""
        clock = _Clock()
        features = self._fetch(position)
        clock.mark("feature fetch")
        future = self._pool.submit(self._timed_user, features, clock)
        start = clock.now()
        found = self._retrieve(features)
        there = clock.span("retrieval", start)
        state = future.result()
        start = clock.now()
        scores, items = jax.device_get(self._realtime(self.params, state, self.table, found))
        end = clock.span("interaction, top-k", start)
        return Answer(items, scores, found, end - there, clock.spans)

    def sequential(self, position: int) -> Answer:
        """Everything of the pre-ranking model starts when the candidates are there."""
        clock = _Clock()
        features = self._fetch(position)
        clock.mark("feature fetch")
        start = clock.now()
        found = self._retrieve(features)
        there = clock.span("retrieval", start)
        state = jax.block_until_ready(self._user(self.params, features))
        start = clock.span("user function", there)
        scores, items = jax.device_get(self._late(self.params, state, self.catalogue, found))
        end = clock.span("item function, interaction, top-k", start)
        return Answer(items, scores, found, end - there, clock.spans)

    def joint(self, position: int, items: np.ndarray) -> np.ndarray:
        """Joint scores of some catalogue rows, the reference for both ways."""
        features = candidate_features(self.dataset, items, config=self.model.config)
        return np.asarray(self._joint(self.params, self._fetch(position), features))

    def close(self) -> None:
        """Ends the thread of the user function."""
        self._pool.shutdown()

    def _fetch(self, position: int) -> aif.UserFeatures:
        config = self.model.config
        features = self.dataset.user_features([position], short=config.short_length, long=config.long_length)
        return jax.tree.map(lambda x: x[0], features)

    def _timed_user(self, features: aif.UserFeatures, clock: _Clock) -> Any:
        start = clock.now()
        state = jax.block_until_ready(self._user(self.params, features))
        clock.span("user function", start)
        return state

    def _retrieve(self, features: aif.UserFeatures) -> np.ndarray:
        vector = np.asarray(self._tower_user(self._tower_params, features))
        scores = self._tower_items[1:] @ vector
        return (np.argpartition(-scores, self.candidates - 1)[: self.candidates] + 1).astype(np.int32)

    def _score_rows(self, params: Params, state: Any, table: Any, found: jax.Array):
        return self._top(self.model.interaction(params, state, jax.tree.map(lambda x: x[found], table)), found)

    def _score_features(self, params: Params, state: Any, catalogue: Any, found: jax.Array):
        rows = jax.vmap(self.model.item, (None, 0))(params, jax.tree.map(lambda x: x[found], catalogue))
        return self._top(self.model.interaction(params, state, rows), found)

    def _top(self, scores: jax.Array, found: jax.Array):
        best, at = jax.lax.top_k(scores, self.k)
        return best, jnp.asarray(found)[at]


class _Clock:
    def __init__(self):
        self._start = time.perf_counter()
        self.spans: dict[str, tuple[float, float]] = {}

    def now(self) -> float:
        return (time.perf_counter() - self._start) * 1e3

    def mark(self, name: str) -> float:
        return self.span(name, 0.0)

    def span(self, name: str, start: float) -> float:
        end = self.now()
        self.spans[name] = (start, end)
        return end


def draw(answers: dict[str, Answer], path: Path, *, title: str) -> None:
    """The timelines of one request, one panel for each way, critical path shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for answer in answers.values() for name in answer.spans))
    colours = dict(zip(names, plt.get_cmap("Set2").colors, strict=False))
    figure, axes = plt.subplots(len(answers), 1, figsize=(9, 1.2 + 1.5 * len(answers)), sharex=True, layout="constrained")
    for axis, (way, answer) in zip(axes, answers.items(), strict=True):
        last = max(end for _, end in answer.spans.values())
        axis.axvspan(last - answer.critical_ms, last, color="0.9", zorder=0)
        for row, (name, (start, end)) in enumerate(answer.spans.items()):
            axis.barh(row, end - start, left=start, color=colours[name], height=0.7, zorder=2)
        axis.set_yticks(range(len(answer.spans)), list(answer.spans))
        axis.invert_yaxis()
        axis.set_title(f"{way}: critical path {answer.critical_ms:.2f} ms (shaded)", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds from the request's arrival")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
