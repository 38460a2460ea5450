"""Static configuration of the engine, and the candidate counts that it compiles for."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from aif_jax.checks import Fields, expect_types
from aif_jax.scores import Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingConfig(Fields):
    """How an engine serves. Times are in seconds, sizes in bytes.

    Attributes:
      buckets: candidate counts that are compiled ahead, ascending. Others are padded to the next; more are refused.
      max_k: the largest k that `rank` accepts.
      max_pending: requests held at once; one more is refused with `Overloaded`.
      budget: seconds for a request that gives none; None: no limit.
      reserve: time kept back for scoring when the engine decides that the user part is late; more where recent requests
        needed more, but never over half the budget.
      fallback: answer with a stale state, or an unknown user's, when the user part is late or fails; False raises instead.
      max_stale: the oldest user state that a request may read, counted from the fetch of its features; None: no bound.
      max_unknown: largest share, 0 to 1, of a history's events with an unknown item, and of those with an unknown action; above
        it an answer is marked `degraded`, from 5 events on. None: never. What `Columns.history_actions` leaves out is no event.
      cache_bytes: bound of the state cache; 0 keeps nothing.
      prepare_ttl: how long a state made by `prepare` without a feature version may be used, from the fetch of its features.
      callable_timeout: longest life of one call of `features` or `retrieval`; None: no limit.
      max_hung: calls of `features`, and of `retrieval`, that may outlive their requests; with so many, calls fail.
      user_threads: user functions computed at once.
      score_threads: interactions computed at once.
      batch_size: users whose states are computed together, and requests of one bucket that are scored together, at most. Only
        those that wait for a thread anyway share a call, so a lone request never waits. 1 switches batching off.
      bid: name of the side column (`Columns.side`) with the bid; candidates may bring their own bids.
      orders: JAX functions by name, such as {"value": lambda p, bid: p["conversion"] * bid + 0.1 * p["like"]}, of calibrated
        probabilities [C] by objective and the bid [C], see `aif_jax.scores`; requests choose one by name. "bid" is there by
        itself: the probability of the first objective times the bid.
      order: order of requests that choose none: "logit", that of the first objective, or a name among the orders.
      drain_timeout: how long shutdown waits for requests before it ends them with `EngineClosed`.

    Raises:
      ValueError: names the field, what was expected and what came.
    """

    buckets: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 10_240, 16_384)
    max_k: int = 512
    max_pending: int = 64
    budget: float | None = None
    reserve: float = 0.005
    fallback: bool = True
    max_stale: float | None = 3600.0
    max_unknown: float | None = 0.5
    cache_bytes: int = 256 * 2**20
    prepare_ttl: float = 5.0
    callable_timeout: float | None = 5.0
    max_hung: int = 64
    user_threads: int = 2
    score_threads: int = 2
    batch_size: int = 8
    bid: str = "bid"
    orders: Mapping[str, Order] = dataclasses.field(default_factory=dict)
    order: str = "logit"
    drain_timeout: float = 10.0

    def __post_init__(self):
        expect_types(self)
        for names, fits, expected in CHECKS:
            for name in names.split():
                self.expect(fits(getattr(self, name)), name, expected)


WAY_OUT = 'such as {"value": lambda p, bid: p["click"] * bid}; a service has those that its model was exported with'
CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("buckets", lambda sizes: sizes and sizes[0] >= 1 and list(sizes) == sorted(set(sizes)), "ascending sizes of 1 or more"),
    ("max_k max_pending max_hung user_threads score_threads batch_size", lambda count: count >= 1, "an integer of at least 1"),
    ("reserve cache_bytes prepare_ttl drain_timeout", lambda value: 0 <= value < math.inf, "0 or more"),
    ("budget callable_timeout max_stale", lambda v: v is None or 0 < v < math.inf, "None or more than 0 seconds"),
    ("orders", lambda f: isinstance(f, Mapping) and all(map(callable, f.values())), f"functions f(p, bid) by name, {WAY_OUT}"),
    ("max_unknown", lambda share: share is None or 0 <= share <= 1, "None or a share from 0 to 1"),
)
"""Names of fields, what each must be, and the words for it."""
