"""One request answered two ways with the same model: staged as AIF does it, and sequentially.

    staged       features, then the user function while retrieval runs  |  interaction on rows of the index, top-k
    sequential   features, then retrieval                               |  user function, item function, interaction, top-k

The critical path is right of the bar: from "candidates are there" to "top-k is ready". Retrieval is real work in both: the
two-tower model's user function and a dot product with all item vectors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import aif_jax as aif
from aif_jax.data.dataset import Dataset
from aif_jax.serving import Timeline
from aif_jax.types import Params
from experiments.timelines import draw


class Answer(NamedTuple):
    """Of one request."""

    items: np.ndarray  # int64 [k] raw item ids, best first
    scores: np.ndarray  # float32 [k]
    timeline: Timeline

    @property
    def critical_ms(self) -> float:
        """Milliseconds from "candidates are there" to "top-k is ready"."""
        return self.timeline.stages()["critical"] * 1e3


class Server:
    """Both ways over one trained model, its index and one retrieval stage.

    Args:
      run: of the pre-ranking model.
      retrieval: of a two-tower model.
      data: users and items.
      candidates: that retrieval finds.
      k: of the answer.
    """

    def __init__(self, run: aif.Run, retrieval: aif.Run, data: Dataset, *, candidates: int, k: int):
        self.model, self.params, self.data = run.model, run.params, data
        items = len(data.catalogue) - 1
        self.candidates, self.k = min(candidates, items), min(k, items, candidates)
        self.index = run.index(data.catalogue, progress=False)
        self.catalogue = jax.device_put(data.catalogue.features(np.arange(items + 1), content=run.config.reads_content))
        rows, _ = retrieval.index(data.catalogue, progress=False).take(data.items.raw)
        self._tower, self._item_vectors = retrieval, rows.vector
        self._tower_user = jax.jit(lambda params, features: retrieval.model.user(params, features).vector)
        self._user = jax.jit(self.model.user)
        self._staged = jax.jit(self._score_rows)
        self._sequential = jax.jit(self._score_features)
        self._joint = jax.jit(self.model.joint)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="user-function")

    def staged(self, position: int) -> Answer:
        """The user function runs in its own thread while retrieval runs; only the interaction is left for the end."""
        timeline = Timeline()
        features = self._fetch(position, timeline)
        state = self._pool.submit(self._user_state, features, timeline)
        ids = self._retrieve(features, timeline)
        with measure(timeline, "critical"):
            ready = state.result()
            with measure(timeline, "lookup"):
                rows, _ = self.index.lookup(ids)
            with measure(timeline, "score"), self.index.reading() as table:
                scores, places = jax.device_get(self._staged(self.params, ready, table, rows))
        return Answer(ids[places], scores, timeline)

    def sequential(self, position: int) -> Answer:
        """Everything of the pre-ranking model starts when the candidates are there."""
        timeline = Timeline()
        features = self._fetch(position, timeline)
        ids = self._retrieve(features, timeline)
        with measure(timeline, "critical"):
            state = self._user_state(features, timeline)
            with measure(timeline, "lookup"):
                rows = self.data.items.encode(ids)
            with measure(timeline, "score"):
                scores, places = jax.device_get(self._sequential(self.params, state, self.catalogue, rows))
        return Answer(ids[places], scores, timeline)

    def joint(self, position: int, items: np.ndarray) -> np.ndarray:
        """Joint scores of some raw item ids, the reference for both ways."""
        rows = self.data.items.encode(items)
        candidates = self.data.catalogue.features(rows, content=self.model.config.reads_content)
        return np.asarray(self._joint(self.params, self._fetch(position, Timeline()), candidates))

    def close(self) -> None:
        """Ends the thread of the user function."""
        self._pool.shutdown()

    def _fetch(self, position: int, timeline: Timeline) -> aif.UserFeatures:
        with measure(timeline, "features"):
            features = self.data.user_features([position], length=self.model.config.history_length)
            return jax.tree.map(lambda x: x[0], features)

    def _user_state(self, features: aif.UserFeatures, timeline: Timeline) -> Any:
        with measure(timeline, "user"):
            return jax.block_until_ready(self._user(self.params, features))

    def _retrieve(self, features: aif.UserFeatures, timeline: Timeline) -> np.ndarray:
        with measure(timeline, "retrieval"):
            scores = self._item_vectors @ np.asarray(self._tower_user(self._tower.params, features))
            return self.data.items.raw[np.argpartition(-scores, self.candidates - 1)[: self.candidates]]

    def _score_rows(self, params: Params, state: Any, table: Any, rows: jax.Array) -> Any:
        return jax.lax.top_k(self.model.interaction(params, state, self.index.decode(table, rows)), self.k)

    def _score_features(self, params: Params, state: Any, catalogue: Any, rows: jax.Array) -> Any:
        items = jax.tree.map(lambda x: x[rows], catalogue)
        return jax.lax.top_k(self.model.interaction(params, state, jax.vmap(self.model.item, (None, 0))(params, items)), self.k)


@contextmanager
def measure(timeline: Timeline, stage: str) -> Iterator[None]:
    """Notes the time that the body takes."""
    start = time.perf_counter()
    yield
    timeline.add(stage, start, time.perf_counter())


def draw_answers(answers: Mapping[str, Answer], path: Path) -> None:
    """The timelines of one request, a panel for each way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = {f"{way}: critical path {answer.critical_ms:.2f} ms": answer.timeline for way, answer in answers.items()}
    draw(titles, path)
