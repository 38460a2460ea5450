"""The asynchronous engine: serves a model and an item index behind `await engine.rank(request, k)`.

A request goes through `engine`, `users` (its state), `callables` (yours), `scoring` (its candidates) and `programs`, using the
model version from `versions`.
"""

from aif_jax.serving.config import ServingConfig  # noqa: I001
from aif_jax.serving.engine import AsyncPreRanker
from aif_jax.serving.metrics import prometheus_text
from aif_jax.serving.programs import compute_inline
from aif_jax.serving.requests import (
    Answer, CallableError, Candidates, DeadlineExceeded, EngineClosed, NonFiniteScores, Overloaded, Ranking, Request, Scores,
    Timeline,
)  # fmt: skip

__all__ = [
    "AsyncPreRanker", "ServingConfig", "compute_inline",
    "Request", "Candidates", "Ranking", "Scores", "Answer",
    "Overloaded", "DeadlineExceeded", "EngineClosed", "CallableError", "NonFiniteScores",
    "Timeline", "prometheus_text",
]  # fmt: skip
