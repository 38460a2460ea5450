"""Ranking quality: AUC, GAUC, recall@k, log-loss and calibration, on the host in float64.

Every metric is `f(scores, labels, *, where=None, ...)`. Masked entries are never read. Only the order of scores matters, except
to log-loss and calibration, which take logits.

- *Ties* count as if broken at random: the value is the exact expectation over all orders of tied scores.
- *Undefined* values (no data, one class only) are NaN. Lists or groups without a value are left out of a mean and counted.
- *Bad input* (NaN scores, other labels than 0 and 1, shapes that do not fit) is a ValueError. Infinite scores have an order.

Sources: AUC, Mann and Whitney 1947; GAUC, Zhu et al. 2017 and DIN (arXiv 1706.06978); expected calibration error, Guo et
al. 2017 (arXiv 1706.04599). HR@k and NDCG@k of an event's item in the catalogue: `train.evaluate`.
"""

# ruff: noqa: I001

from aif_jax.metrics.entries import (
    Mean, Calibration, auc, calibration, gauc, log_loss, ranker_recall_at_k, recall_at_k, top_k_labels,
)  # fmt: skip
from aif_jax.metrics.intervals import (
    ByUser, Interval, auc_by_user, gauc_by_user, mean_by_user, paired_interval, paired_intervals,
    probabilities_by_user, user_interval, user_intervals,
)  # fmt: skip

__all__ = [
    "auc", "gauc", "recall_at_k", "top_k_labels", "ranker_recall_at_k", "log_loss", "calibration",
    "ByUser", "Interval", "gauc_by_user", "mean_by_user", "auc_by_user", "probabilities_by_user",
    "user_interval", "user_intervals", "paired_interval", "paired_intervals",
    "Mean", "Calibration",
]  # fmt: skip
