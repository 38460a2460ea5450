"""How the engine says no."""

from __future__ import annotations


class Overloaded(RuntimeError):
    """The engine holds as many requests as it may: refused at once, so that the caller can go elsewhere or retry later."""


class DeadlineExceeded(TimeoutError):
    """No answer within the request's budget; the message names the stage that was waited for."""


class EngineClosed(RuntimeError):
    """The engine has not started, is draining, or has shut down."""
