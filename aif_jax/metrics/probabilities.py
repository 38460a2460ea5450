"""Of probabilities, from logits: log-loss and calibration, whole and streaming."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aif_jax.metrics.entries import check_bins, valid_entries
from aif_jax.metrics.means import StreamingMean, ratio


class Calibration(NamedTuple):
    """Predicted against observed rates."""

    ratio: float  # sum of probabilities / positives: 1 is right, above 1 predicts too much; NaN without a positive
    error: float  # expected calibration error: mean over entries of |predicted - observed| of their bin
    predicted: np.ndarray  # float64 [bins] mean probability, NaN where the bin is empty
    observed: np.ndarray  # float64 [bins] share of positives, NaN where the bin is empty
    entries: np.ndarray  # int64 [bins]


def log_loss(scores: Any, labels: Any, *, where: Any = None) -> float:
    """Mean of -log of the probability that the model gave to what happened.

    mean of log(1 + exp(-s)) for a positive, log(1 + exp(s)) for a negative

    Args:
      scores: logits of any shape.
      labels: 0 or 1, shape of `scores`.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.

    Returns:
      Nats, at least 0; infinite where an infinite logit is wrong; NaN without data.

    Raises:
      ValueError: as `auc`.

    Example:
      >>> round(log_loss([0.0, 2.0], [1, 1]), 4)
      0.41
    """
    total = StreamingLogLoss()
    total.update(scores, labels, where=where)
    return total.result()


def calibration(scores: Any, labels: Any, *, where: Any = None, bins: int = 10) -> Calibration:
    """Predicted against observed: the overall ratio, and the error by bins of equal width in probability.

    ratio = sum of sigmoid(s) / positives; error = sum over bins of |sum of sigmoid(s) - positives| in the bin / entries

    Where all probabilities are small (advertising), ten bins put everything in the first: take more.

    Args:
      scores: logits of any shape.
      labels: 0 or 1, shape of `scores`.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.
      bins: how many, of equal width over [0, 1].

    Returns:
      Ratio, error and the table of bins, for a reliability diagram.

    Raises:
      ValueError: as `auc`, and for bins below 1.

    Example:
      >>> calibration([0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0])[:2]
      (2.0, 0.25)
    """
    total = StreamingCalibration(bins=bins)
    total.update(scores, labels, where=where)
    return total.result()


class StreamingLogLoss:
    """Log-loss of entries that arrive in batches.

    Example:
      >>> total = StreamingLogLoss()
      >>> total.update([0.0], [1])
      >>> total.update([2.0], [1])
      >>> round(total.result(), 4)
      0.41
    """

    def __init__(self) -> None:
        self._mean = StreamingMean()

    def update(self, scores: Any, labels: Any, *, where: Any = None) -> None:
        """Adds entries; arguments and errors as those of `log_loss`."""
        scores, positive = valid_entries(scores, labels, where)
        self._mean.update(np.logaddexp(0, np.where(positive, -scores, scores)))

    def result(self) -> float:
        """The mean so far; NaN without data."""
        return self._mean.result().value


class StreamingCalibration:
    """Calibration of entries that arrive in batches.

    Args:
      bins: how many, of equal width over [0, 1].

    Raises:
      ValueError: bins below 1.

    Example:
      >>> total = StreamingCalibration()
      >>> total.update([0.0, 0.0], [1, 0])
      >>> total.update([0.0, 0.0], [0, 0])
      >>> total.result()[:2]
      (2.0, 0.25)
    """

    def __init__(self, *, bins: int = 10):
        check_bins(bins)
        self._sums = np.zeros((2, bins))  # probabilities, positives
        self._count = np.zeros(bins, np.int64)

    def update(self, scores: Any, labels: Any, *, where: Any = None) -> None:
        """Adds entries; arguments and errors as those of `calibration`."""
        scores, positive = valid_entries(scores, labels, where)
        probability = np.exp(-np.logaddexp(0, -scores))  # sigmoid without overflow
        bins = len(self._count)
        at = np.minimum((probability * bins).astype(np.int64), bins - 1)
        self._count += np.bincount(at, minlength=bins)
        for i, values in enumerate((probability, positive)):
            self._sums[i] += np.bincount(at, values, minlength=bins)

    def result(self) -> Calibration:
        """Ratio, error and table so far; NaN where undefined."""
        predicted, observed = self._sums / np.where(self._count > 0, self._count, np.nan)
        gap = float(np.abs(self._sums[0] - self._sums[1]).sum())
        overall = ratio(self._sums[0].sum(), self._sums[1].sum())
        return Calibration(overall, ratio(gap, self._count.sum()), predicted, observed, self._count.copy())
