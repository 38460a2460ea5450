"""Devices and processes: meshes and row-sharded tables, the processes of one job."""

from aif_jax.sharding.meshes import local, padded_rows, place, place_batch, place_state, replicated, row_mesh, rows

__all__ = ["row_mesh", "rows", "replicated", "padded_rows", "place", "place_batch", "place_state", "local"]
