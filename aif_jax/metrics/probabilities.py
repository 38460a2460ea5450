"""Log-loss and calibration: from logits, as probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aif_jax.metrics.entries import check_at_least_one, ratio, valid_entries


class Calibration(NamedTuple):
    """Predicted against observed rates."""

    ratio: float  # sum of probabilities / positives: 1 is right, above 1 predicts too much; NaN without a positive
    error: float  # expected calibration error: mean over entries of |predicted - observed| of their bin
    predicted: np.ndarray  # float64 [bins] mean probability, NaN where the bin is empty
    observed: np.ndarray  # float64 [bins] share of positives, NaN where the bin is empty
    entries: np.ndarray  # int64 [bins]


def log_loss(scores: Any, labels: Any, *, where: Any = None) -> float:
    """Mean of -log of the probability that the model gave to what happened, in nats: log(1 + exp(-s)) for a positive.

    Args:
      scores: logits; `labels`, `where` as in `auc`.

    Returns:
      At least 0; infinite where an infinite logit is wrong; NaN without data.

    Raises:
      ValueError: as `auc`.

    Example:
      >>> round(log_loss([0.0, 2.0], [1, 1]), 4)
      0.41
    """
    scores, positive = valid_entries(scores, labels, where)
    return ratio(np.logaddexp(0, np.where(positive, -scores, scores)).sum(), len(scores))


def calibration(scores: Any, labels: Any, *, where: Any = None, bins: int = 10) -> Calibration:
    """Predicted against observed: the overall ratio, and the error by bins of equal width in probability.

    ratio = sum of sigmoid(s) / positives; error = sum over bins of |sum of sigmoid(s) - positives| in the bin / entries

    Args:
      scores: logits; `labels`, `where` as in `auc`.
      bins: how many, of equal width over [0, 1]; where all probabilities are small (advertising), take more than ten.

    Returns:
      Ratio, error and the table of bins, for a reliability diagram.

    Raises:
      ValueError: as `auc`, and for bins below 1.

    Example:
      >>> calibration([0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0])[:2]
      (2.0, 0.25)
    """
    check_at_least_one(bins, "bins")
    scores, positive = valid_entries(scores, labels, where)
    probability = np.exp(-np.logaddexp(0, -scores))  # sigmoid without overflow
    bin_of = np.minimum((probability * bins).astype(np.int64), bins - 1)
    entries = np.bincount(bin_of, minlength=bins)
    probabilities, positives = (np.bincount(bin_of, values, minlength=bins) for values in (probability, positive))
    predicted, observed = np.stack([probabilities, positives]) / np.where(entries > 0, entries, np.nan)
    error = ratio(np.abs(probabilities - positives).sum(), entries.sum())
    return Calibration(ratio(probabilities.sum(), positives.sum()), error, predicted, observed, entries)
