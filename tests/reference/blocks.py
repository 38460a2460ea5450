"""What blocks compute, from their definitions: one value of one field, one candidate, one pair at a time."""

import math

import numpy as np
from scipy.special import softmax


def attend(query, sequence, mask):
    """softmax(q Z^T / sqrt D) Z for one query [D]; zeros for an empty history."""
    kept = sequence[np.flatnonzero(mask)]
    return softmax(kept @ query / math.sqrt(len(query))) @ kept if len(kept) else np.zeros(len(query))


def mean(values, mask):
    """The mean of the kept rows; zeros for none."""
    return values[mask].mean(0) if np.any(mask) else np.zeros(values.shape[1])


def deviation(queries, keys, values, mask):
    """sum_j m_j (f . g_j) v_j / (sqrt(K) n), with queries and keys float [C, K] and [L, K]: each query looks at each event."""
    out = np.zeros((len(queries), values.shape[1]))
    for c, query in enumerate(queries):
        for j in np.flatnonzero(mask):
            out[c] += sum(query * keys[j]) * values[j] / (math.sqrt(len(query)) * mask.sum())
    return out


def pack(bits):
    """uint32 [..., W]: bit k is bit k % 32 of word k // 32."""
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)


def signs(words):
    """1 and -1 [..., K] for the bits of words."""
    return 2.0 * np.unpackbits(np.asarray(words).view(np.uint8), axis=-1, bitorder="little") - 1


def signed(content, fitted):
    """uint32 [n, W]: the packed signs of every row of content under a fitted projection."""
    return pack(np.asarray(content, np.float64) @ np.asarray(fitted["projection"], np.float64) > 0)


def histogram(candidates, signature, mask, tiers):
    """Tier t holds similarities in [t / T, (t + 1) / T), the last one also 1; int [C, T]."""
    bits = 32 * signature.shape[1]
    counts = np.zeros((len(candidates), tiers), np.int64)
    for c, candidate in enumerate(candidates):
        for j in np.flatnonzero(mask):
            equal = bits - int(np.bitwise_count(candidate ^ signature[j]).sum())
            counts[c, max(t for t in range(tiers) if t * bits <= equal * tiers)] += 1
    return counts


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


def sim_slots(value, embedded, age, mask, slots, length):
    """SIM's cache, one dict for each slot: most frequent value first, ties by the more recent last behaviour."""
    places = {}
    for j in np.flatnonzero(mask):
        if value[j] > 0:
            places.setdefault(int(value[j]), []).append(j)
    each = [(v, places[v]) for v in sorted(places, key=lambda v: (-len(places[v]), places[v][0]))[:slots]]
    return [{"value": v, "entries": embedded[at[:length]], "count": len(at), "age": age[at[0]]} for v, at in each]


def sim_lookup(cache, query, value):
    """Attention over the candidate's own slot, [C, D]; zeros for a value without a slot."""
    out = np.zeros(query.shape)
    for c in range(len(query)):
        for slot in cache:
            if slot["value"] == value[c]:
                out[c] = attend(query[c], slot["entries"], np.ones(len(slot["entries"])))
    return out


def sim_flags(cache, value):
    """Missing, log1p(count), log1p(age in days)."""
    out = np.zeros((len(value), 3))
    for c in range(len(value)):
        own = [slot for slot in cache if slot["value"] == value[c]]
        out[c] = [0, math.log1p(own[0]["count"]), math.log1p(own[0]["age"] / 86400)] if own else [1, 0, 0]
    return out
