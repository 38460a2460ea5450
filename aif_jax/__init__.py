"""Pre-ranking with AIF (arXiv 2511.12934) in JAX: user, item and interaction as three pure functions.

Public names are listed in `__init__.pyi`, in the order in which a request meets them: your files, a model, training, the index,
serving, export. Each is imported when it is first used, so `import aif_jax` itself loads nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
