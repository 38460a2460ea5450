"""SimTier on content signatures: how many behaviours are how similar to the candidate, by the packed tier histogram.

With h differing bits of K, tier = min((K - h) T // K, T - 1): in integers, so that every form agrees bit for bit.

The exact form costs C x L comparisons and never makes a [C, L] array. A tier is a 4-bit field of a 32-bit word: a behaviour
adds 1 << 4 tier to the word of its candidate, and 15 fit before a field can overflow. Their loop is unrolled: one elementwise
pass with candidates minor, which a compiler vectorises. Words are then widened, 17 of them to bytes and those to int32. More
than 8 tiers take more words; groups are brought together first, each padded to whole words. `histogram_reference` is the
definition.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, Fitted, UserView, block, expect, recent
from aif_jax.blocks.signatures import WORD, Signatures
from aif_jax.config import Config
from aif_jax.heads import HeadInputs
from aif_jax.types import Array, Behaviours, ItemRow, Params, UserState, record

UNROLL = 15  # behaviours that a 4-bit field counts
FIELDS = 8  # 4-bit fields of a word: tiers that one word counts
WIDEN = 17  # words of one field that a byte can hold: 15 * 17 = 255
WORDS_BYTES = {"cpu": 2**21, "default": 2**28}  # bytes of words made before they are widened; on a CPU they stay in the cache
NOMINAL_CANDIDATES = 1024  # candidates that these bytes are shared out among in an export, whose candidate axis is symbolic


@block
class SimTier(Block):
    """SimTier on content signatures: how many behaviours of the long history are how similar to the candidate.

        log(1 + number of behaviours j with tier(1 - hamming(s_i, s_j) / K) = t),   t = 1 .. T equal tiers of [0, 1]

    One histogram for all behaviours, or one for each action and each window of recent behaviours. The counts are exact.

    - Paper: SimTier (arXiv 2407.19467) on LSH similarities as in AIF (2511.12934); windows are ours.
    - Cost: real time C x min(L, `length`) comparisons of K bits: the most expensive block.
    - When: to reproduce the paper (`presets.paper`), or items have content and there are no matching statistics.

    Attributes:
      tiers: T, tiers of a histogram.
      by_action: a histogram for each behaviour type.
      windows: a histogram for each window of the history; ends in behaviours, counted from the most recent: (4, 32) counts the
        last 4, the 28 before them and the rest apart.
      bits: K, bits of a signature.
      length: behaviours that count, from the most recent: the cost in real time no longer grows with the history. None counts
        the whole long history.
    """

    tiers: int = 8
    by_action: bool = False
    windows: tuple[int, ...] = ()
    bits: int = 64
    length: int | None = None

    def __post_init__(self):
        Signatures(self.bits)
        expect(2 <= self.tiers <= 64, self, "tiers", "2 to 64", self.tiers)
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.windows)))
        expect(ascending, self, "windows", "ascending numbers of behaviours, at least 1", self.windows)
        least = max((1, *(end + 1 for end in self.windows)))
        expect(self.length is None or self.length >= least, self, "length", f"None or at least {least}", self.length)

    @property
    def tables(self) -> tuple[Fitted, ...]:
        return (Signatures(self.bits),)

    def groups(self, config: Config) -> int:
        """G, histograms of a candidate."""
        return (config.schema.actions if self.by_action else 1) * (len(self.windows) + 1)

    def widths(self, config: Config) -> dict[str, int]:
        return {"tiers": self.groups(config) * self.tiers}

    def group(self, long: Behaviours, config: Config) -> jax.Array:
        """Which of the G histograms a behaviour counts in, int32 [L], by action (unknown ones count as 0), window, or both.

        The groups of the most recent window come first.
        """
        action = jnp.asarray(long.action)
        known = (action >= 0) & (action < config.schema.actions)
        group = jnp.where(known, action, 0) if self.by_action else jnp.zeros_like(action)
        ends = jnp.array(self.windows, group.dtype)
        window = (jnp.arange(action.shape[0], dtype=group.dtype)[:, None] >= ends[None, :]).sum(1, dtype=group.dtype)
        return group + window * (config.schema.actions if self.by_action else 1)

    def least_history(self, config: Config) -> int:
        return self.length if self.length is not None and self.length < config.long_length else 1

    def user(self, params: Params, user: UserView) -> TierHistory:
        seen = user.long if self.length is None else recent(user.long, self.length)
        group, mask = self.group(seen, user.config), jnp.asarray(seen.mask)
        return TierHistory(signature=user.values(self.tables[0], seen), group=group, mask=mask)

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        kernel, signature = kernels["tiers"], jnp.asarray(rows.fitted[self.tables[0].name])
        counts = histogram(signature, state.blocks[self.name], tiers=self.tiers, groups=kernel.shape[0] // self.tiers)
        return HeadInputs(pairs=((log_counts(counts).astype(kernel.dtype), kernel),))


def log_counts(counts: jax.Array) -> jax.Array:
    """log1p of counts int32 [C, G, T] as float32 [C, G * T]."""
    return jnp.log1p(counts.astype(jnp.float32)).reshape(counts.shape[0], counts.shape[1] * counts.shape[2])


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


def _by_bits(candidates: jax.Array, signature: jax.Array, tiers: int) -> jax.Array:
    """Tiers: uint32 [C, W], [n, W] -> uint32 [n, C]."""
    differing = jnp.uint32(0)
    for w in range(candidates.shape[-1]):
        differing += jax.lax.population_count(candidates[None, :, w] ^ signature[:, w, None])
    return tier(differing, bits=candidates.shape[-1] * WORD, tiers=tiers)


def histogram(candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1) -> jax.Array:
    """Counts of behaviours by tier: candidates uint32 [C, W] -> int32 [C, G, T], exact, in a few MiB at any L."""
    cpu, default = (
        partial(_packed, tiers=tiers, groups=groups, words_bytes=WORDS_BYTES[platform], serial=platform == "cpu")
        for platform in ("cpu", "default")
    )
    return jax.lax.platform_dependent(candidates, history, cpu=cpu, default=default)


def _packed(
    candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int, words_bytes: int, serial: bool
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
        made = _words(candidates, *rows, tiers=tiers).reshape(words, per_chunk, widen, count).swapaxes(0, 1)
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


def _words(candidates: jax.Array, signature: jax.Array, kept: jax.Array, *, tiers: int) -> jax.Array:
    """Counts of UNROLL behaviours at a time, packed: uint32 [words, n, C] from signatures [n, UNROLL, W], kept [n, UNROLL]."""
    words = -(-tiers // FIELDS)
    first_tier = FIELDS * jnp.arange(words, dtype=jnp.uint32)[:, None, None]
    total = jnp.zeros((words, signature.shape[0], candidates.shape[0]), jnp.uint32)
    for j in range(UNROLL):
        field = _by_bits(candidates, signature[:, j], tiers)[None] - first_tier  # of another word: wraps round or is 8 or more
        total += kept[None, :, j, None] << (4 * field)  # shifts of 32 and more give zero
    return total


def _widen(packed: jax.Array) -> jax.Array:
    """uint32 words [words, widen, C] of 4-bit counts, summed over `widen` -> int32 [words, FIELDS, C]."""
    nibbles = jnp.uint32(0x0F0F0F0F)
    even, odd = ((packed >> shift & nibbles).sum(1, dtype=jnp.uint32) for shift in (0, 4))
    octets = jnp.stack([even, odd], 1)[:, None] >> (8 * jnp.arange(4, dtype=jnp.uint32))[None, :, None, None] & 255
    return octets.reshape(packed.shape[0], FIELDS, packed.shape[-1]).astype(jnp.int32)
