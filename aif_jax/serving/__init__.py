"""The asynchronous engine: serves a model and an item index behind `await engine.rank(request, k)`.

The only package that imports asyncio, threads and executors.
"""

from aif_jax.serving.cache import StateKey
from aif_jax.serving.config import ServingConfig, geometric
from aif_jax.serving.engine import AsyncPreRanker
from aif_jax.serving.errors import CallableError, DeadlineExceeded, EngineClosed, NonFiniteScores, Overloaded
from aif_jax.serving.metrics import prometheus_text
from aif_jax.serving.requests import Candidates, Ranking, Request, Scores, Timeline
from aif_jax.serving.shared import StateStore

__all__ = [
    "AsyncPreRanker", "ServingConfig", "geometric",
    "Request", "Candidates", "Ranking", "Scores",
    "Overloaded", "DeadlineExceeded", "EngineClosed", "CallableError", "NonFiniteScores",
    "Timeline", "prometheus_text",
    "StateStore", "StateKey",
]  # fmt: skip
