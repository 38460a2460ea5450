"""Checkpoints: parameters, config, encoder and what a resumed run needs, in one folder that checks itself.

`save` and `load` handle one folder; `Checkpoints` keeps the last and the best of a run.
"""

from aif_jax.checkpoint.contents import Checkpoint, Checkpoints, load, save, settings_of
from aif_jax.checkpoint.storage import METADATA_FILE, CheckpointError

__all__ = ["save", "load", "settings_of", "Checkpoint", "Checkpoints", "CheckpointError", "METADATA_FILE"]
