"""How sure a metric is: intervals that resample users, and paired comparisons of two models on the same requests.

Requests of one user are alike, so the error of a ranking metric is that of its users, not of its requests: the bootstrap draws
users with replacement (Efron 1979; for search metrics Sakai 2006). Two models are compared on the same draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.metrics.entries import Weighting, groups_auc

DRAWS = 2000


class ByUser(NamedTuple):
    """A metric that is a weighted mean over users, before it is averaged.

    Attributes:
      users: int64 [U], ascending, each once.
      values: float64 [U], the metric of each user alone.
      weights: float64 [U], above 0.
    """

    users: np.ndarray
    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """The weighted mean; NaN without users."""
        total = self.weights.sum()
        return float(self.values @ self.weights / total) if total > 0 else float("nan")


class Interval(NamedTuple):
    """A value and the bounds of its percentile interval; NaN where there is no user."""

    value: float
    low: float
    high: float


def gauc_by_user(scores: Any, labels: Any, users: Any, *, where: Any = None, weighting: Weighting = "impressions") -> ByUser:
    """`gauc` before it is averaged; users with one class only are left out. Arguments as for `gauc`.

    Example:
      >>> gauc_by_user([0.2, 0.9, 0.3, 0.3], [0, 1, 0, 1], [7, 7, 8, 8]).values.tolist()
      [1.0, 0.5]
    """
    return ByUser(*groups_auc(scores, labels, users, where=where, weighting=weighting)[:3])


def mean_by_user(values: Any, users: Any) -> ByUser:
    """The mean of a value of each request, such as 1 for a hit: float [R] and integer users [R]; a user weighs by requests.

    Example:
      >>> mean_by_user([1, 0, 1], [3, 3, 5]).mean
      0.6666666666666666
    """
    values, users = np.asarray(values, np.float64), np.asarray(users)
    expect(values.shape == users.shape and values.ndim == 1, "users", f"shape {list(values.shape)}", list(users.shape))
    unique, place, count = np.unique(users, return_inverse=True, return_counts=True)
    return ByUser(unique.astype(np.int64), np.bincount(place, values, len(unique)) / count, count.astype(np.float64))


def user_interval(metric: ByUser, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean and its percentile interval over resampled users.

    Args:
      metric: from `gauc_by_user` or `mean_by_user`.
      draws: bootstrap samples.
      level: share of the draws inside the interval, between 0 and 1.
      seed: seed of the draws.
    """
    means = _resampled([metric], metric.users, draws, seed)[0]
    return Interval(metric.mean, *_bounds(means, level))


def paired_interval(
    metric: ByUser, other: ByUser, *, ratio: bool = False, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """metric - other, or metric / other, where both are resampled by the same users.

    Args:
      metric, other: of two models on the same requests; users of one alone count for it alone.
      ratio: divide in place of subtracting.
      draws, level, seed: as for `user_interval`.

    Example:
      >>> a, b = mean_by_user([1, 1, 0], [1, 2, 3]), mean_by_user([1, 0, 0], [1, 2, 3])
      >>> paired_interval(a, b).value, paired_interval(a, b).low >= 0
      (0.3333333333333333, True)
    """
    users = np.union1d(metric.users, other.users)
    ours, theirs = _resampled([metric, other], users, draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.float64(metric.mean) / other.mean if ratio else metric.mean - other.mean
        drawn = ours / theirs if ratio else ours - theirs
    return Interval(float(value), *_bounds(drawn, level))


def _resampled(metrics: list[ByUser], users: np.ndarray, draws: int, seed: int) -> list[np.ndarray]:
    """Means float64 [draws] of each metric, over the same draws of users."""
    expect(draws >= 1, "draws", "at least 1", draws)
    random, size = np.random.default_rng(seed), len(users)
    places = [np.searchsorted(users, metric.users) for metric in metrics]
    means = np.full((len(metrics), draws), np.nan)
    for draw in range(draws if size else 0):
        times = np.bincount(random.integers(0, size, size), minlength=size)
        for row, metric, place in zip(means, metrics, places, strict=True):
            weight = metric.weights * times[place]
            total = weight.sum()
            row[draw] = metric.values @ weight / total if total > 0 else np.nan
    return list(means)


def _bounds(drawn: np.ndarray, level: float) -> tuple[float, float]:
    expect(0 < level < 1, "level", "a share between 0 and 1", level)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
