"""What goes wrong, in the words of HTTP and gRPC."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from aif_jax.service.calls import BadCall
from aif_jax.serving import DeadlineExceeded, EngineClosed, NonFiniteScores, Overloaded
from aif_jax.store.version import EncodingMismatch, VersionMismatch

logger = logging.getLogger(__name__)
RETRY_SECONDS = 0.05  # that a refused caller is told to wait: about the time of a few requests

SCORES = "scores"
"""Field of the error that no known candidate has a finite score."""


class UnknownVersion(ValueError):
    """A call for a model version that this service does not hold."""


class UnknownModel(ValueError):
    """A call for a model of another name."""


class Stale(RuntimeError):
    """The model is older than the operator allows, and the service was told to refuse."""


class Problem(NamedTuple):
    """An error as a caller sees it."""

    code: str  # of gRPC
    status: int  # of HTTP
    message: str
    field: str = ""
    retry_after: float | None = None  # seconds
    counts: Mapping[str, int] = {}

    def to_json(self) -> dict[str, Any]:
        """The body of an HTTP answer."""
        entry = {"code": self.code, "message": self.message} | ({"field": self.field} if self.field else {})
        entry |= {"counts": dict(self.counts)} if self.counts else {}
        return {"error": entry | ({} if self.retry_after is None else {"retry_after": self.retry_after})}


def problem_of(error: BaseException) -> Problem:
    """How an error is answered; the text of what no caller can help stays here."""
    text = str(error)
    if isinstance(error, BadCall):
        return Problem("INVALID_ARGUMENT", 400, text, error.field)
    if isinstance(error, Overloaded):
        return Problem("RESOURCE_EXHAUSTED", 429, text, retry_after=RETRY_SECONDS)
    if isinstance(error, DeadlineExceeded):
        return Problem("DEADLINE_EXCEEDED", 504, text)
    if isinstance(error, EngineClosed | Stale):
        return Problem("UNAVAILABLE", 503, text, retry_after=1.0)
    if isinstance(error, UnknownVersion):
        return Problem("FAILED_PRECONDITION", 412, text, "version")
    if isinstance(error, EncodingMismatch | VersionMismatch):
        return Problem("FAILED_PRECONDITION", 412, text, "encoding" if isinstance(error, EncodingMismatch) else "version")
    if isinstance(error, UnknownModel):
        return Problem("NOT_FOUND", 404, text, "model")
    if isinstance(error, NonFiniteScores):
        counts = {"non_finite": error.non_finite, "unknown": error.unknown, "excluded": error.excluded}
        return Problem("INTERNAL", 500, text, SCORES, counts=counts)
    return Problem("INTERNAL", 500, f"the service failed: {type(error).__name__}")


def reported(error: BaseException) -> Problem:
    """`problem_of`, for whoever answers the caller: errors of the service are logged."""
    problem = problem_of(error)
    if problem.code == "INTERNAL":
        logger.error("a call failed: %s", error, exc_info=error)
    return problem


@contextlib.contextmanager
def engine_checks() -> Iterator[None]:
    """What the engine refuses of a request is the caller's; a TypeError or ValueError elsewhere is the service's."""
    try:
        yield
    except (BadCall, VersionMismatch):
        raise
    except (TypeError, ValueError) as error:
        words = str(error).partition(":")[0].lower().split()
        fields = {"request.exclude": "exclude", "candidates": "candidates", "budget": "budget", "order": "order", "k": "k"}
        field = next((field for word, field in fields.items() if word in words), "candidates")
        raise BadCall(field, str(error)) from None
