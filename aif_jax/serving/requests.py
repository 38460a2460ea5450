"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal

import numpy as np

from aif_jax.serving.timeline import Timeline

Order = Literal["logit", "bid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request for a ranking.

    Attributes:
      user: who asks; key of the state cache.
      budget: seconds from arrival to answer; None takes the engine's.
      feature_version: changes whenever the user's features change; requests with the same (user, feature_version) share one
        state. None: the state serves this request alone, unless `prepare` made it.
      order: by "logit", or by "bid": sigmoid(logit) x bid.
      context: anything that `features` and `retrieval` want to know.
    """

    user: Hashable
    budget: float | None = None
    feature_version: Hashable = None
    order: Order = "logit"
    context: Any = None

    def __post_init__(self):
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"Request.budget: expected None or more than 0 seconds, got {self.budget!r}")
        if self.order not in ("logit", "bid"):
            raise ValueError(f"Request.order: expected 'logit' or 'bid', got {self.order!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """What retrieval gives: item ids [C] and, where the candidates carry them, bids float32 [C]."""

    ids: np.ndarray
    bids: np.ndarray | None = None

    @classmethod
    def of(cls, value: Any) -> Candidates:
        """Candidates from what a retrieval function returned: Candidates, or ids of any one-dimensional kind.

        Raises:
          ValueError: ids that are not one-dimensional integers or strings; bids of another length, not finite or negative.
        """
        ids, bids = (value.ids, value.bids) if isinstance(value, Candidates) else (value, None)
        ids = np.asarray(ids)
        if ids.size == 0 and ids.ndim == 1:
            ids = ids.astype(np.int64) if ids.dtype.kind == "f" else ids
        if ids.ndim != 1 or ids.dtype.kind not in "iuUSO":
            raise ValueError(f"candidates: expected item ids [C], integers or strings, got {ids.dtype} {list(ids.shape)}")
        if bids is not None:
            bids = np.asarray(bids, np.float32)
            if bids.shape != ids.shape:
                raise ValueError(f"candidates: expected one bid for each of {len(ids)} ids, got shape {list(bids.shape)}")
            if not (np.isfinite(bids).all() and (bids >= 0).all()):
                raise ValueError("candidates: expected finite bids of 0 or more, got some that are not")
        return cls(ids, bids)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """The answer to `rank`: the best k, best first; ties stand in the candidates' order.

    Attributes:
      ids: [k] item ids as retrieval gave them; a zero or empty id where the mask is false.
      scores: float32 [k] what the ranking is by: the logit, or sigmoid(logit) x bid; -inf where the mask is false.
      logits: float32 [k]; -inf where the mask is false.
      mask: bool [k]; false where fewer than k candidates are in the index.
      candidates: how many candidates came, known or not.
      unknown: how many of them the index does not hold.
      version: of the model and index that scored.
      degraded: whether the user's own fresh state was not used.
      reason: why it was not, in words; None otherwise.
      stages: seconds of each stage; see `Timeline`.
      timeline: when each stage ran.
    """

    ids: np.ndarray
    scores: np.ndarray
    logits: np.ndarray
    mask: np.ndarray
    candidates: int
    unknown: int
    version: str
    degraded: bool
    reason: str | None
    stages: dict[str, float]
    timeline: Timeline


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The answer to `score`: logits float32 [C] in the order of the candidates (-inf where unknown), and their mask [C].

    The other fields are those of `Ranking`.
    """

    logits: np.ndarray
    mask: np.ndarray
    version: str
    degraded: bool
    reason: str | None
    stages: dict[str, float]
    timeline: Timeline
