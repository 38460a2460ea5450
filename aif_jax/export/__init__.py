"""Export: one folder that runs without this package, see docs/tutorial_export.md.

Public names are in `__init__.pyi` and imported when first used, so that `store/` may read files by `consume`, which imports
nothing of the package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
