"""Means that know what they stand on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from aif_jax.metrics.entries import valid_entries


class Averaged(NamedTuple):
    """A mean over groups or lists, with how many it stands on."""

    value: float  # NaN where `used` is 0
    used: int  # groups or lists that have a value
    left_out: int  # those without one: of one class only (GAUC), without a positive (HR, recall, NDCG)


class StreamingMean:
    """The mean of values that arrive in batches.

    Example:
      >>> mean = StreamingMean()
      >>> mean.update([1.0, 2.0])
      >>> mean.merge(Averaged(value=1.0, used=1, left_out=0))
      >>> mean.result()
      Averaged(value=1.3333333333333333, used=3, left_out=0)
    """

    def __init__(self) -> None:
        self._total, self._used, self._left_out = 0.0, 0, 0

    def update(self, values: Any, *, where: Any = None) -> None:
        """Adds values of any shape, where the mask is true. Raises ValueError for NaN."""
        values, _ = valid_entries(values, np.zeros(np.shape(values)), where, name="values")
        self._total += float(values.sum())
        self._used += len(values)

    def merge(self, part: Averaged) -> None:
        """Adds a mean over other lists, each list with the weight 1; not for GAUC weighted by impressions."""
        if part.used:
            self._total += part.value * part.used
        self._used += part.used
        self._left_out += part.left_out

    def result(self) -> Averaged:
        """The mean so far; NaN without data."""
        return Averaged(ratio(self._total, self._used), self._used, self._left_out)


def ratio(above: Any, below: Any) -> float:
    """The quotient; NaN where there is nothing to divide by."""
    return float(above / below) if below else math.nan
