"""Static configuration of the engine."""

from __future__ import annotations

import dataclasses

from aif_jax.serving.buckets import geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How an engine serves. Times are in seconds, sizes in bytes.

    Attributes:
      buckets: candidate counts that are compiled ahead, ascending. A request with more than the last is split.
      max_k: the largest k that `rank` accepts.
      history_shapes: (short, long) lengths of user features that are compiled ahead; () means the model config's lengths.
      max_pending: requests held at once; one more is refused with `Overloaded`.
      budget: what a request may take that does not state its own; None for no limit.
      reserve: least time kept back for scoring when the engine decides that the user side is late; it keeps back more where
        recent requests needed more, at most half the budget.
      feature_timeout: longest life of one feature fetch, so that a hung one cannot pile up; None for no limit.
      fallback: answer with a stale or default user when the user side is late or fails; False raises instead.
      cache_bytes: bound of the state cache; 0 keeps nothing.
      prepare_ttl: how long a state made by `prepare` without a feature version may be used by later requests.
      user_threads: user functions in work at once.
      score_threads: interactions in work at once.
      callable_threads: threads for `features` and `retrieval` that are not async.
      batch_size: concurrent requests of one bucket scored together, at most; 1 switches batching off.
      batch_wait: how long a request may wait for others to share its batch.
      bid: name of the index row's side value that holds the bid.
      drain_timeout: how long shutdown waits for requests in flight before it cancels them.

    Raises:
      ValueError: names the field, what was expected and what came.
    """

    buckets: tuple[int, ...] = geometric(128, 16384)
    max_k: int = 512
    history_shapes: tuple[tuple[int, int], ...] = ()
    max_pending: int = 64
    budget: float | None = None
    reserve: float = 0.005
    feature_timeout: float | None = 5.0
    fallback: bool = True
    cache_bytes: int = 256 * 2**20
    prepare_ttl: float = 5.0
    user_threads: int = 2
    score_threads: int = 2
    callable_threads: int = 16
    batch_size: int = 1
    batch_wait: float = 0.0005
    bid: str = "bid"
    drain_timeout: float = 10.0

    def __post_init__(self):
        sizes = self.buckets
        _expect(len(sizes) > 0 and sizes[0] >= 1, "buckets", "at least one size of 1 or more", sizes)
        _expect(all(a < b for a, b in zip(sizes, sizes[1:], strict=False)), "buckets", "ascending sizes", sizes)
        for field in ("max_k", "max_pending", "user_threads", "score_threads", "callable_threads", "batch_size"):
            _expect(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        for field in ("reserve", "cache_bytes", "prepare_ttl", "batch_wait", "drain_timeout"):
            _expect(getattr(self, field) >= 0, field, "0 or more", getattr(self, field))
        for field in ("budget", "feature_timeout"):
            value = getattr(self, field)
            _expect(value is None or value > 0, field, "None or more than 0 seconds", value)
        for shape in self.history_shapes:
            _expect(len(shape) == 2 and min(shape) >= 1, "history_shapes", "pairs (short, long) of 1 or more", shape)


def _expect(ok: bool, field: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"ServingConfig.{field}: expected {expected}, got {got!r}")
