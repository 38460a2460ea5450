"""Export: one folder that runs without this package, see docs/tutorial_export.md."""

from aif_jax.export.consume import ExportedIndex, ExportedModel, ExportError, flatten, load, verify
from aif_jax.export.contents import Restored, restore
from aif_jax.export.writer import CoverageError, rebuild, save

__all__ = [
    "save", "load", "verify", "rebuild", "restore", "flatten", "ExportedModel", "ExportedIndex", "Restored",
    "ExportError", "CoverageError",
]  # fmt: skip
