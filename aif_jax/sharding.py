"""Meshes: how arrays are placed on several devices. The only file that makes them.

Axes are Auto: the compiler places what is between the inputs and outputs that are pinned. (`jax.make_mesh` gives Explicit axes,
under which a look-up `table[ids]` in a row-sharded table raises.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aif_jax.trees import table_of

__all__ = ["row_mesh", "rows", "replicated", "place_state", "place_batch"]

AXIS = "rows"


def row_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis over devices, all of this process where None is given.

    Example:
      >>> row_mesh().size == len(jax.devices())
      True
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def rows(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices of a mesh; its length must be a multiple of them."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def place_state(state: Any, mesh: Mesh, *, split: Iterable[str] = ()) -> Any:
    """Puts a training state (or parameters) on a mesh: a copy of everything on each device, but for the tables named.

    Args:
      state: a `TrainState`, or any tree with tables under "embedding".
      mesh: from `row_mesh`.
      split: embedding tables whose rows, with those of their optimizer state, are spread over the devices. Rows must be a
        multiple of the devices: choose the attribute's size so.

    Raises:
      ValueError: a table whose rows cannot be spread evenly.
    """
    names = tuple(split)

    def place(path: tuple, leaf: Any) -> Any:
        name = table_of(path, names)
        if name is None or not leaf.ndim:
            return jax.device_put(leaf, replicated(mesh))
        if leaf.shape[0] % mesh.size:
            raise ValueError(f"table {name!r}: expected rows that are a multiple of {mesh.size} devices, got {leaf.shape[0]}")
        return jax.device_put(leaf, rows(mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Spreads the samples of a batch over a mesh; each process gives its own share of them, in order of processes.

    Args:
      batch: NumPy arrays with a leading axis of samples, a multiple of this process's devices.
      mesh: from `row_mesh`.

    Raises:
      ValueError: samples that cannot be spread evenly.
    """
    local = len(mesh.local_devices)

    def place(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.shape[0] % local:
            raise ValueError(f"batch: expected samples that are a multiple of {local} devices, got {leaf.shape[0]}")
        return jax.make_array_from_process_local_data(rows(mesh), leaf)

    return jax.tree.map(place, batch)
