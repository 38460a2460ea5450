"""Export: one folder that runs without this package, see docs/tutorial_export.md."""

from aif_jax.export.consume import ExportedIndex, ExportedModel, ExportError, flatten, load, verify
from aif_jax.export.writer import CoverageError, rebuild, save

__all__ = ["save", "load", "verify", "rebuild", "flatten", "ExportedModel", "ExportedIndex", "ExportError", "CoverageError"]
