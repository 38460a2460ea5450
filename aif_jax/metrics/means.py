"""Means with their sample counts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Averaged(NamedTuple):
    """A mean over groups or lists, and over how many of them."""

    value: float  # NaN where `used` is 0
    used: int  # groups or lists that have a value
    left_out: int  # those without one: of one class only (GAUC), without a positive (HR, recall, NDCG)


def ratio(above: Any, below: Any) -> float:
    """The quotient; NaN where there is nothing to divide by."""
    return float(above / below) if below else math.nan
