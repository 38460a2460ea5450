"""What all metrics share: checks of their arguments, means with their sample counts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect, expect_like_scores


class Averaged(NamedTuple):
    """A mean over groups or lists, and over how many of them."""

    value: float  # NaN where `used` is 0
    used: int  # groups or lists that have a value
    left_out: int  # those without one: of one class only (GAUC), without a positive (HR, recall, NDCG)


def ratio(above: Any, below: Any) -> float:
    """The quotient; NaN where there is nothing to divide by."""
    return float(above / below) if below else math.nan


def check_at_least_one(number: int, name: str) -> None:
    """Raises ValueError unless `number` is an integer of at least 1."""
    expect(isinstance(number, int | np.integer) and number >= 1, name, "an integer of at least 1", repr(number))


def valid_entries(scores: Any, labels: Any, where: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [n] and positive bool [n] of the valid entries, flat."""
    scores, labels, valid = _checked(scores, labels, where)
    return scores[valid], labels[valid] != 0


def grouped_entries(scores: Any, labels: Any, groups: Any, where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `valid_entries`, with the groups [n]."""
    scores, labels, valid = _checked(scores, labels, where)
    groups = np.asarray(groups)
    expect(groups.dtype.kind != "f" or not groups.size, "groups", "integers or strings", groups.dtype)
    return scores[valid], labels[valid] != 0, _broadcast(groups, "groups", scores.shape)[valid]


def listed_entries(scores: Any, labels: Any, where: Any, *, graded: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and mask as [B, C]; masked scores are -inf, masked labels 0. Labels are bool unless graded."""
    scores, labels, valid = _checked(scores, labels, where, graded=graded)
    expect(scores.ndim > 0, "scores", "lists [..., C]", "a single number")
    shape = (math.prod(scores.shape[:-1]), scores.shape[-1])
    labels = np.where(valid, labels, 0)
    if not graded:
        labels = labels != 0
    return np.where(valid, scores, -np.inf).reshape(shape), labels.reshape(shape), valid.reshape(shape)


def _checked(scores: Any, labels: Any, where: Any, *, graded: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores float64, labels and mask, all of the shape of `scores`."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    expect(labels.shape == scores.shape, "labels", f"the shape of scores {scores.shape}", labels.shape)
    valid = np.asarray(True if where is None else where)
    expect(valid.dtype == np.bool_, "where", "a bool mask", f"dtype {valid.dtype}")
    valid = np.broadcast_to(valid, scores.shape) if where is None else _broadcast(valid, "where", scores.shape)
    if labels.dtype != np.bool_:
        labels = labels.astype(np.float64)
        wrong = ~(np.isfinite(labels) & (labels >= 0)) if graded else (labels != 0) & (labels != 1)
        _refuse(wrong & valid, labels, "labels", "finite values of at least 0" if graded else "0 or 1")
    _refuse(np.isnan(scores) & valid, scores, "scores", "no NaN")
    return scores, labels, valid


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, expected: str) -> None:
    if wrong.any():
        place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        index = [int(i) for i in place]
        raise ValueError(f"{name}: expected {expected}, got {values[place]} at {index} ({int(wrong.sum())} such entries)")


def _broadcast(value: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    expect_like_scores(value.shape, name, shape)
    return np.broadcast_to(value, shape)
