"""Meshes: how arrays are placed on several devices. The only file that makes them.

Axes are Auto: the compiler places what is between the inputs and outputs that are pinned. (`jax.make_mesh` gives Explicit axes,
under which a look-up `table[ids]` in a sharded batch raises.)
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aif_jax.checks import expect
from aif_jax.trees import is_key

AXIS = "rows"


def row_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of one axis over devices, all of this process where None is given.

    Example:
      >>> row_mesh().size == len(jax.devices())
      True
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def rows(mesh: Mesh) -> NamedSharding:
    """Return the leading axis split over all devices of a mesh; its length must be a multiple of them."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Put an array that this process holds whole where a sharding says, on devices of other processes too.

    Nothing is sent: each process copies its part to its devices. Takes arrays, also keys, of the host or its devices.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if is_key(array):
        return jax.random.wrap_key_data(place(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    held = np.asarray(array)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def local(array: Any) -> Any:
    """Return an array that this process holds whole, on devices of this process alone; nothing is copied.

    Raises:
      ValueError: an array that is spread over several processes.
    """
    if getattr(array, "is_fully_addressable", True):
        return array
    expect(array.is_fully_replicated, "array", "one that a process holds whole", f"one spread over several: {array.sharding}")
    return array.addressable_data(0)


def place_state(state: Any, mesh: Mesh) -> Any:
    """Put a training state, or parameters, on a mesh: a copy on each device. Several processes each give the same, whole."""
    return jax.tree.map(lambda leaf: place(leaf, replicated(mesh)), state)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Spread the samples of a batch over a mesh; each process gives its own share of them, in order of processes.

    Args:
      batch: NumPy arrays with a leading axis of samples, a multiple of this process's devices.
      mesh: from `row_mesh`.

    Raises:
      ValueError: samples that cannot be spread evenly.
    """
    local = len(mesh.local_devices)

    def one(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        expect(leaf.shape[0] % local == 0, "batch", f"samples that are a multiple of {local} devices", leaf.shape[0])
        return jax.make_array_from_process_local_data(rows(mesh), leaf)

    return jax.tree.map(one, batch)
