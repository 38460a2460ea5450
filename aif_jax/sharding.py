"""Meshes: where arrays lie when there are several devices. The only file that makes them.

Axes are Auto: the compiler places what is between the inputs and outputs that are pinned. (`jax.make_mesh` gives Explicit axes,
under which a look-up `table[ids]` in a row-sharded table raises.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
