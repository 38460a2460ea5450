"""Meshes: how arrays are placed on several devices. The only file that makes them.

Axes are Auto: the compiler places what is between the inputs and outputs that are pinned. (`jax.make_mesh` gives Explicit axes,
under which a look-up `table[ids]` in a row-sharded table raises.)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aif_jax.trees import is_key, table_of

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


def padded_rows(count: int, devices: int) -> int:
    """Return rows of a table that is spread over devices: its own, and as many more as the devices need to divide it.

    Example:
      >>> padded_rows(63, 2), padded_rows(64, 2)
      (64, 64)
    """
    return -(-count // devices) * devices


def is_padded(template: Any, count: int) -> bool:
    """Return whether a template is of an array of `count` rows and of rows that pad it, see `padded_rows`."""
    sharding = getattr(template, "sharding", None)
    if sharding is None or not template.shape or template.shape[0] in (0, count):
        return False
    return template.shape[0] == padded_rows(count, template.shape[0] // sharding.shard_shape(template.shape)[0])


def place(array: Any, sharding: NamedSharding, *, count: int | None = None) -> jax.Array:
    """Put an array that this process holds whole where a sharding says, on devices of other processes too.

    Nothing is sent: each process copies its part to its devices.

    Args:
      array: NumPy, or on devices of this process; typed random keys too.
      sharding: where to.
      count: rows of the result; zeros follow those of the array. None for as many as it has.
    """
    if is_key(array):
        return jax.random.wrap_key_data(place(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return jax.device_put(array, sharding)
    if sharding.is_fully_addressable and count is None:
        return jax.device_put(array, sharding)
    held = np.asarray(array)
    if count is not None and count != len(held):
        held = np.pad(held, [(0, count - len(held))] + [(0, 0)] * (held.ndim - 1))
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def local(array: Any) -> Any:
    """Return an array that this process holds whole, on devices of this process alone; nothing is copied.

    Raises:
      ValueError: an array that is spread over several processes.
    """
    if getattr(array, "is_fully_addressable", True):
        return array
    if not array.is_fully_replicated:
        raise ValueError(f"expected an array that this process holds whole, got one spread over several: {array.sharding}")
    return array.addressable_data(0)


def place_state(state: Any, mesh: Mesh, *, split: Iterable[str] = ()) -> Any:
    """Put a training state (or parameters) on a mesh: a copy of everything on each device, but for the tables named.

    With several processes each gives the same state, whole.

    Args:
      state: a `TrainState`, or any tree with tables under "embedding".
      mesh: from `row_mesh`.
      split: embedding tables whose rows, and rows of optimizer state, are spread over the devices, padded by rows of zeros to a
        multiple of the devices (`padded_rows`); checkpoints are saved without the padding.
    """
    names = tuple(split)

    def one(path: tuple, leaf: Any) -> Any:
        if table_of(path, names) is None or not leaf.ndim:
            return place(leaf, replicated(mesh))
        return place(leaf, rows(mesh), count=padded_rows(leaf.shape[0], mesh.size))

    return jax.tree_util.tree_map_with_path(one, state)


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
        if leaf.shape[0] % local:
            raise ValueError(f"batch: expected samples that are a multiple of {local} devices, got {leaf.shape[0]}")
        return jax.make_array_from_process_local_data(rows(mesh), leaf)

    return jax.tree.map(one, batch)
