"""What goes into the engine, what comes out of it, and what it raises."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.vocabulary import MOST_CHARACTERS, as_ids, expect_short, id_array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request for a ranking.

    Attributes:
      user: who asks; key of the state cache.
      budget: seconds from arrival to answer; None takes the engine's.
      feature_version: changes whenever the user's features change; requests with the same (user, feature_version) share one
        state. None: the state answers this request alone, unless `prepare` made it; it may stand in where that of a later
        request is late or fails.
      order: by "logit", by "bid" (calibrated probability x bid), or by a name among `ServingConfig.orders`; None: the engine's.
      exclude: item ids that are not ranked, such as those the user has met, of the candidates' kind; None for none.
      context: anything that `features` and `retrieval` want to know.

    Raises:
      TypeError: a user or feature version that cannot be hashed; excluded ids that are neither integers nor strings.
      ValueError: an order that is no name; a budget that is not a positive number of seconds; a user, feature version or
        excluded id of more than 1,024 characters.
    """

    user: Hashable
    budget: float | None = None
    feature_version: Hashable = None
    order: str | None = None
    exclude: Any = dataclasses.field(default=None, compare=False)  # an array [E] or None: arrays have no plain equality
    context: Any = None

    def __post_init__(self):
        for field in ("user", "feature_version"):
            try:
                hash(getattr(self, field))
            except TypeError as error:
                raise TypeError(f"Request.{field}: expected something hashable, got {error}") from None
            size = len(value) if isinstance(value := getattr(self, field), str) else 0
            expect(size <= MOST_CHARACTERS, f"Request.{field}", f"at most {MOST_CHARACTERS} characters", size)
        expect_budget(self.budget, "Request.budget")
        named = self.order is None or isinstance(self.order, str)
        expect(named, "Request.order", "None, 'logit', 'bid' or a name among the orders", repr(self.order))
        if self.exclude is not None:
            object.__setattr__(self, "exclude", plain_ids(self.exclude, "Request.exclude"))


def expect_budget(budget: Any, name: str) -> None:
    """Raise ValueError unless a budget is None or a finite number of seconds above 0."""
    if budget is not None and not (isinstance(budget, int | float | np.number) and 0 < budget < math.inf):
        expect(False, name, "None or more than 0 seconds", repr(budget))


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """What retrieval gives: item ids [C] and, where the candidates carry them, bids [C]; made of arrays or lists.

    Attributes:
      ids: item ids [C], int64 or strings, as raw data have them.
      bids: float32 [C], or None.

    Raises:
      TypeError: ids that are neither integers nor strings, None or both kinds among them, integers beyond int64.
      ValueError: not one axis; ids of more than 1,024 characters; bids of another length, no numbers, not finite or negative.

    Example:
      >>> Candidates([7, 9]).ids
      array([7, 9])
    """

    ids: np.ndarray
    bids: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "ids", plain_ids(self.ids, "candidates"))
        if self.bids is None:
            return
        try:
            given = np.asarray(self.bids)
        except ValueError as error:
            raise ValueError(f"bids: expected numbers [C], got {type(self.bids).__name__}: {error}") from None
        if given.dtype.kind not in "iuf":
            each = enumerate(np.ravel(np.array(self.bids, object)))
            wrong = (f"{bid!r:.80} at position {at}" for at, bid in each if not isinstance(bid, int | float | np.number))
            expect(False, "bids", "numbers [C], none null", next(wrong, given.dtype))
        one_each, good = given.shape == self.ids.shape, ((given >= 0) & (given <= np.finfo(np.float32).max)).all()
        expect(one_each, "bids", f"one bid for each of {len(self.ids)} ids", f"shape {list(given.shape)}")
        expect(good, "bids", "finite bids of 0 or more", "some that are not")
        object.__setattr__(self, "bids", given.astype(np.float32, copy=False))


def plain_ids(raw: Any, name: str) -> np.ndarray:
    """Return item ids [C] as an array of int64 or strings; raises as `Candidates`."""
    listed = isinstance(raw, list | tuple)
    values: Any = raw if listed else np.asarray(raw)
    nested = listed and len(values) > 0 and isinstance(values[0], list | tuple | np.ndarray)
    if nested or (not listed and values.ndim != 1):
        got = f"{type(raw).__name__} of {type(values[0]).__name__}" if nested else f"shape {list(values.shape)}"
        if not listed and values.dtype == object and values.ndim == 0:
            got = type(values.item()).__name__
        raise ValueError(f"{name}: expected item ids [C], one axis of integers or strings, got {got}")
    if not listed and (values.dtype == np.int64 or (values.dtype.kind in "UT" and not hasattr(values.dtype, "na_object"))):
        if values.dtype.kind != "i":
            expect_short(values, name)
        return values
    return id_array(as_ids(values, name))


