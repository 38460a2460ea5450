"""SimTier from its definition, one pair at a time."""

import numpy as np

from tests.reference import lsh


def histogram(candidates, signature, mask, tiers):
    """Tier t holds similarities in [t / T, (t + 1) / T), the last one also 1; int [C, T]."""
    bits = 32 * len(candidates[0]) if len(candidates) else 0
    counts = np.zeros((len(candidates), tiers), np.int64)
    for c, candidate in enumerate(candidates):
        for j in np.flatnonzero(mask):
            equal = bits - lsh.differing(candidate, signature[j])
            tier = max(t for t in range(tiers) if t * bits <= equal * tiers)
            counts[c, tier] += 1
    return counts
