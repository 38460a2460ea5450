"""How a row is stored: vectors as float32, bfloat16 or int8 with a scale for each row; everything else as it is.

A stored vector stands in the table as one of two small records, so that the form of a table tells how to decode it. Signatures
and codes are packed integers already; single values such as bids keep their float32. Source: ours.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from aif_jax.types import Array, record

Storage = Literal["float32", "bfloat16", "int8"]
STORAGES = ("float32", "bfloat16", "int8")
NARROW = 8
"""Vectors narrower than this stay float32: a scale of their own would cost what int8 saves."""


@record
class Half:
    """bfloat16 vectors by their bits: XLA widens a bfloat16 table to float32 as a whole to write a few rows on CPU."""

    bits: Array  # uint16 [..., D]


@record
class Scaled:
    """int8 vectors, each with a scale: x = values * scale."""

    values: Array  # int8 [..., D]
    scale: Array  # float32 [...] largest |x| / 127


def encode(row: Any, storage: Storage) -> Any:
    """A row as it is stored.

    Args:
      row: a pytree of arrays, one item; vmap for more.
      storage: of float vectors of at least `NARROW` entries.

    Example:
      >>> import jax.numpy as jnp
      >>> encode({"vector": jnp.arange(8.0), "bid": jnp.float32(2.5)}, "int8")["vector"].values.tolist()
      [0, 18, 36, 54, 73, 91, 109, 127]
    """
    return jax.tree.map(lambda leaf: _encode_leaf(leaf, storage), row)


def decode(table: Any, rows: Array) -> Any:
    """Rows of a table as the interaction takes them: pure, for use inside jit.

    Args:
      table: of an index.
      rows: int32 [C]; a negative row reads row 0, which the caller masks.

    Returns:
      the row type of the model with leading axis C, vectors float32.
    """
    at = jnp.maximum(jnp.asarray(rows), 0)
    return jax.tree.map(lambda leaf: _decode_leaf(leaf, at), table, is_leaf=lambda leaf: isinstance(leaf, Half | Scaled))


def expect_storage(storage: str) -> None:
    """Raises ValueError for an unknown storage."""
    if storage not in STORAGES:
        raise ValueError(f"storage: expected one of {STORAGES}, got {storage!r}")


def _encode_leaf(leaf: jax.Array, storage: Storage) -> Any:
    if storage == "float32" or leaf.ndim == 0 or leaf.shape[-1] < NARROW or leaf.dtype != jnp.float32:
        return leaf
    if storage == "bfloat16":
        return Half(bits=jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16))
    scale = jnp.max(jnp.abs(leaf), axis=-1) / 127.0
    values = jnp.round(leaf / jnp.where(scale > 0, scale, 1.0)[..., None])
    return Scaled(values=values.astype(jnp.int8), scale=scale)


def _decode_leaf(leaf: Any, at: jax.Array) -> jax.Array:
    def take(table: Array) -> jax.Array:
        return jnp.asarray(table).at[at].get(mode="clip")

    if isinstance(leaf, Half):
        return jax.lax.bitcast_convert_type(take(leaf.bits), jnp.bfloat16).astype(jnp.float32)
    if isinstance(leaf, Scaled):
        return take(leaf.values).astype(jnp.float32) * take(leaf.scale)[..., None]
    return take(leaf)
