"""How sure a metric is: intervals that resample users, and paired comparisons of two models on the same requests.

Requests of one user are alike, so the error of a ranking metric is that of its users, not of its requests: the bootstrap draws
users with replacement (Efron 1979; for search metrics Sakai 2006). Two models are compared on the same draws.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.metrics.entries import ByUser, bin_of, calibration, flat_entries, probability_of, weighted_entries

DRAWS = 2000
CHUNK = 64  # draws at a time
GROUPS = 8192  # of more users random groups are drawn in place of single users: as exact for their error, and quicker


class Interval(NamedTuple):
    """A value and the bounds of its percentile interval of 95 %; NaN where there is no user.

    Attributes:
      value, low, high: the figure over all users, and bounds.
    """

    value: float
    low: float
    high: float


def mean_by_user(values: Any, users: Any) -> ByUser:
    """Return mean of a value of each request, such as 1 for a hit: float [R], users as `gauc_by_user`; they weigh by requests.

    Example:
      >>> mean_by_user([1, 0, 1], [3, 3, 5]).mean
      0.6666666666666666
    """
    values, users = np.asarray(values, np.float64), np.asarray(users)
    expect(values.shape == users.shape and values.ndim == 1, "users", f"shape {list(values.shape)}", list(users.shape))
    unique, place, count = _unique(users)
    return ByUser(unique, np.bincount(place, values, len(unique)) / count, count.astype(np.float64))


def auc_by_user(scores: Any, labels: Any, users: Any, *, where: Any = None) -> ByUser:
    """Return `auc`, whose pairs cross users, as a plain mean over users: linear in how often each user is drawn.

    A user's value is AUC + U (sum of its positives' shares of negatives below, and of its negatives' shares of positives
    above, each less AUC, over all positives and over all negatives), as in the clustered error of Obuchowski 1997.

    Example:
      >>> auc_by_user([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], [7, 7, 8, 8]).mean
      0.75
    """
    scores, positive, users = flat_entries(scores, labels, where, users=users)
    order = np.unique(scores, return_inverse=True)[1]
    negatives, positives = (np.bincount(order, sign, minlength=len(scores)) for sign in (~positive, positive))
    below = (np.cumsum(negatives) - negatives / 2)[order]
    above, pairs = (positives.sum() - np.cumsum(positives) + positives / 2)[order], negatives.sum() * positives.sum()
    if not pairs:
        return ByUser(users[:0], *np.zeros((2, 0)))
    area = below[positive].sum() / pairs
    share = np.where(positive, below / negatives.sum() - area, above / positives.sum() - area)
    share /= np.where(positive, positives.sum(), negatives.sum())
    return _linear(area, share, users)


def probabilities_by_user(
    scores: Any, labels: Any, users: Any, *, where: Any = None, weights: Any = None, bins: int = 10
) -> dict[str, ByUser]:
    """Return `log_loss`, and ratio and error of `calibration` as "calibration" and "calibration_error", not averaged.

    The error counts each bin as predicting too much or too little, as it does over all users. Arguments as for `calibration`.

    Example:
      >>> probabilities_by_user([0.0, 0.0], [1, 0], [7, 8])["calibration"].mean
      1.0
    """
    users = flat_entries(scores, labels, where, users=users)[-1]
    flat, positive, weight = weighted_entries(scores, labels, where, weights)
    probability, rates = probability_of(flat), calibration(scores, labels, where=where, weights=weights, bins=bins)
    sign = np.sign(np.nan_to_num(rates.predicted - rates.observed))[bin_of(probability, bins)]
    return {
        "log_loss": mean_by_user(np.logaddexp(0, np.where(positive, -flat, flat)), users),
        "calibration": _ratio(weight * probability, weight * positive, users),
        "calibration_error": _ratio(weight * sign * (probability - positive), weight, users),
    }


def _ratio(above: np.ndarray, below: np.ndarray, users: np.ndarray) -> ByUser:
    """Return sum(above) / sum(below) of entries [n] as a plain mean over users, as `auc_by_user`."""
    if not (total := below.sum()):
        return ByUser(users[:0], *np.zeros((2, 0)))
    value = above.sum() / total
    return _linear(value, (above - value * below) / total, users)


def _linear(value: float, share: np.ndarray, users: np.ndarray) -> ByUser:
    """Return a plain mean over users of value + U (sum of the user's shares of the error)."""
    unique, place, _ = _unique(users)
    return ByUser(unique, value + len(unique) * np.bincount(place, share, len(unique)), np.ones(len(unique)))


def _unique(users: np.ndarray) -> tuple[np.ndarray, ...]:
    expect(users.dtype.kind != "f" or not users.size, "users", "integers or strings", users.dtype)
    return np.unique(users, return_inverse=True, return_counts=True)


def user_interval(metric: ByUser) -> Interval:
    """Return the mean and its percentile interval of 95 % over resampled users."""
    return user_intervals({"": metric})[""]


def user_intervals(metrics: Mapping[str, ByUser]) -> dict[str, Interval]:
    """Return `user_interval` of several metrics by name, over the same draws."""
    means = _resampled(list(metrics.values()))
    return {name: Interval(one.mean, *_bounds(drawn)) for (name, one), drawn in zip(metrics.items(), means, strict=True)}


def paired_interval(metric: ByUser, other: ByUser, *, ratio: bool = False) -> Interval:
    """Return metric - other, or metric / other, where both are resampled by the same users.

    Args:
      metric, other: metrics of two models on the same requests; users of one alone count for it alone.
      ratio: divide in place of subtracting.

    Example:
      >>> a, b = mean_by_user([1, 1, 0], [1, 2, 3]), mean_by_user([1, 0, 0], [1, 2, 3])
      >>> paired_interval(a, b).value, paired_interval(a, b).low >= 0
      (0.3333333333333333, True)
    """
    return paired_intervals({"": metric}, {"": other}, ratio=ratio)[""]


def paired_intervals(
    metrics: Mapping[str, ByUser], others: Mapping[str, ByUser], *, ratio: bool = False
) -> dict[str, Interval]:
    """Return `paired_interval` of the metrics that both have by name, over the same draws."""
    names, found = [name for name in metrics if name in others], {}
    compared = np.divide if ratio else np.subtract
    means = _resampled([of[name] for name in names for of in (metrics, others)])
    for name, ours, theirs in zip(names, means[::2], means[1::2], strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            value, drawn = compared(metrics[name].mean, others[name].mean), compared(ours, theirs)
        found[name] = Interval(float(value), *_bounds(drawn))
    return found


def _resampled(metrics: list[ByUser]) -> np.ndarray:
    """Return means float64 [metrics, DRAWS], all over the same draws of users, or of random groups of many."""
    users = np.unique(np.concatenate([metric.users for metric in metrics])) if metrics else np.zeros(0, np.int64)
    group, times = _draws(len(users), size := min(len(users), GROUPS))
    sums = np.zeros((2, len(metrics), size))
    for row, metric in enumerate(metrics):
        at = group[np.searchsorted(users, metric.users)]
        sums[:, row] = [np.bincount(at, values, size) for values in (metric.values * metric.weights, metric.weights)]
    with np.errstate(divide="ignore", invalid="ignore"):  # no user of a metric may be drawn; a log-loss may be infinite
        some = np.split(times, range(CHUNK, DRAWS, CHUNK))
        value, weight = np.concatenate([sums @ each.astype(np.float64).T for each in some], axis=2)
        return np.where(weight > 0, value / weight, np.nan)


@lru_cache(maxsize=4)  # drawing takes longer than all the rest
def _draws(users: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each user, and how often each group is drawn, uint8 [DRAWS, groups]."""
    random = np.random.default_rng(0)
    group = np.arange(users) if users <= groups else random.permutation(users) % groups
    draws = (random.integers(0, max(1, groups), groups) for _ in range(DRAWS))
    return group, np.stack([np.bincount(drawn, minlength=groups).astype(np.uint8) for drawn in draws])


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)
