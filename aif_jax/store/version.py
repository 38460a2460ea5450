"""The version of a model: one string for the contents of its parameters, its config and its encoder.

User state, index and features carry the version that they were made with; a different one is refused, never mixed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aif_jax.checks import check_encoding, expect
from aif_jax.config import Config
from aif_jax.encoding.encoder import Encoder
from aif_jax.trees import is_key, leaves_by_path
from aif_jax.types import Params

__version__ = "0.2.0"
"""Of this package."""


@dataclasses.dataclass(frozen=True)
class Digest:
    """What identifies one leaf of a tree."""

    dtype: str  # "float32", "<U12" for strings, "key<fry>" for typed random keys
    shape: tuple[int, ...]
    sha256: str  # of the bytes in C order

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def fingerprint(params: Params, config: Config, encoder: Encoder | None = None) -> str:
    """Version of a model: 64 hex digits over path, dtype, shape and bytes of every leaf of `params`, the config, the encoder.

    Equal contents give equal strings, in NumPy or on a device, sharded or not. Every leaf is copied to the host once.

    Args:
      params: all groups, `fitted` included.
      config: with its schema and blocks.
      encoder: with its columns, vocabularies and scales; None for a model without one.

    Raises:
      ValueError: a leaf that this process does not hold whole.

    Example:
      >>> import numpy as np, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)))
      >>> params = {"item": {"kernel": np.zeros((2, 3), np.float32)}}
      >>> fingerprint(params, config) == fingerprint(params, config.replace(width=24))
      False
    """
    return combine({path: digest(leaf, path) for path, leaf in leaves_by_path(params).items()}, config, encoder)


def encoding_for(config: Config, encoder: Encoder | None = None) -> str:
    """The encoding that data for a model must have: its encoder's, else that of its schema; "" where neither is known.

    Raises EncodingMismatch where both are known and differ.
    """
    if encoder is None:
        return config.schema.encoding
    check_encoding("encoder", expected=config.schema.encoding, got=encoder.version)
    return encoder.version


def combine(leaves: Mapping[str, Digest], config: Config, encoder: Encoder | None = None) -> str:
    """The fingerprint, from the digests of the leaves."""
    parts = {
        "leaves": {path: dataclasses.astuple(leaf) for path, leaf in leaves.items()},
        "config": config.to_json(),
        "encoder": None if encoder is None else encoder.version,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def holds(leaf: Any) -> bool:
    """Whether this process holds an array whole: it is not spread over several processes."""
    return getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated


def digest(leaf: Any, path: str = "leaf") -> Digest:
    """The digest of one array, a typed random key by its key data; raises ValueError where this process holds only a part."""
    expect(holds(leaf), path, "an array that this process holds whole", "one spread over several processes")
    dtype = str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.asarray(leaf).dtype)
    data = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return Digest(dtype=dtype, shape=tuple(np.shape(leaf)), sha256=hashlib.sha256(flat.data).hexdigest())
