"""Content signatures by locality-sensitive hashing: projection, bits, similarity.

A fixed matrix H [E, K] gives the bits e H > offset, packed into uint32 words; bit k of an item stands in word k // 32 at
position k % 32 (little-endian). The similarity of two items is the share of equal bits,

    sim(a, b) = 1 - popcount(a xor b) / K,   in [0, 1].

Source: LSH in place of dot products as in ETA (arXiv 2108.04468) and SDIM (2205.10249), used by AIF (2511.12934); the fitted
rotation follows iterative quantisation (Gong and Lazebnik 2011), by default without the iterations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.config import Config
from aif_jax.types import Array, Params

WORD = 32


def random_projection(key: jax.Array, *, content: int, bits: int) -> Params:
    """A Gaussian `projection` [E, K] with `offset` zeros [K]: needs no data, and K = 256 where a fitted one needs 64."""
    return {"projection": jax.random.normal(key, (content, bits)), "offset": jnp.zeros(bits)}


def fit_projection(content: np.ndarray, *, bits: int, seed: int = 0, iterations: int = 0, centre: bool = False) -> Params:
    """The K main directions of the content, then a rotation: bits of equal weight that follow the data.

    The rotation is random; with `iterations` it is turned towards the corners of the cube (iterative quantisation, ITQ):
    B = sign(V R), then R from the singular vectors of V^T B, and so on. `experiments/signatures.py` compares them.

    Rows that are all zero (unknown items) are left out of the fit. With E < K the missing directions are Gaussian.

    Args:
      content: float [N, E] content embeddings of the catalogue.
      bits: K.
      seed: of the rotation.
      iterations: of ITQ.
      centre: take the mean off first (PCA): every bit is set for half of the rows. Without (the default), bits follow the
        angle at the origin, which is what the cosine of the embeddings themselves measures.

    Returns:
      `projection` float32 [E, K] and `offset` float32 [K]: the projected mean, or zeros.
    """
    rows = np.asarray(content, np.float64)
    rows = rows[np.any(rows != 0, axis=1)]
    if len(rows) < 2:
        raise ValueError(f"fit_projection: expected at least 2 rows with content, got {len(rows)}")
    rng = np.random.default_rng(seed)
    width = rows.shape[1]
    mean = rows.mean(0) if centre else np.zeros(width)
    values, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    directions = vectors[:, np.argsort(values)[::-1][: min(bits, width)]]
    if width < bits:
        directions = np.concatenate([directions, rng.normal(size=(width, bits - width)) / np.sqrt(width)], 1)
    rotation, _ = np.linalg.qr(rng.normal(size=(bits, bits)))
    if iterations:
        reduced = (rows - mean) @ directions
        for _ in range(iterations):
            left, _, right = np.linalg.svd(reduced.T @ np.sign(reduced @ rotation))
            rotation = left @ right
    projection = directions @ rotation
    return {"projection": jnp.asarray(projection, jnp.float32), "offset": jnp.asarray(mean @ projection, jnp.float32)}


def sign(frozen: Params, content: jax.Array) -> jax.Array:
    """Signature of a content embedding: float [..., E] -> uint32 [..., K / 32]. Sharded or batched by the caller."""
    return pack(content @ frozen["projection"] > jnp.expand_dims(frozen["offset"], range(content.ndim - 1)))


def pack(bits: jax.Array) -> jax.Array:
    """bool [..., K] -> uint32 [..., K / 32], little-endian: bit k is bit k % 32 of word k // 32."""
    words = bits.reshape(*bits.shape[:-1], bits.shape[-1] // WORD, WORD).astype(jnp.uint32)
    return (words << _places(words.shape)).sum(-1, dtype=jnp.uint32)


def unpack(words: jax.Array) -> jax.Array:
    """uint32 [..., W] -> bool [..., 32 W]; inverse of `pack`."""
    bits = (words[..., None] >> _places((*words.shape, WORD))) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1).astype(bool)


