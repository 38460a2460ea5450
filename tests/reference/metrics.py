"""Metrics by scikit-learn, NaN where they are undefined; and from their definitions, over every order of tied scores."""

import itertools
import math

import numpy as np
import sklearn.metrics
from scipy.special import expit

NAN = math.nan


def mean(values):
    """The mean of numbers; NaN for none."""
    return np.mean(values) if len(values) else NAN


def auc(scores, labels, where):
    """By ranks: scikit-learn takes no infinite scores."""
    _, ranks = np.unique(scores, return_inverse=True)
    return sklearn.metrics.roc_auc_score(labels[where], ranks[where]) if len(set(labels[where])) == 2 else NAN


def gauc(scores, labels, groups, where):
    """(value, groups used)"""
    each = [(auc(scores, labels, mine), mine.sum()) for mine in (where & (groups == g) for g in set(groups[where]))]
    values, weights = np.array([one for one in each if not math.isnan(one[0])]).reshape(-1, 2).T
    return (np.average(values, weights=weights) if len(values) else NAN), len(values)


def recall(scores, labels, where, k):
    """(value, used, left out): the mean recall over every order of the candidates that the scores allow, by list."""
    values, left_out = [], 0
    for row_scores, row_labels, row_where in zip(scores, labels, where, strict=True):
        valid = np.flatnonzero(row_where)
        if not row_labels[valid].any():
            left_out += 1
            continue
        orders = (sorted(p, key=lambda c: -row_scores[c]) for p in itertools.permutations(valid))  # sorted is stable
        values.append(mean([row_labels[order[:k]].sum() / row_labels[order].sum() for order in orders]))
    return mean(values), len(values), left_out


def log_loss(scores, labels, where):
    return sklearn.metrics.log_loss(labels[where], expit(scores[where]), labels=[False, True]) if where.any() else NAN


def calibration(scores, labels, where, bins):
    """(ratio, error)"""
    p, y = expit(scores[where]), labels[where]
    inside = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [(inside == b).mean() * abs(p[inside == b].mean() - y[inside == b].mean()) for b in set(inside)]
    return (p.sum() / y.sum() if y.any() else NAN), (sum(gaps) if gaps else NAN)