class Span(NamedTuple):
    """One stage: start and end in seconds."""

    stage: str
    start: float
    end: float


@dataclasses.dataclass(eq=False)
class Timeline:
    """When each stage of one request ran.

    Stages: `features` (your callable) and `user` (upload and user function), from before the arrival where another request
    began the state; `retrieval`; then, with the candidates there, `wait_user` (the user side was not ready yet), `queue` (for a
    scoring thread), `lookup`, `score` (upload, interaction, top-k), `fetch` (of the results); `critical` (candidates there ->
    answer ready) and `total`.

    Attributes:
      arrival: time of `time.perf_counter` at which the request arrived, in seconds.
      clocked: stages by the same clock.
    """

    arrival: float = dataclasses.field(default_factory=time.perf_counter)
    clocked: list[Span] = dataclasses.field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """Stages with their seconds since the arrival."""
        return [Span(stage, start - self.arrival, end - self.arrival) for stage, start, end in self.clocked]

    def stages(self) -> dict[str, float]:
        """Return seconds by stage."""
        return {stage: end - start for stage, start, end in self.clocked}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What `Ranking` and `Scores` share.

    Attributes:
      logits: float32 [C], or [C, T] of T objectives; -inf where the mask is false.
      mask: bool [C].
      version: version of the model and index that scored.
      non_finite: how many known candidates have no score because it would be NaN or infinite.
      degraded: whether the user's own fresh state was not used, or the model does not know most of the history that it was
        made from, see `ServingConfig.max_unknown`.
      reason: why, in words; None otherwise.
      stand_in: "stale state" or "unknown user", whose answer this is as the user's own state was late or failed; else None.
      state_age: seconds since the fetch of the features that the user state was made from; None where the unknown user stands
        in for a late or failed user side.
      timeline: when each stage ran.
    """

    version: str
    non_finite: int
    degraded: bool
    reason: str | None
    stand_in: str | None
    state_age: float | None
    timeline: Timeline
    logits: np.ndarray
    mask: np.ndarray
    _probabilities: Callable[[np.ndarray], dict[str, np.ndarray]] = dataclasses.field(repr=False)

    @functools.cached_property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage; see `Timeline`."""
        return self.timeline.stages()

    @property
    def probabilities(self) -> dict[str, np.ndarray]:
        """Calibrated probabilities float32 [C] by objective, "" for one without a name; 0 where the mask is false.

        They are those that orders read, "NAME|GIVEN" of a conditional objective among them, of the version that
        scored; computed here, on the host, when asked for.
        """
        return self._probabilities(self.logits)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ranking(Answer):
    """The answer to `rank`: the best k, best first; ties keep the candidates' order.

    A candidate that comes twice is ranked once, with its higher bid. Where fewer than k candidates have a score, the mask is
    false for the rest, which carries no real id.

    Attributes:
      ids: [k] item ids as retrieval gave them, int64 or strings; -1 or "" where the mask is false.
      scores: float32 [k] what the ranking is by: the logit, or the value of an order; -inf where the mask is false.
      logits: float32 [k], or [k, T] of T objectives; -inf where the mask is false.
      mask: bool [k].
      candidates: how many candidates came, known or not.
      unknown: how many of them the index does not hold.
      excluded: how many of them the index holds, but `Request.exclude` leaves out.
    """

    ids: np.ndarray
    scores: np.ndarray
    candidates: int
    unknown: int
    excluded: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores(Answer):
    """The answer to `score`, in the order of the candidates.

    Attributes:
      mask: bool [C] true where the index holds the candidate, `Request.exclude` does not leave it out and its score is finite.
    """


class Overloaded(RuntimeError):
    """Too many requests, or more work than a budget leaves time for: refused at once, so that the caller can go elsewhere."""


class DeadlineExceeded(TimeoutError):
    """No answer within the request's budget, or `callable_timeout`; the message names the stage that was waited for."""


class EngineClosed(RuntimeError):
    """The engine has not started, is draining, or has shut down, perhaps before an answer was there."""


class CallerError(ValueError):
    """Raise it from `features` for an invalid request; logged without traceback."""


class CallableError(RuntimeError):
    """`features` or `retrieval` raised SystemExit, KeyboardInterrupt, StopIteration or CancelledError, which no callable may
    do, or `max_hung` of its calls have never returned."""


class NonFiniteScores(ArithmeticError):
    """Scores that are NaN or infinite: of every known candidate of a request, or of a new version's test request."""
