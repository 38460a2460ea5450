"""BEA from its formulas, and the full cross-attention that it stands for."""

import math

import numpy as np

from tests.reference.losses import softmax


def attend(query, sequence, mask):
    """softmax(q Z^T / sqrt D) Z for one query [D]; zeros for an empty history."""
    kept = [sequence[s] for s in np.flatnonzero(mask)]
    if not kept:
        return np.zeros(len(query))
    weights = softmax([float(query @ z) / math.sqrt(len(query)) for z in kept])
    return sum(w * z for w, z in zip(weights, kept, strict=True))


def user_half(bridges, sequence, mask):
    return np.stack([attend(b, sequence, mask) for b in bridges])


def item_half(bridges, query):
    return np.array(softmax([float(query @ b) / math.sqrt(len(query)) for b in bridges]))
