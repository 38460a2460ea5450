"""Baselines to judge a model by: a score of each item as of a moment, the same for every user.

`Run.evaluate` ranks the requests and candidates of the model by them too, see `Evaluation.baselines`.
"""

from collections.abc import Mapping

import numpy as np

from aif_jax.checks import BLOCK
from aif_jax.data.dataset import Dataset
from aif_jax.data.negatives import SeenPairs, counts_before
from aif_jax.data.statistics import SMOOTHING


def baseline_scores(data: Dataset, *, before: int, thresholds: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Return scores float64 [N] of every catalogue row from the events before a time in seconds, by name of the baseline.

    - "popularity": events of the item in `Dataset.history_log`.
    - "latest": seconds of the item's first event in the log; items without an earlier event come last.
    - "NAME_rate" for each threshold, such as "click_rate": the smoothed share of positives, (n + 20 p) / (shown + 20), with
      shown the item's events of known actions, n those at or above the threshold, and p that share of all.

    Args:
      thresholds: the least action row of a positive, by name, as those of `Impressions`.

    Example:
      >>> import aif_jax as aif
      >>> events = {"user": [1, 2, 3], "item": [7, 7, 8], "time": [10, 20, 30]}
      >>> data = aif.read(events, items={"item": [7, 8], "category": [1, 1]}, columns=aif.Columns())
      >>> {name: scores[1:].tolist() for name, scores in baseline_scores(data, before=30).items()}
      {'popularity': [2.0, 0.0], 'latest': [10.0, -inf]}
    """
    log, count, thresholds = data.log, len(data.catalogue), thresholds or {}
    first, shown = np.full(count, np.inf), np.zeros(count)
    positive = {name: np.zeros(count) for name in thresholds}
    for start in range(0, len(log), BLOCK):
        item, action, time = (getattr(log, name)[start : start + BLOCK] for name in ("item", "action", "time"))
        earlier = time < before
        np.minimum.at(first, item[earlier], time[earlier])
        shown += np.bincount(item[earlier & (action > 0)], minlength=count)
        for name, least in thresholds.items():
            positive[name] += np.bincount(item[earlier & (action >= least)], minlength=count)
    rates = {
        f"{name}_rate": (clicks + SMOOTHING * (clicks.sum() / max(1, shown.sum()))) / (shown + SMOOTHING)
        for name, clicks in positive.items()
    }
    popularity = counts_before(data, before).astype(np.float64)
    return {"popularity": popularity, "latest": np.where(np.isfinite(first), first, -np.inf)} | rates


def catalogue_ranks(scores: np.ndarray, data: Dataset, positions: np.ndarray) -> np.ndarray:
    """Return int64 [R], ranks of events' items in the catalogue by scores [N], as `evaluate` has them: ties count against."""
    log, order = data.log, np.sort(scores[1:])
    target = log.item[positions]
    ranks = len(order) - np.searchsorted(order, scores[target]) - 1
    seen = None if data.repeats else SeenPairs(data, positions)
    for sample, row in enumerate(target if seen is not None else ()):
        met = seen.items(sample)  # type: ignore[union-attr]
        ranks[sample] -= np.count_nonzero(scores[met[(met > 0) & (met != row)]] >= scores[row])
    return ranks
