"""Runs an exported model with jax, numpy and the standard library; no model code, no flax, no optax, no orbax.

A copy of this package is in every exported folder: a serving team can `import consume` from there. `aif_jax.export.load` is the
same code. No pickle is read, and nothing is opened that the manifest does not list.
"""

from .files import ExportError, checked, checked_arrays, read_arrays, read_manifest, seal
from .functions import callable_here, deserialize
from .model import ExportedIndex, ExportedModel, difference, flatten, load, verify

__all__ = [
    "load", "verify", "flatten", "ExportedModel", "ExportedIndex", "ExportError", "checked", "checked_arrays", "deserialize",
    "callable_here", "difference", "read_arrays", "read_manifest", "seal",
]  # fmt: skip