def signs(words: jax.Array) -> jax.Array:
    """uint32 [..., W] -> float32 [..., K] of -1 and +1."""
    return unpack(words).astype(jnp.float32) * 2.0 - 1.0


def to_bytes(words: Array) -> np.ndarray:
    """uint32 [..., W] -> uint8 [..., 4 W], the layout of `np.packbits(bits, bitorder="little")` and of faiss binary indexes."""
    return np.ascontiguousarray(np.asarray(words).astype("<u4")).view(np.uint8)


def from_bytes(octets: np.ndarray) -> np.ndarray:
    """uint8 [..., 4 W] -> uint32 [..., W]; inverse of `to_bytes`."""
    return np.ascontiguousarray(octets, np.uint8).view("<u4").astype(np.uint32)


def hamming(a: jax.Array, b: jax.Array) -> jax.Array:
    """Differing bits: uint32 [..., W] against uint32 [..., W] (broadcast) -> int32 [...]."""
    return jax.lax.population_count(a ^ b).astype(jnp.int32).sum(-1)


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Share of equal bits of every pair: uint32 [C, W], uint32 [L, W] -> float32 [C, L]."""
    bits = a.shape[-1] * WORD
    return 1.0 - hamming(a[:, None, :], b[None, :, :]).astype(jnp.float32) / bits


def fit_codes(signatures: np.ndarray, *, codes: int, seed: int = 0, iterations: int = 10) -> jax.Array:
    """Bridge codes by k-majority: k-means in Hamming space, each code the bitwise majority of its signatures.

    Where the catalogue has at most R distinct signatures the codes are these themselves, so SimTier by codes is exact; rows
    left over repeat the first.

    Args:
      signatures: uint32 [N, W].
      codes: R.
      seed: of the start, drawn from the distinct signatures.
      iterations: of assignment and majority.

    Returns:
      uint32 [R, W].
    """
    distinct, weights = np.unique(np.asarray(signatures), axis=0, return_counts=True)
    if len(distinct) <= codes:
        return jnp.asarray(np.concatenate([distinct, np.repeat(distinct[:1], codes - len(distinct), axis=0)]))
    points = np.asarray(signs(jnp.asarray(distinct)))
    centres = points[np.random.default_rng(seed).choice(len(points), codes, replace=False)]
    for _ in range(iterations):
        nearest = np.concatenate([(chunk @ centres.T).argmax(1) for chunk in np.array_split(points, len(points) // 4096 + 1)])
        votes = np.zeros_like(centres)
        np.add.at(votes, nearest, points * weights[:, None])
        centres = np.where(votes == 0, centres, np.sign(votes)).astype(np.float32)
    return pack(jnp.asarray(centres) > 0)


def fit_centres(content: np.ndarray, *, codes: int, seed: int = 0, iterations: int = 10) -> np.ndarray:
    """Bridge codes by k-means on the sphere: each code the direction of the mean of its rows of unit length.

    Where at most R distinct rows have content the codes are these themselves, so SimTier by codes is exact; codes left over
    repeat the first. Means are taken over at most 256 rows a code, drawn at random; rows that are all zero are left out.

    Args:
      content: float [N, E].
      codes: R.
      seed: of draw and start.
      iterations: of assignment and mean.

    Returns:
      float32 [R, E], of unit length.
    """
    rng = np.random.default_rng(seed)
    rows = _unit(np.asarray(content, np.float32))
    rows = rows[np.any(rows != 0, axis=1)]
    if not len(rows):
        raise ValueError(f"lsh.fit_centres: expected rows with content, got {np.shape(content)} of zeros")
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


def fit(content: np.ndarray, config: Config, *, seed: int = 0) -> Params:
    """Everything that a config's model keeps fixed, fitted once on the catalogue's content; give it to
    `model.init(frozen=...)`.

    Args:
      content: float [N, E], row r for item row r; the "exact" baseline keeps it as a table.
      config: static.
      seed: of rotation and codes.

    Returns:
      `projection` and `offset` where signatures are compared. For simtier="codes" also `codes` by signature; or, by cosine,
      `code_centres`, the tiers `code_tiers` between them and `item_codes`, the code of every item. `content` for
      architecture="exact". {} where nothing is needed.
    """
    if np.ndim(content) != 2 or np.shape(content)[1] != config.schema.content:
        raise ValueError(f"lsh.fit content: expected float [N, {config.schema.content}], got shape {np.shape(content)}")
    if config.architecture == "exact":
        return {"content": jnp.asarray(content, jnp.float32)}
    frozen: Params = {}
    if config.uses_code_centres:
        frozen = _by_centres(fit_centres(content, codes=config.codes, seed=seed), content, config)
    if not config.uses_signatures:
        return frozen
    frozen |= fit_projection(content, bits=config.signature_bits, seed=seed)
    if config.simtier == "codes" and config.codes_by == "signature":
        signatures = sign(frozen, jnp.asarray(content, jnp.float32))
        frozen["codes"] = fit_codes(np.asarray(signatures), codes=config.codes, seed=seed)
    return frozen


def random_frozen(key: jax.Array, config: Config) -> Params:
    """What `fit` gives, drawn at random: for tests, or before a catalogue is there."""
    if config.architecture == "exact":
        raise ValueError("the exact baseline compares float content: pass frozen=lsh.fit(content, config) to init")
    gaussian, codes = jax.random.split(key)
    frozen: Params = {}
    if config.uses_code_centres:
        centres, tiers, items = jax.random.split(codes, 3)
        between = jax.random.randint(tiers, (config.codes, config.codes), 0, config.tiers).astype(jnp.uint8)
        frozen["code_centres"] = jax.random.normal(centres, (config.codes, config.schema.content))
        frozen["code_tiers"] = between
        frozen["item_codes"] = jax.random.randint(items, (config.schema.item_attribute("item").size,), 0, config.codes)
    if not config.uses_signatures:
        return frozen
    frozen |= random_projection(gaussian, content=config.schema.content, bits=config.signature_bits)
    if config.simtier == "codes" and config.codes_by == "signature":
        frozen["codes"] = jax.random.bits(codes, (config.codes, config.signature_words), jnp.uint32)
    return frozen


def check_frozen(frozen: Params, config: Config) -> None:
    """Raises ValueError where frozen parameters do not have the shapes that a config asks for."""
    content, bits = config.schema.content, config.signature_bits
    expected: dict[str, tuple[int, ...]] = {}
    if config.architecture == "exact":
        expected = {"content": (config.schema.item_attribute("item").size, content)}
    if config.uses_signatures:
        expected |= {"projection": (content, bits), "offset": (bits,)}
        if config.simtier == "codes" and config.codes_by == "signature":
            expected["codes"] = (config.codes, config.signature_words)
    if config.uses_code_centres:
        expected |= {"code_centres": (config.codes, content), "code_tiers": (config.codes, config.codes)}
        expected["item_codes"] = (config.schema.item_attribute("item").size,)
    got = {name: tuple(np.shape(value)) for name, value in frozen.items()}
    if got != expected:
        raise ValueError(f"frozen parameters: expected shapes {expected}, got {got}")


def _by_centres(centres: np.ndarray, content: np.ndarray, config: Config) -> Params:
    size = config.schema.item_attribute("item").size
    if len(content) != size:
        raise ValueError(f"lsh.fit content: codes_by='cosine' needs a row for each of the {size} items, got {len(content)}")
    return {
        "code_centres": jnp.asarray(centres),
        "code_tiers": jnp.asarray(centre_tiers(centres, tiers=config.tiers)),
        "item_codes": jnp.asarray(nearest_centre(np.asarray(content, np.float32), centres)),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Bit positions 0..31 along the last axis, uint32 of that shape."""
    return jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
