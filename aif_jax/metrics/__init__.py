"""Ranking quality: AUC, GAUC, recall@k, log-loss and calibration, on the host in float64.

Every metric is `f(scores, labels, *, where=None, ...)`. Masked entries are never read. Only the order of scores matters, except
to log-loss and calibration, which take logits. A name that ends with `by_user` is a metric before its mean over users.

- *Ties* count as if broken at random: the value is the exact expectation over all orders of tied scores.
- *Undefined* values (no data, one class only) are NaN. Lists and users without a value are left out of a mean.
- *Bad input* (NaN scores, other labels than 0 and 1, shapes that do not fit) is a ValueError. Infinite scores have an order.

Sources: AUC, Mann and Whitney 1947; GAUC, Zhu et al. 2017 and DIN (arXiv 1706.06978); expected calibration error, Guo et
al. 2017 (arXiv 1706.04599). HR@k and NDCG@k of an event's item in the catalogue: `train.evaluate`.
"""

# ruff: noqa: I001

from aif_jax.metrics.entries import (
    ByUser, Calibration, Mean, auc, calibration, gauc_by_user, ranker_recall_at_k, recall_at_k, top_k_labels,
)  # fmt: skip
from aif_jax.metrics.intervals import (
    Interval, auc_by_user, mean_by_user, paired_interval, paired_intervals,
    probabilities_by_user, user_interval, user_intervals,
)  # fmt: skip

__all__ = [
    "auc", "recall_at_k", "top_k_labels", "ranker_recall_at_k", "calibration",
    "ByUser", "Interval", "gauc_by_user", "mean_by_user", "auc_by_user", "probabilities_by_user",
    "user_interval", "user_intervals", "paired_interval", "paired_intervals",
    "Mean", "Calibration",
]  # fmt: skip
