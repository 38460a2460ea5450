"""Content signatures by locality-sensitive hashing: projection, bits, similarity.

A fixed matrix H [E, K] gives the bits e H > 0, packed into uint32 words; bit k of an item is bit k % 32 of word k // 32
(little-endian). The similarity of two items is the share of equal bits,

    sim(a, b) = 1 - popcount(a xor b) / K,   in [0, 1].

Source: LSH in place of dot products as in ETA (arXiv 2108.04468) and SDIM (2205.10249), used by AIF (2511.12934).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import layers
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.types import ItemFeatures, Params

WORD = 32
ROWS = 1 << 16  # items that are signed in one go


@dataclasses.dataclass(frozen=True)
class Signatures:
    """A fitted table of content signatures, uint32 [N, W], derived from the catalogue once.

    Histories and rows read it by item id, so the two sides cannot disagree. An item newer than the fit has
    a value computed from its content in its index row, and row 0 in histories until the next publish. A changed item keeps its
    value until `fit_tables` runs again.

    Attributes:
      bits: K, a multiple of 32 from 32 to 256.
    """

    bits: int = 64

    def __post_init__(self):
        fits = self.bits % WORD == 0 and WORD <= self.bits <= 256
        expect(fits, "signature bits", "a multiple of 32 from 32 to 256", self.bits)

    @property
    def name(self) -> str:
        """Its place in `params["fitted"]` and `ItemRow.fitted`."""
        return f"signatures_{self.bits}"

    def check(self, config: Config) -> None:
        """Raise ValueError where the schema has no content."""
        out = "give the data a content embedding, or leave the block out (`presets.aif` does that by itself)"
        expect(config.schema.content, type(self).__name__, "schema.content > 0", f"0: {out}")

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        """Return `projection` float32 [E, K] and `table` uint32 [N, W], zeros in row 0."""
        content = np.asarray(items.content)
        projection = fit_projection(content, bits=self.bits, seed=seed)
        signed = [np.asarray(sign(projection, jnp.asarray(content[i : i + ROWS]))) for i in range(0, len(content), ROWS)]
        table = np.concatenate(signed)
        table[0] = 0
        return {"projection": projection, "table": jnp.asarray(table)}

    def item(self, params: Params, features: ItemFeatures) -> jax.Array:
        """Return uint32 [W]: the table's row, or the signature of the content of an item that is newer than the fit."""
        table, projection, row = params["table"], params["projection"], jnp.asarray(features.ids["item"])
        value = layers.lookup(table, row)
        if features.content is None:
            return value
        return jnp.where((row > 0) & (row < table.shape[0]), value, sign(projection, jnp.asarray(features.content)))


def fit_projection(content: np.ndarray, *, bits: int, seed: int = 0) -> jax.Array:
    """Return H float32 [E, K]: the K main directions of the content [N, E], rotated at random to bits of equal weight.

    Bits follow the angle at the origin, which the cosine of the embeddings measures. Rows of zeros are left out. With E < K the
    missing directions are Gaussian.
    """
    rows = np.asarray(content, np.float64)
    rows = rows[np.any(rows != 0, axis=1)]
    expect(len(rows) >= 2, "fit_projection", "at least 2 rows with content", len(rows))
    rng, width = np.random.default_rng(seed), rows.shape[1]
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    directions = vectors[:, np.argsort(values)[::-1][: min(bits, width)]]
    if width < bits:
        directions = np.concatenate([directions, rng.normal(size=(width, bits - width)) / np.sqrt(width)], 1)
    rotation, _ = np.linalg.qr(rng.normal(size=(bits, bits)))
    return jnp.asarray(directions @ rotation, jnp.float32)


def sign(projection: jax.Array, content: jax.Array) -> jax.Array:
    """Return the signatures of content embeddings: float [..., E] and H [E, K] -> uint32 [..., K / 32]."""
    bits = content @ projection > 0
    words = bits.reshape(*bits.shape[:-1], bits.shape[-1] // WORD, WORD).astype(jnp.uint32)
    return (words << _places(words.shape)).sum(-1, dtype=jnp.uint32)


def signs(words: jax.Array) -> jax.Array:
    """Return the signs of signatures, -1 for a bit 0 and +1 for 1: uint32 [..., W] -> float32 [..., K]."""
    bits = (jnp.asarray(words)[..., None] >> _places((*words.shape, WORD))) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], words.shape[-1] * WORD).astype(jnp.float32) * 2.0 - 1.0  # no -1: rows may be 0


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Return bit positions 0..31 along the last axis, uint32 of that shape."""
    return jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
