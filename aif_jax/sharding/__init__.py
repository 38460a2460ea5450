"""Devices and processes: meshes, the processes of one job."""

from aif_jax.sharding.meshes import local, place, place_batch, place_state, replicated, row_mesh, rows

__all__ = ["row_mesh", "rows", "replicated", "place", "place_batch", "place_state", "local"]
