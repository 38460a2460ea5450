"""Calls that must be refused, a line each."""

from collections.abc import Callable
from typing import Any

import pytest


def refused(error: type[Exception], message: str, call: Callable[..., Any], /, *given: Any, **options: Any) -> None:
    """`call(*given, **options)` raises `error` with a text in which the regular expression `message` is found."""
    __tracebackhide__ = True
    with pytest.raises(error, match=message):
        call(*given, **options)
