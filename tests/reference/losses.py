"""Losses from their formulas, one entry at a time, in Python floats."""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def rows(where, *arrays):
    """The valid entries of each list."""
    for r in range(arrays[0].shape[0]):
        keep = np.flatnonzero(where[r])
        yield tuple([float(a[r, c]) for c in keep] for a in arrays)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def pointwise_bce(scores, labels, where):
    return mean(
        -y * math.log(sigmoid(s)) - (1 - y) * math.log(1 - sigmoid(s))
        for ss, ys in rows(where, scores, labels)
        for s, y in zip(ss, ys, strict=True)
    )


def listwise_softmax(scores, labels, where, log_q):
    losses = []
    for ss, ys, qs in rows(where, scores, labels, log_q):
        if sum(ys) > 0:
            p = softmax([s - q for s, q in zip(ss, qs, strict=True)])
            losses.append(-sum(y / sum(ys) * math.log(pc) for y, pc in zip(ys, p, strict=True)))
    return mean(losses)


def distill_listwise(scores, teacher, where, temperature):
    losses = []
    for ss, ts in rows(where, scores, teacher):
        if ss:
            p, q = softmax([t / temperature for t in ts]), softmax([s / temperature for s in ss])
            losses.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return temperature**2 * mean(losses)
