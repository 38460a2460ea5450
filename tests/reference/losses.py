"""Losses from their formulas, one list at a time, in float64."""

import numpy as np
from scipy.special import expit, softmax


def lists(where, *arrays):
    """The valid entries of each list."""
    for row, *columns in zip(where, *arrays, strict=True):
        yield tuple(np.asarray(column[row], np.float64) for column in columns)


def mean(values):
    """The mean of numbers; 0 for none."""
    return np.mean(values) if len(values) else 0.0


def pointwise_bce(scores, labels, where):
    s, y = np.asarray(scores[where], np.float64), labels[where]
    return mean(-y * np.log(expit(s)) - (1 - y) * np.log(expit(-s)))


def listwise_softmax(scores, labels, where, log_q):
    losses = []
    for s, y, q in lists(where, scores, labels, log_q):
        if y.sum() > 0:
            losses.append(-(y / y.sum() * np.log(softmax(s - q))).sum())
    return mean(losses)


def distill_listwise(scores, teacher, where):
    losses = []
    for s, t in lists(where, scores, teacher):
        if len(s):
            p, q = softmax(t), softmax(s)
            losses.append((p * np.log(p / q)).sum())
    return mean(losses)
