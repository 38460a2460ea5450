"""From a data set to batches: the event log, splits, samples, candidates, the pipeline of a training run.

Public names are in `__init__.pyi` and imported when first used, so that reading files runs no module of training.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
