"""The sequence loss from its formula, place by place, for any states and item vectors."""

import numpy as np


def sequence_loss(states, vectors, item, mask, negatives, *, log_q=None, repeats=True):
    """Sum over places and their number; states [S, D] and item, mask [L] most recent first, vectors by item row [N, D]."""
    total, count = 0.0, 0
    log_q = np.zeros(len(negatives)) if log_q is None else log_q
    for place in range(1, len(states)):
        target = item[place - 1]
        if not (mask[place] and mask[place - 1] and target > 0):
            continue
        met = {row for row, kept in zip(item[place:], mask[place:], strict=True) if kept}
        terms = [np.exp(float(states[place] @ vectors[target]))]
        for row, correction in zip(negatives, log_q, strict=True):
            if row == 0 or row == target or (not repeats and row in met):
                continue
            terms.append(np.exp(float(states[place] @ vectors[row]) - correction))
        total += np.log(sum(terms) / terms[0])
        count += 1
    return total, count
