"""Public names of `aif_jax.export` and the modules that they come from; `__init__.py` reads this file."""

from .consume import ExportedIndex, ExportedModel, ExportError, flatten, load, verify
from .contents import RestoredModel, restore
from .writer import save

__all__ = [
    "save", "load", "verify", "restore", "flatten", "ExportedModel", "ExportedIndex", "RestoredModel", "ExportError",
]  # fmt: skip
