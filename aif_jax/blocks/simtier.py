"""SimTier on content signatures: how many behaviours are how similar to the candidate, by the packed tier histogram.

With h differing bits of K, tier = min((K - h) T // K, T - 1): in integers, so that every form agrees bit for bit.

The exact form costs C x L comparisons and never makes an array of all pairs. A tier is a 4-bit field of a 32-bit word: a
behaviour adds 1 << 4 tier to the word of its candidate, and 15 fit before a field can overflow. Their loop is unrolled: one
elementwise pass with candidates minor, which a compiler vectorises. More than 8 tiers take more words. The behaviours of each
group come together first, filled up to whole spans.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, Fitted, UserView, block, expect, recent
from aif_jax.blocks.signatures import WORD, Signatures
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import Array, ItemRow, Params, UserState, record

FULL = 15  # behaviours that a 4-bit field counts
FIELDS = 8  # 4-bit fields of a word
SPAN = 4  # words of a field that are summed at once: more fill up short groups with more padding


@block
class SimTier(Block):
    """SimTier on content signatures: how many behaviours of the long history are how similar to the candidate.

        log(1 + number of behaviours j with tier(1 - hamming(s_i, s_j) / K) = t),   t = 1 .. T equal tiers of [0, 1]

    One histogram for all behaviours, or one for each window of recent behaviours. The counts are exact.

    - Paper: SimTier (arXiv 2407.19467) on LSH similarities as in AIF (2511.12934); windows are ours.
    - Cost: real time C x min(L, `length`) comparisons of K bits: the most expensive block.
    - When: to reproduce the paper (`presets.paper`), or items have content and there are no matching statistics.

    Attributes:
      tiers: T, tiers of a histogram.
      windows: a histogram for each window of the history; ends in behaviours, counted from the most recent: (4, 32) counts the
        last 4, the 28 before them and the rest apart.
      bits: K, bits of a signature.
      length: behaviours that count, from the most recent: the cost in real time no longer grows with the history. None counts
        the whole long history.
    """

    tiers: int = 8
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

    def widths(self, config: Config) -> dict[str, int]:
        return {"tiers": (len(self.windows) + 1) * self.tiers}

    def least_history(self, config: Config) -> int:
        return self.length if self.length is not None and self.length < config.long_length else 1

    def user(self, params: Params, user: UserView) -> TierHistory:
        seen = user.long if self.length is None else recent(user.long, self.length)
        mask = jnp.asarray(seen.mask)
        ends, place = jnp.array(self.windows, jnp.int32), jnp.arange(mask.shape[0], dtype=jnp.int32)
        window = (place[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)  # 0 is the most recent one
        return TierHistory(signature=user.values(self.tables[0], seen), group=window, mask=mask)

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        kernel, signature = kernels["tiers"], jnp.asarray(rows.fitted[self.tables[0].name])
        counts = histogram(signature, state.blocks[self.name], tiers=self.tiers, groups=kernel.shape[0] // self.tiers)
        features = jnp.log1p(counts.astype(jnp.float32)).reshape(counts.shape[0], kernel.shape[0])
        return HeadInputs(pairs=((features, kernel),))


@record
class TierHistory:
    """Behaviours of a long history, as `histogram` compares candidates with them."""

    signature: Array  # uint32 [L, W]
    group: Array  # int32 [L] which of G histograms the behaviour counts in
    mask: Array  # bool [L]


def tier(differing: jax.Array, *, bits: int, tiers: int) -> jax.Array:
    """Return tier of a Hamming distance: integers [...] -> the same type [...] in [0, tiers)."""
    equal = bits - differing
    at = equal // (bits // tiers) if bits % tiers == 0 else equal * tiers // bits
    return jnp.minimum(at, tiers - 1)


def histogram(candidates: jax.Array, history: TierHistory, *, tiers: int, groups: int = 1) -> jax.Array:
    """Return counts of behaviours by tier: candidates uint32 [C, W] -> int32 [C, G, T], exact, in a few MiB at any L.

    Each FULL behaviours of a group are counted in 4-bit fields of words [C]. The words of a span are summed in a separate pass:
    in one with the first, XLA on a CPU computes the words again for each field.
    """
    count, width = candidates.shape
    words = -(-tiers // FIELDS)
    first_tier = FIELDS * jnp.arange(words, dtype=jnp.uint32)[:, None]
    shifts = 4 * jnp.arange(FIELDS, dtype=jnp.uint32)[None, None, :, None]

    def pack(_: None, some: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        signature, kept = some
        packed = jnp.zeros((words, count), jnp.uint32)
        for j in range(FULL):
            differing = sum(jax.lax.population_count(candidates[:, w] ^ signature[j, w]) for w in range(width))
            field = tier(differing, bits=width * WORD, tiers=tiers)[None, :] - first_tier  # type: ignore[arg-type]
            packed += kept[j] << (4 * field)  # a tier of another word wraps round or is 8 or more: shifts above 31 give zero
        return None, packed

    def add(counts: jax.Array, span: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        signature, kept, group = span
        _, packed = jax.lax.scan(pack, None, (signature, kept))
        return counts.at[group].add((packed[:, :, None] >> shifts & 15).sum(0).astype(jnp.int32)), None

    counts, _ = jax.lax.scan(add, jnp.zeros((groups, words, FIELDS, count), jnp.int32), _spans(history, groups))
    return counts.reshape(groups, words * FIELDS, count)[:, :tiers].transpose(2, 0, 1)


def _spans(history: TierHistory, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return behaviours in spans of one group: signatures [n, SPAN, FULL, W], kept uint32 [n, SPAN, FULL], groups int32 [n]."""
    size = SPAN * FULL
    count = (history.mask.shape[0] + size - 1) // size + groups - 1
    member = (jnp.asarray(history.group)[:, None] == jnp.arange(groups)[None, :]) & jnp.asarray(history.mask)[:, None]
    spans = -(-member.sum(0) // size)
    end = jnp.cumsum(spans)
    slot = jnp.cumsum(member, 0) - 1 + size * (end - spans)[None, :]
    slot = jnp.where(member, slot, count * size).min(1)  # of what does not count: dropped
    signature = jnp.zeros((count * size, history.signature.shape[1]), jnp.uint32).at[slot].set(history.signature, mode="drop")
    kept = jnp.zeros(count * size, jnp.uint32).at[slot].set(1, mode="drop")
    group = jnp.minimum(jnp.searchsorted(end, jnp.arange(count), side="right"), groups - 1)
    return signature.reshape(count, SPAN, FULL, -1), kept.reshape(count, SPAN, FULL), group
