"""SimTier by a codebook."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import layers
from aif_jax.blocks.block import HeadInputs, ItemView, UserView, block, by_id, expect, expect_content
from aif_jax.blocks.simtier import Tiers, log_counts
from aif_jax.blocks.tier_histogram import TierHistory, by_table, histogram
from aif_jax.config import Config
from aif_jax.types import ItemFeatures, ItemRow, Params, UserState


@block
class SimTierCodes(Tiers):
    """SimTier by a codebook: tier histograms between R codes and the history, read by the candidate's nearest codes.

        log(1 + number of behaviours j with tier((1 + cos(c_r, c_code(j))) / 2) = t)    for each code r, on the user side

    The codes c are k-means centres on the sphere of the catalogue's content. With `nearest` J > 1 a candidate reads the mean of
    its J nearest codes, weighted by a softmax of similarity x T.

    - Paper: SimTier (arXiv 2407.19467); the codebook is ours.
    - Cost: user side R x L table look-ups; real time a gather, independent of L.
    - When: L is too long for `SimTier`; keeps a small part of its gain in ranking, see experiments/notes/study.md.

    Attributes:
      tiers, by_action, windows: see `SimTier`.
      codes: R, size of the codebook.
      nearest: J, the nearest codes that a row carries.
    """

    per_item = ("code", "nearest", "weights")
    codes: int = 256
    nearest: int = 1

    def __post_init__(self):
        expect(self.codes >= 1, self, "codes", "at least 1", self.codes)
        expect(1 <= self.nearest <= self.codes, self, "nearest", f"1 to codes={self.codes}", self.nearest)
        super().__post_init__()

    @property
    def name(self) -> str:
        return "simtier_codes"

    def check(self, config: Config) -> None:
        expect_content(self, config)

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        """`centres` float32 [R, E], `between` uint8 [R, R] tiers of code pairs, and of every item its codes.

        `code` int32 [N] (-1 without content: not counted), `nearest` int32 [N, J] and `weights` float32 [N, J].
        """
        content = np.asarray(items.content, np.float32)
        centres = fit_centres(content, codes=self.codes, seed=seed)
        of_row = partial(nearest_centres, jnp.asarray(centres), count=self.nearest, tiers=self.tiers)
        nearest, weights = jax.lax.map(of_row, jnp.asarray(content))
        return {
            "centres": jnp.asarray(centres),
            "between": jnp.asarray(centre_tiers(centres, tiers=self.tiers)),
            "code": jnp.asarray(nearest_centre(content, centres)),
            "nearest": nearest,
            "weights": weights,
        }

    def user(self, params: Params, user: UserView) -> jax.Array:
        """float32 [R, G * T] log1p histograms; reads L rows of R bytes, no product with content is taken."""
        code = layers.lookup(params["code"], jnp.asarray(user.long.item))
        group, groups = self.group(user.long, user.config), self.groups(user.config)
        return code_table(params["between"], code, group, jnp.asarray(user.long.mask), tiers=self.tiers, groups=groups)

    def item(self, params: Params, item: ItemView) -> dict[str, Any]:
        """int32 [J] codes and float32 [J] weights, which sum to 1."""

        def from_content(content: jax.Array) -> tuple[jax.Array, jax.Array]:
            return nearest_centres(params["centres"], content.astype(jnp.float32), count=self.nearest, tiers=self.tiers)

        codes, weights = by_id((params["nearest"], params["weights"]), item.features, from_content)
        return {"codes": codes, "weights": weights}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> HeadInputs:
        kernel, row = kernels["tiers"], rows.blocks[self.name]
        read = jnp.asarray(state.blocks[self.name])[jnp.asarray(row["codes"])] * jnp.asarray(row["weights"])[..., None]
        return HeadInputs(pairs=((read.sum(1).astype(kernel.dtype), kernel),))


def code_table(
    between: jax.Array, code: jax.Array, group: jax.Array, mask: jax.Array, *, tiers: int, groups: int = 1
) -> jax.Array:
    """Log1p histograms of every code: between uint8 [R, R], code int32 [L] (-1: not counted) -> float32 [R, G * T]."""
    known = mask & (code >= 0)
    key = jnp.where(known, code, 0).astype(jnp.uint32)[:, None]
    history = TierHistory(signature=key, group=group, mask=known)
    return log_counts(histogram(between, history, tiers=tiers, groups=groups, rule=by_table))


def nearest_centres(centres: jax.Array, content: jax.Array, *, count: int, tiers: int) -> tuple[jax.Array, jax.Array]:
    """The nearest codes int32 [J] of content float32 [E] and their weights [J], softmax(similarity * T), which sum to 1."""
    similarity = (1.0 + centres @ content / jnp.maximum(jnp.linalg.norm(content), 1e-12)) / 2.0
    nearest, index = jax.lax.top_k(similarity, count)
    return index.astype(jnp.int32), jax.nn.softmax(nearest * tiers)


def fit_centres(content: np.ndarray, *, codes: int, seed: int = 0, iterations: int = 10) -> np.ndarray:
    """Codes float32 [R, E] by k-means on the sphere: each code the direction of the mean of its rows of unit length.

    Up to R distinct rows with content are the codes themselves, so SimTier by codes is exact; codes left over repeat the first.
    Means are taken over at most 256 rows a code, drawn at random; rows that are all zero are left out.
    """
    rng = np.random.default_rng(seed)
    rows = _unit(np.asarray(content, np.float32))
    rows = rows[np.any(rows != 0, axis=1)]
    if not len(rows):
        raise ValueError(f"SimTierCodes: expected catalogue rows with content, got {np.shape(content)} of zeros")
    if len(rows) > codes:
        rows = rows[rng.permutation(len(rows))[: 256 * codes]]
    distinct = np.unique(rows, axis=0)
    if len(distinct) <= codes:
        return np.concatenate([distinct, np.repeat(distinct[:1], codes - len(distinct), axis=0)])
    centres = rng.choice(distinct, codes, replace=False)
    for _ in range(iterations):
        total = np.zeros_like(centres)
        np.add.at(total, nearest_centre(rows, centres), rows)
        centres = np.where(np.any(total != 0, axis=1, keepdims=True), _unit(total), centres)  # an empty code stays
    return centres


def nearest_centre(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The code with the largest product, [N, E] and [R, E] -> int32 [N]; -1 for a row of zeros. In bounded memory."""
    size = max(1, 2**24 // len(centres))
    parts = [(rows[at : at + size] @ centres.T).argmax(1) for at in range(0, len(rows), size)]
    return np.where(np.any(rows != 0, axis=1), np.concatenate(parts), -1).astype(np.int32)


def centre_tiers(centres: np.ndarray, *, tiers: int) -> np.ndarray:
    """Tier of (1 + cosine) / 2 of every two codes: float32 [R, E] -> uint8 [R, R]."""
    made = np.empty((len(centres), len(centres)), np.uint8)
    for at in range(0, len(centres), 1024):
        similarity = (1.0 + centres[at : at + 1024] @ centres.T) / 2.0
        made[at : at + 1024] = np.clip(similarity * tiers, 0, tiers - 1)
    return made


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
