"""SimTier on content signatures: how many behaviours are how similar to the candidate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from aif_jax.blocks.block import Block, Fitted, HeadInputs, UserView, block, expect, recent
from aif_jax.blocks.signatures import Signatures
from aif_jax.blocks.tier_histogram import TierHistory, histogram
from aif_jax.config import Config
from aif_jax.types import Behaviours, ItemRow, Params, UserState


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
