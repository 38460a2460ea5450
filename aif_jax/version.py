"""The version of a model: one string for the contents of its parameters, its config and its schema.

User state, index and interaction must be made from the same parameters. Every one of them carries this string, and what differs
is refused with `VersionMismatch`, never mixed. Source: the paper names the need (one model version over nearline and online
parts); the way is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aif_jax.config import Config
from aif_jax.trees import is_key, leaves_by_path
from aif_jax.types import Params


class VersionMismatch(ValueError):
    """Two parts of the system come from different parameters, config or schema.

    Args:
      what: the part that does not fit, such as "index".
      expected: the version in use.
      got: the version of the part.

    Attributes:
      expected, got: the two versions.
    """

    def __init__(self, what: str, *, expected: str, got: str):
        super().__init__(
            f"{what}: expected version {expected}, got {got}; both must be made from the same params, config and schema"
        )
        self.expected = expected
        self.got = got


@dataclasses.dataclass(frozen=True)
class Digest:
    """What identifies one leaf of a tree."""

    dtype: str  # "float32", "<U12" for strings, "key<fry>" for typed random keys
    shape: tuple[int, ...]
    sha256: str  # of the bytes in C order

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def fingerprint(params: Params, config: Config) -> str:
    """Version of a model: 64 hex digits over path, dtype, shape and bytes of every leaf of `params`, and over the config.

    Equal contents give equal strings, in NumPy or on a device, sharded or not. Every leaf is copied to the host once.

    Args:
      params: all groups, the signature matrix in `frozen` included.
      config: with its schema.

    Raises:
      ValueError: a leaf that this process does not hold whole.

    Example:
      >>> import numpy as np, aif_jax as aif
      >>> config, params = aif.tiny(), {"item": {"kernel": np.zeros((2, 3), np.float32)}}
      >>> version = fingerprint(params, config)
      >>> version == fingerprint(params, config), version == fingerprint(params, config.replace(width=16))
      (True, False)
    """
    return combine(digests(params), config)


def combine(leaves: Mapping[str, Digest], config: Config) -> str:
    """The fingerprint, from digests made before."""
    parts = {"leaves": {path: dataclasses.astuple(leaf) for path, leaf in leaves.items()}, "config": config.to_json()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digests(tree: Any) -> dict[str, Digest]:
    """A digest for each leaf, by path."""
    return {path: digest(leaf, path) for path, leaf in leaves_by_path(tree).items()}


def digest(leaf: Any, path: str = "leaf") -> Digest:
    """The digest of one array; a typed random key counts by its key data.

    Raises:
      ValueError: an array of which this process holds only a part.
    """
    if not getattr(leaf, "is_fully_addressable", True):
        raise ValueError(f"{path}: expected an array that this process holds whole, got one spread over several processes")
    dtype = str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.asarray(leaf).dtype)
    data = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return Digest(dtype=dtype, shape=tuple(np.shape(leaf)), sha256=hashlib.sha256(flat.data).hexdigest())
