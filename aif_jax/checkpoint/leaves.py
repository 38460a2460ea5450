"""Leaves as files hold them: typed random keys as key data, strings as code points, Python scalars as arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.trees import is_key
from aif_jax.version import Digest, digest

KEY_IMPLEMENTATIONS = {"key<fry>": ("threefry2x32", 2), "key<rbg>": ("rbg", 4), "key<urbg>": ("unsafe_rbg", 4)}


class CheckpointError(ValueError):
    """A folder that is torn, altered, or not one of this library."""


def encode(leaf: Any) -> jax.Array | np.ndarray:
    """A leaf as Orbax takes it."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    return np.ascontiguousarray(array[..., None]).view(np.uint32) if array.dtype.kind == "U" else array


def abstract(leaf: Digest, template: Any) -> Any:
    """The array to request from Orbax: with the sharding of the template where it has one, else in NumPy."""
    if leaf.dtype in KEY_IMPLEMENTATIONS:
        return np.empty((*leaf.shape, KEY_IMPLEMENTATIONS[leaf.dtype][1]), np.uint32)
    dtype = jnp.dtype(leaf.dtype)
    if dtype.kind == "U":
        return np.empty((*leaf.shape, dtype.itemsize // 4), np.uint32)
    # An array that was never placed by hand has a sharding too, but does not insist on it.
    sharding = getattr(template, "sharding", None) if getattr(template, "committed", True) else None
    return np.empty(leaf.shape, dtype) if sharding is None else jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def decode(array: Any, leaf: Digest) -> Any:
    """The inverse of `encode`."""
    if leaf.dtype in KEY_IMPLEMENTATIONS:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=KEY_IMPLEMENTATIONS[leaf.dtype][0])
    if leaf.dtype.startswith("<U"):
        return array.view(leaf.dtype)[..., 0]
    return array


def place(array: Any, leaf: Digest, template: Any, name: str) -> Any:
    """A leaf as `decode` returned it, checked against what was saved, and moved to where the template wants it.

    The template is an array, a `jax.ShapeDtypeStruct`, None for the default device, or `np.ndarray` for NumPy. Raises
    CheckpointError for other contents, ValueError where JAX reduced the dtype.
    """
    got = digest(array)
    if got.dtype != leaf.dtype:
        raise ValueError(f"{name}: saved as {leaf.dtype}, but JAX here gives {got.dtype}; set jax_enable_x64 or use NumPy")
    if got != leaf:
        raise CheckpointError(f"{name} was altered: its contents are not those that were saved")
    if isinstance(array, jax.Array) or template is np.ndarray or isinstance(template, np.ndarray) or array.dtype.kind == "U":
        return array
    moved = jnp.asarray(array)
    return moved if moved.dtype == array.dtype else array  # 64 bits stay in NumPy where JAX would cut them
