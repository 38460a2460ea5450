"""A request between its admission and its answer."""

import dataclasses

from aif_jax.serving.requests import Request, Timeline
from aif_jax.serving.scoring import Snapshot, UserSide
from aif_jax.serving.versions import Version


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
    snapshot: Snapshot | None = None  # of the index, pinned with the state
    kind: str | None = None  # of the candidates' ids: "integers" or "strings"
    bucket: int = 0  # candidates that the latest call of the scoring program was padded to
    candidates_there: float | None = None  # when the latest candidates came
    submitted: float = 0.0  # when the latest were queued for a scoring thread
    reason: str | None = None  # why the answer is degraded, in words
    degraded: str | None = None  # the same, as a counter's name
    stand_in: str | None = None  # whose state scores in place of the user's own
