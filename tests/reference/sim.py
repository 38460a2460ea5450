"""SIM with pre-caching from its definition: a dict of lists."""

import math

import numpy as np

from tests.reference.bridge import attend


def user_half(value, embedded, age, mask, slots, length):
    """One dict for each slot, most frequent value first, ties by the more recent last behaviour."""
    places = {}
    for j in np.flatnonzero(mask):
        if value[j] > 0:
            places.setdefault(int(value[j]), []).append(j)
    best = sorted(places, key=lambda v: (-len(places[v]), places[v][0]))[:slots]
    each = [(v, places[v]) for v in best]
    return [{"value": v, "entries": embedded[at[:length]], "count": len(at), "age": age[at[0]]} for v, at in each]


def lookup(cache, query, value):
    """Attention over the candidate's own slot, [C, D]; zeros for a value without a slot."""
    out = np.zeros(query.shape)
    for c in range(len(query)):
        for slot in cache:
            if slot["value"] == value[c]:
                out[c] = attend(query[c], slot["entries"], np.ones(len(slot["entries"])))
    return out


def flags(cache, value):
    """Missing, log1p(count), log1p(age in days)."""
    out = np.zeros((len(value), 3))
    for c in range(len(value)):
        own = [slot for slot in cache if slot["value"] == value[c]]
        out[c] = [0, math.log1p(own[0]["count"]), math.log1p(own[0]["age"] / 86400)] if own else [1, 0, 0]
    return out
