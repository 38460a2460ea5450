"""Decayed memory and SIM by loops over events, in float64."""

from __future__ import annotations

import math

import numpy as np


def means(keys, values, times, half_lives):
    """[K, D]: for each entry the mean of values [n, D], weighed by exp(key) and halved with every half-life."""
    out = np.zeros((keys.shape[1], values.shape[1]))
    for k, half_life in enumerate(half_lives):
        exponents = [keys[j, k] - math.log(2) / half_life * (times[-1] - times[j]) for j in range(len(times))]
        weights = np.exp(np.array(exponents) - max(exponents))
        out[k] = weights @ values / weights.sum()
    return out


class Cache:
    """The values of a field by decayed counts: a dict, the smallest count makes room."""

    def __init__(self, slots, length, half_life):
        self.slots, self.length, self.half_life = slots, length, half_life
        self.values: list[dict] = []

    def left(self, seconds):
        return 0.5 ** (max(seconds, 0) / self.half_life)

    def add(self, value, event, time):
        """One event of a value above 0."""
        for one in self.values:
            one["now"] = one["count"] * self.left(time - one["events"][0][1])
        known = next((one for one in self.values if one["value"] == value), None)
        if known is not None:
            last = known["events"][0][1]
            known["count"] = known["now"] + self.left(last - time)
            place = sum(at > time for _, at in known["events"])
            known["events"] = [*known["events"][:place], (event, time), *known["events"][place:]][: self.length]
            return
        new = {"value": value, "count": 1.0, "events": [(event, time)]}
        if len(self.values) < self.slots:
            self.values.append(new)
            return
        at = min(range(self.slots), key=lambda i: self.values[i]["now"])
        self.values[at] = new
