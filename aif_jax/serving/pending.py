"""A request between its admission and its answer."""

import dataclasses

import numpy as np

from aif_jax.serving.requests import Candidates, Request, Timeline
from aif_jax.serving.scoring import UserSide
from aif_jax.serving.versions import Version

NO_CANDIDATES = Candidates(np.zeros(0, np.int64))


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """One accepted request, and what is known of it so far."""

    request: Request
    version: Version  # of the model, for the whole request
    timeline: Timeline
    budget: float | None  # seconds from arrival to answer; None for no limit
    deadline: float | None  # by `time.perf_counter`
    waiting_for: str  # the stage that a missed deadline is reported as
    user: UserSide | None = None  # whose state scores
    candidates: Candidates = NO_CANDIDATES
    candidates_there: float = 0.0  # when they came
    submitted: float = 0.0  # when the latest were queued for a scoring thread
    reason: str | None = None  # why the answer is degraded, in words
    degraded: str | None = None  # the same, as a counter's name
    stand_in: str | None = None  # whose state scores in place of the user's own
