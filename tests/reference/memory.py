"""Long memory without folding: every candidate looks at every behaviour."""

import math

import numpy as np


def deviation(queries, keys, values, mask):
    """sum_j m_j (f . g_j) v_j / (sqrt(K) n), with queries and keys float [C, K] and [L, K]."""
    out = np.zeros((len(queries), values.shape[1]))
    for c, query in enumerate(queries):
        for j in np.flatnonzero(mask):
            out[c] += sum(query * keys[j]) * values[j] / (math.sqrt(len(query)) * mask.sum())
    return out


def mean(values, mask):
    kept = [values[j] for j in np.flatnonzero(mask)]
    return sum(kept) / len(kept) if kept else np.zeros(values.shape[1])
