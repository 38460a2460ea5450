"""Checkpoints: parameters, config, encoder and what a resumed run needs, in one folder that checks itself.

`save` and `load` handle one folder; `Checkpoints` keeps the last and the best of a run. A loaded checkpoint needs no other file
to score raw users and items. `storage` writes and reads any named trees in the same way.
"""

from aif_jax.checkpoint.contents import FORMAT, Checkpoint, load, save
from aif_jax.checkpoint.leaves import CheckpointError
from aif_jax.checkpoint.run import Checkpoints
from aif_jax.checkpoint.storage import METADATA_FILE, inspect, read, write

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "FORMAT",
    "METADATA_FILE",
    "inspect",
    "load",
    "read",
    "save",
    "write",
]
