"""How many behaviours are how similar to each candidate: the packed tier histogram.

With h differing bits of K, tier = min((K - h) T // K, T - 1): in integers, so that every form agrees bit for bit.

The exact form costs C x L comparisons and never makes a [C, L] array. A tier is a 4-bit field of a 32-bit word: a behaviour
adds 1 << 4 tier to the word of its candidate, and 15 fit before a field can overflow. Their loop is unrolled: one elementwise
pass with candidates minor, which a compiler vectorises. Words are then widened, 17 of them to bytes and those to int32. More
than 8 tiers take more words; groups are brought together first, each padded to whole words. `histogram_reference` is the
definition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from aif_jax.types import Array, record

WORD = 32
UNROLL = 15  # behaviours that a 4-bit field counts
FIELDS = 8  # 4-bit fields of a word: tiers that one word counts
WIDEN = 17  # words of one field that a byte can hold: 15 * 17 = 255
WORDS_BYTES = {"cpu": 2**21, "default": 2**28}  # bytes of words made before they are widened; on a CPU they stay in the cache
Rule: TypeAlias = Callable[[jax.Array, jax.Array, int], jax.Array]
"""(candidates [C, ...], behaviours [n, W], T) -> tiers uint32 [n, C]."""
NOMINAL_CANDIDATES = 1024  # candidates that these bytes are shared out among in an export, whose candidate axis is symbolic


@record
class TierHistory:
    """What a candidate is compared with."""

    signature: Array  # uint32 [L, W]
    group: Array  # int32 [L] which of G histograms the behaviour counts in
    mask: Array  # bool [L]


def tier(differing: jax.Array, *, bits: int, tiers: int) -> jax.Array:
    """Tier of a Hamming distance: integers [...] -> the same type [...] in [0, tiers)."""
    equal = bits - differing
    at = equal // (bits // tiers) if bits % tiers == 0 else equal * tiers // bits
    return jnp.minimum(at, tiers - 1)


def histogram_reference(candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1) -> jax.Array:
    """The histogram written from its definition; compares [C, L] at once. Same arguments and result as `histogram`."""
    bits = candidates.shape[-1] * WORD
    differing = jnp.asarray(candidates)[:, None, :] ^ jnp.asarray(history.signature)[None, :, :]
    distance = jax.lax.population_count(differing).astype(jnp.int32).sum(-1)
    group = jnp.asarray(history.group)[None, :] * tiers + tier(distance, bits=bits, tiers=tiers)
    cell = jnp.where(jnp.asarray(history.mask)[None, :], group, groups * tiers)
    counts = jax.nn.one_hot(cell, groups * tiers, dtype=jnp.int32).sum(1)
    return counts.reshape(candidates.shape[0], groups, tiers)


def by_bits(candidates: jax.Array, signature: jax.Array, tiers: int) -> jax.Array:
    """Tier by differing bits: uint32 [C, W], [n, W] -> uint32 [n, C]."""
    differing = jnp.uint32(0)
    for w in range(candidates.shape[-1]):
        differing += jax.lax.population_count(candidates[None, :, w] ^ signature[:, w, None])
    return tier(differing, bits=candidates.shape[-1] * WORD, tiers=tiers)


def histogram(candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1, rule: Rule = by_bits) -> jax.Array:
    """Counts of behaviours by tier: candidates [C, ...] as `rule` has them -> int32 [C, G, T], exact, in a few MiB at any L."""
    cpu, default = (
        partial(_packed, rule, tiers=tiers, groups=groups, words_bytes=WORDS_BYTES[platform], serial=platform == "cpu")
        for platform in ("cpu", "default")
    )
    return jax.lax.platform_dependent(candidates, history, cpu=cpu, default=default)


def _packed(
    rule: Rule, candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int, words_bytes: int, serial: bool
) -> jax.Array:
    """`histogram` in 4-bit fields, one chunk of spans after another; a span is UNROLL * widen behaviours of one group.

    `serial`: the spans of a chunk are added in a loop, as XLA on a CPU would else fuse the words into each of their uses; it
    unrolls a loop of one, so a chunk has two spans or more.
    """
    count, length, words = candidates.shape[0], history.mask.shape[0], -(-tiers // FIELDS)
    symbolic = not isinstance(length, int)  # under jax.export, where sizes cannot be compared
    if not symbolic and length == 0:
        return jnp.zeros((count, groups, tiers), jnp.int32)
    widen = WIDEN if groups == 1 else 4  # groups are padded: short spans for many
    least = 2 if serial else 1
    widen = widen if symbolic else min(widen, -(-length // (least * UNROLL)))
    signature, kept, group = _spans(history, groups=groups, span=UNROLL * widen)
    spans = group.shape[0]
    nominal = max(1, count) if isinstance(count, int) else NOMINAL_CANDIDATES
    per_chunk = max(least, words_bytes // (4 * nominal * words * widen))
    chunks = (spans + per_chunk - 1) // per_chunk
    if not symbolic:
        per_chunk = max(least, -(-spans // chunks))  # even chunks need less padding

    def chunked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, chunks * per_chunk - spans)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, per_chunk, *x.shape[1:])

    def add_span(counts: jax.Array, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        made, group = span
        return counts.at[group].add(_widen(made)), None

    def add_chunk(counts: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        signature, kept, group = chunk
        rows = signature.reshape(-1, UNROLL, signature.shape[-1]), kept.reshape(-1, UNROLL)
        made = _words(rule, candidates, *rows, tiers=tiers).reshape(words, per_chunk, widen, count).swapaxes(0, 1)
        if serial:
            return jax.lax.scan(add_span, counts, (made, group))
        widened = jax.vmap(_widen)(made)
        if groups == 1:
            return counts + widened.sum(0, keepdims=True), None
        return counts + jax.ops.segment_sum(widened, group, num_segments=groups), None

    empty = jnp.zeros((groups, words, FIELDS, count), jnp.int32)
    counts, _ = jax.lax.scan(add_chunk, empty, (chunked(signature), chunked(kept), chunked(group)))
    return counts.reshape(groups, words * FIELDS, count)[:, :tiers].transpose(2, 0, 1)


def _spans(history: TierHistory, *, groups: int, span: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Behaviours in spans of one group each: signatures [n, span, W], kept uint32 [n, span] (1 or 0), group int32 [n]."""
    signature, mask = jnp.asarray(history.signature), jnp.asarray(history.mask)
    length, width = signature.shape
    if groups == 1:
        spans = (length + span - 1) // span
        short = spans * span - length
        kept = jnp.pad(mask.astype(jnp.uint32), (0, short)).reshape(spans, span)
        return jnp.pad(signature, ((0, short), (0, 0))).reshape(spans, span, width), kept, jnp.zeros(spans, jnp.int32)
    group = jnp.where(mask, jnp.asarray(history.group), groups)
    order = jnp.argsort(group)
    size = (group[:, None] == jnp.arange(groups)[None, :]).sum(0)
    start, spans = jnp.cumsum(size) - size, -(-size // span)
    end = jnp.cumsum(spans)
    at = jnp.arange((length + span - 1) // span + groups)  # enough spans for any sizes
    own = jnp.minimum(jnp.searchsorted(end, at, side="right"), groups - 1)
    within = (at - (end - spans)[own])[:, None] * span + jnp.arange(span)[None, :]
    kept = within < size[own][:, None]
    place = order[jnp.where(kept, start[own][:, None] + within, 0)]
    return signature[place], kept.astype(jnp.uint32), own.astype(jnp.int32)


def _words(rule: Rule, candidates: jax.Array, signature: jax.Array, kept: jax.Array, *, tiers: int) -> jax.Array:
    """Counts of UNROLL behaviours at a time, packed: uint32 [words, n, C] from signatures [n, UNROLL, W], kept [n, UNROLL]."""
    words = -(-tiers // FIELDS)
    first_tier = FIELDS * jnp.arange(words, dtype=jnp.uint32)[:, None, None]
    total = jnp.zeros((words, signature.shape[0], candidates.shape[0]), jnp.uint32)
    for j in range(UNROLL):
        field = rule(candidates, signature[:, j], tiers)[None] - first_tier  # of another word: wraps round or is 8 or more
        total += kept[None, :, j, None] << (4 * field)  # shifts of 32 and more give zero
    return total


def _widen(packed: jax.Array) -> jax.Array:
    """uint32 words [words, widen, C] of 4-bit counts, summed over `widen` -> int32 [words, FIELDS, C]."""
    nibbles = jnp.uint32(0x0F0F0F0F)
    even, odd = ((packed >> shift & nibbles).sum(1, dtype=jnp.uint32) for shift in (0, 4))
    octets = jnp.stack([even, odd], 1)[:, None] >> (8 * jnp.arange(4, dtype=jnp.uint32))[None, :, None, None] & 255
    return octets.reshape(packed.shape[0], FIELDS, packed.shape[-1]).astype(jnp.int32)
