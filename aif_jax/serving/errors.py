"""Engine exceptions."""

from __future__ import annotations


class Overloaded(RuntimeError):
    """The engine holds as many requests as it may: refused at once, so that the caller can go elsewhere or retry later."""


class DeadlineExceeded(TimeoutError):
    """No answer within the request's budget; the message names the stage that was waited for."""


class EngineClosed(RuntimeError):
    """The engine has not started, is draining, or has shut down."""


class CallableError(RuntimeError):
    """`features` or `retrieval` raised SystemExit, KeyboardInterrupt, StopIteration or CancelledError, which no callable may,
    or has as many calls that never returned as the engine tolerates."""


class NonFiniteScores(ArithmeticError):
    """Scores that are NaN or infinite: of every known candidate of a request, or of the probe of a version that is refused.

    Attributes:
      non_finite, unknown, excluded: candidates of the request without a finite score, those that the index does not hold, and
        those that `Request.exclude` leaves out.
    """

    def __init__(self, message: str, *, non_finite: int = 0, unknown: int = 0, excluded: int = 0):
        super().__init__(message)
        self.non_finite, self.unknown, self.excluded = non_finite, unknown, excluded
