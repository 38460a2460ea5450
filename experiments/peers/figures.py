"""Figures of outcomes, each with its error, and paired differences: a bootstrap over users."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.peers.lists import Lists
from experiments.peers.outcomes import ByUser, Outcomes, hits_by_user

CUTS = (10, 50, 100, 500)
DRAWS = 2000


def figures(lists: Lists, found: Outcomes, *, deepest: int | None = None) -> dict[str, ByUser]:
    """Name to the figure by user: "gauc asked" and "hr@100 asked" for each kind of list, k and kind of rank.

    Args:
      lists: the slice.
      found: of one model on it.
      deepest: the largest k whose HR@k is known; None for all.
    """
    made = {f"gauc {kind}": value for kind, value in found.aucs.items()}
    for kind, ranks in found.ranks.items():
        for k in CUTS:
            if deepest is None or k <= deepest:
                made[f"hr@{k} {kind}"] = hits_by_user(ranks, lists.user, k=k)
    return made


def level(figure: ByUser) -> float:
    """The weighted mean over users."""
    return float(figure.value @ figure.weight / figure.weight.sum())


def resampled(users: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each user occurs in samples of as many users with replacement, [draws, users]; the same for each model."""
    return np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=draws)


def error(figure: ByUser, samples: np.ndarray) -> float:
    """The standard error of the level: its deviation over samples of users."""
    return float(_levels(figure, samples).std(ddof=1))


def difference(figure: ByUser, reference: ByUser, samples: np.ndarray) -> dict[str, float]:
    """How much the figure is above the reference's on the same users.

    Returns:
      `value`; `low` and `high`, the middle 95 % over samples of users; `error`, the standard error.

    Raises:
      ValueError: figures of different users.
    """
    if not np.array_equal(figure.weight, reference.weight):
        raise ValueError("difference: expected figures of the same requests of the same users, got others")
    drawn = _levels(figure, samples) - _levels(reference, samples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = level(figure) - level(reference)
    return {"value": value, "low": float(low), "high": float(high), "error": float(drawn.std(ddof=1))}


def others(lists: Lists, found: Outcomes) -> dict[str, float]:
    """What masking hides: untrained items among the hundred best as asked, HR@100 of untrained targets and of the others."""
    made: dict[str, Any] = {}
    if found.untrained_at_top is not None:
        made["untrained in the top 100"] = float(found.untrained_at_top.mean())
    untrained = lists.count[lists.target] == 0
    if "asked" in found.ranks:
        hits = found.ranks["asked"] < 100
        for name, chosen in (("untrained", untrained), ("trained", ~untrained)):
            if chosen.any():
                made[f"hr@100 asked, {name} targets"] = float(hits[chosen].mean())
    return made


def _levels(figure: ByUser, samples: np.ndarray) -> np.ndarray:
    return samples @ (figure.value * figure.weight) / (samples @ figure.weight)
