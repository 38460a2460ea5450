"""Calls that must be refused, a line each."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest


def refused(error: type[Exception], message: str, call: Callable[..., Any], /, *given: Any, **options: Any) -> None:
    """`call(*given, **options)` raises `error` with a text in which the regular expression `message` is found, "" for any."""
    __tracebackhide__ = True
    with pytest.raises(error, match=message or None):
        call(*given, **options)


async def refused_later(error: type[Exception], message: str, call: Awaitable[Any], /) -> None:
    """The same of what is awaited."""
    __tracebackhide__ = True
    with pytest.raises(error, match=message or None):
        await call
