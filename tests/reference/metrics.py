"""Metrics from their definitions: every pair, every order of tied scores, one entry at a time."""

import itertools
import math

import numpy as np

from tests.reference.losses import sigmoid

NAN = math.nan


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else NAN


def auc(scores, labels, where):
    positives = [s for s, y, w in zip(scores, labels, where, strict=True) if w and y]
    negatives = [s for s, y, w in zip(scores, labels, where, strict=True) if w and not y]
    return mean(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)


def gauc(scores, labels, groups, where):
    """(value, used, left out)"""
    total, weights, left_out = 0.0, [], 0
    for g in sorted(set(groups[where])):
        mine = where & (groups == g)
        value = auc(scores, labels, mine)
        if math.isnan(value):
            left_out += 1
        else:
            weights.append(int(mine.sum()))
            total += weights[-1] * value
    return (total / sum(weights) if weights else NAN), len(weights), left_out


def over_all_tie_orders(metric, scores, labels, where, k):
    """The mean of `metric(labels in ranked order, k)` over every order of the candidates that the scores allow, by list."""
    values, left_out = [], 0
    for row_scores, row_labels, row_where in zip(scores, labels, where, strict=True):
        valid = np.flatnonzero(row_where)
        if not row_labels[valid].any():
            left_out += 1
            continue
        orders = (sorted(p, key=lambda c: -row_scores[c]) for p in itertools.permutations(valid))  # sorted is stable
        values.append(mean(metric([float(row_labels[c]) for c in order], k) for order in orders))
    return mean(values), len(values), left_out


def recall(ranked, k):
    return sum(ranked[:k]) / sum(ranked)


def log_loss(scores, labels, where):
    return mean(-math.log(sigmoid(s) if y else 1 - sigmoid(s)) for s, y, w in zip(scores, labels, where, strict=True) if w)


def calibration(scores, labels, where, bins):
    """(ratio, error)"""
    inside = [[] for _ in range(bins)]
    for s, y, w in zip(scores, labels, where, strict=True):
        if w:
            inside[min(int(sigmoid(s) * bins), bins - 1)].append((sigmoid(s), float(y)))
    pairs = [pair for entries in inside for pair in entries]
    positives = sum(y for _, y in pairs)
    ratio = sum(p for p, _ in pairs) / positives if positives else NAN
    gaps = [len(b) / len(pairs) * abs(mean(p for p, _ in b) - mean(y for _, y in b)) for b in inside if b]
    return ratio, (sum(gaps) if pairs else NAN)
