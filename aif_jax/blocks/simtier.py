"""SimTier on content signatures: how many behaviours are how similar to the candidate, by the packed tier histogram.

With h differing bits of K, tier = min((K - h) T // K, T - 1), in integers. No array of all C x L pairs is made: a tier is a
4-bit field of a 32-bit word, a behaviour adds 1 << 4 tier to the word of its candidate, and 15 fit before a field can overflow.
Their loop is unrolled: one elementwise pass with candidates minor, which a compiler vectorises. More tiers take more words.
"""

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, UserView, block, expect
from aif_jax.blocks.signatures import WORD, Signatures
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.trees import take
from aif_jax.types import Array, ItemRow, Params, UserState, record

FULL = 15  # behaviours that a 4-bit field counts
FIELDS = 8  # 4-bit fields of a word
SPAN = 4  # words of a field that are summed at once


@record
class TierHistory:
    """Behaviours of a long history, as `histogram` compares candidates with them."""

    signature: Array  # uint32 [L, W]
    mask: Array  # bool [L]


@block
class SimTier(Block):
    """SimTier on content signatures: how many behaviours of the long history are how similar to the candidate.

        log(1 + number of behaviours j with tier(1 - hamming(s_i, s_j) / K) = t),   t = 0 .. T - 1, equal tiers of [0, 1]

    - Paper: SimTier (arXiv 2407.19467) on LSH similarities as in AIF (2511.12934).
    - Cost: real time C x min(L, `length`) comparisons of K bits: the most expensive block.
    - When: to reproduce the paper (`presets.paper`), or items have content and there are no matching statistics.

    Attributes:
      tiers: T, tiers of the histogram.
      bits: K, bits of a signature.
      length: behaviours that count, from the most recent: the cost in real time no longer grows with the history. None counts
        the whole long history.
    """

    tiers: int = 8
    bits: int = 64
    length: int | None = None

    def __post_init__(self):
        Signatures(self.bits)
        expect(2 <= self.tiers <= 64, self, "tiers", "2 to 64", self.tiers)
        expect(self.length is None or self.length >= 1, self, "length", "None or at least 1", self.length)

    @property
    def tables(self) -> tuple[Signatures, ...]:
        return (Signatures(self.bits),)

    def widths(self, config: Config) -> dict[str, int]:
        return {"tiers": self.tiers}

    def least_history(self, config: Config) -> int:
        return self.length if self.length is not None and self.length < config.long_length else 1

    def user(self, params: Params, user: UserView) -> TierHistory:
        seen = user.long if self.length is None else take(user.long, slice(self.length))
        return TierHistory(signature=user.values(self.tables[0], seen), mask=jnp.asarray(seen.mask))

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        kernel, signature = kernels["tiers"], jnp.asarray(rows.fitted[self.tables[0].name])
        counts = histogram(signature, state.blocks[self.name], tiers=self.tiers)
        return HeadInputs(pairs=((jnp.log1p(counts.astype(jnp.float32)), kernel),))


def histogram(candidates: jax.Array, history: TierHistory, *, tiers: int) -> jax.Array:
    """Return counts of behaviours by tier: candidates uint32 [C, W] -> int32 [C, T], exact, in a few MiB at any L.

    Each FULL behaviours are counted in 4-bit fields of words [C]. The words of a span are summed in a separate pass:
    in one with the first, XLA on a CPU computes the words again for each field.
    """
    count, width = candidates.shape
    bits, words = width * WORD, -(-tiers // FIELDS)
    first_tier = FIELDS * jnp.arange(words, dtype=jnp.uint32)[:, None]
    shifts = 4 * jnp.arange(FIELDS, dtype=jnp.uint32)[None, None, :, None]

    def pack(_: None, some: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        signature, kept = some
        packed = jnp.zeros((words, count), jnp.uint32)
        for j in range(FULL):
            equal = bits - sum(jax.lax.population_count(candidates[:, w] ^ signature[j, w]) for w in range(width))
            tier = equal // (bits // tiers) if bits % tiers == 0 else equal * tiers // bits
            field = jnp.minimum(tier, tiers - 1)[None, :] - first_tier
            packed += kept[j] << (4 * field)  # a tier of another word wraps round or is 8 or more: shifts above 31 give zero
        return None, packed

    def add(counts: jax.Array, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        _, packed = jax.lax.scan(pack, None, span)
        return counts + (packed[:, :, None] >> shifts & 15).sum(0).astype(jnp.int32), None

    length, size = history.mask.shape[0], SPAN * FULL
    spans, place = (length + size - 1) // size, jnp.arange(length)  # under jax.export the length is a symbol
    signature = jnp.zeros((spans * size, width), jnp.uint32).at[place].set(history.signature)
    kept = jnp.zeros(spans * size, jnp.uint32).at[place].set(jnp.asarray(history.mask).astype(jnp.uint32))
    filled = signature.reshape(spans, SPAN, FULL, width), kept.reshape(spans, SPAN, FULL)
    counts, _ = jax.lax.scan(add, jnp.zeros((words, FIELDS, count), jnp.int32), filled)
    return counts.reshape(words * FIELDS, count)[:tiers].T
