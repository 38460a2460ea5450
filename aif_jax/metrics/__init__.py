"""Ranking quality: AUC, GAUC, HR@k, recall@k, NDCG@k, log-loss and calibration, on the host in float64.

Every metric is `f(scores, labels, *, where=None, ...)`: scores and labels (0 or 1) of one shape, and a bool mask that is true
where an entry counts. Masked entries are never read. Only the order of scores matters, except to log-loss and calibration,
which take logits. The rules are the same everywhere:

- *Ties* count as if broken at random: the value is the exact expectation over all orders of tied scores, so a model that
  scores everything alike gets chance level, and permuting candidates changes nothing.
- *Undefined* values (no data, one class only) are NaN, never an exception in the middle of an evaluation. Lists or groups
  without a value are left out of a mean and counted.
- *Bad input* (NaN scores, other labels than 0 and 1, shapes that do not fit) is a ValueError. Infinite scores are fine: they
  have an order.

Sources: AUC as the rank statistic of Mann and Whitney 1947; GAUC, Zhu et al. 2017 and DIN (arXiv 1706.06978); NDCG, Jarvelin
and Kekalainen 2002, ties as in McSherry and Najork 2008; expected calibration error, Guo et al. 2017 (arXiv 1706.04599).
"""

from aif_jax.metrics.means import Averaged
from aif_jax.metrics.pairs import Weighting, auc, gauc
from aif_jax.metrics.probabilities import Calibration, calibration, log_loss
from aif_jax.metrics.top_k import hit_rate_at_k, ndcg_at_k, recall_at_k, top_k_labels

__all__ = [
    "auc", "gauc", "Weighting",
    "hit_rate_at_k", "recall_at_k", "ndcg_at_k", "top_k_labels",
    "log_loss", "calibration",
    "Averaged", "Calibration",
]  # fmt: skip
