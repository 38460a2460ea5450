"""Matching statistics from their definition: one value of one field at a time."""

import math

import numpy as np


def statistics(value, action, age, mask, wanted, *, recent_events, actions):
    """float64 [6 + actions] of the value `wanted` in one field's history; zeros for a value that the user has not met."""
    met = [place for place in range(len(value)) if mask[place] and value[place] == wanted and wanted > 0]
    if not met:
        return np.zeros(6 + actions)
    number, recent = len(met), sum(place < recent_events for place in met)
    by_action = [sum(int(action[place]) == one for place in met) for one in range(actions)]
    days = max(float(age[met[0]]), 0.0) / 86400
    first = [1.0, math.log1p(number), number / int(np.sum(mask)), 1 / (1 + met[0]), math.log1p(days), math.log1p(recent)]
    return np.array(first + [math.log1p(count) for count in by_action])
