"""The item function as the index runs it: vmapped, compiled once, always on batches of one size.

With one size an updated row equals a rebuilt one bit for bit: products over another number of rows may add in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from aif_jax import sharding
from aif_jax.checks import expect
from aif_jax.features import item_specs
from aif_jax.index.storage import STORAGES, Packed, Storage, encode, pack
from aif_jax.model import PreRanker
from aif_jax.types import ItemFeatures, Params


class ItemProgram:
    """Turns features into stored rows, on one device or over a mesh, to whose devices the parameters are copied."""

    def __init__(self, model: PreRanker, params: Params, *, storage: Storage, batch_size: int, mesh: Any = None):
        expect(storage in STORAGES, "storage", f"one of {STORAGES}", repr(storage))
        expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
        if mesh is not None:
            expect(batch_size % mesh.size == 0, "batch_size", f"a multiple of the mesh's {mesh.size} devices", batch_size)
        self.model = model
        self.params = jax.device_put(params) if mesh is None else jax.device_put(params, sharding.replicated(mesh))
        self.storage: Storage = storage
        self.batch_size = batch_size
        self.mesh = mesh
        self._compiled = _compiled(model.item, storage)

    def __call__(self, features: ItemFeatures) -> Packed:
        """Stored rows [batch_size] of at most `batch_size` items; later rows are undefined."""
        return self._compiled(self.params, self.place(features))

    def place(self, rows: Any) -> Any:
        """A batch of at most `batch_size` rows from the host, filled up with zeros, ready for a compiled function."""
        padded = jax.tree.map(lambda leaf: _pad(np.asarray(leaf), self.batch_size), rows)
        # On one device the compiled function sends NumPy arrays itself, in less time than an explicit transfer takes.
        return padded if self.mesh is None else jax.device_put(padded, sharding.rows(self.mesh))

    def shapes(self) -> Packed:
        """Shapes and dtypes of one batch of stored rows."""
        specs = item_specs(self.model.config.schema, lead=(self.batch_size,))
        return jax.eval_shape(self._compiled, self.params, specs)


@lru_cache(maxsize=16)
def _compiled(item: Callable[..., Any], storage: Storage) -> Any:
    def run(params: Params, features: ItemFeatures) -> Packed:
        return jax.vmap(lambda one: pack(encode(item(params, one), storage)))(features)

    return jax.jit(run)


def _pad(leaf: np.ndarray, size: int) -> np.ndarray:
    short = size - len(leaf)
    return leaf if not short else np.concatenate([leaf, np.zeros((short, *leaf.shape[1:]), leaf.dtype)])
