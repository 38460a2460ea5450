"""Refresh: trains the served model on newer events and publishes it if the gate passes it.

`run` runs the `steps`; `gate` judges old against new. A module `aif_jax.refresh` would hide the function of this name.
"""

from aif_jax.refreshing.config import RefreshConfig
from aif_jax.refreshing.gate import GateConfig, Measurement, Requests, Verdict, judge, measure, volume
from aif_jax.refreshing.run import RefreshResult, refresh
from aif_jax.refreshing.warm import forget_ids, warm_start, with_served_vocabulary

__all__ = [
    "refresh", "RefreshConfig", "RefreshResult",
    "GateConfig", "Requests", "Measurement", "Verdict", "measure", "judge", "volume",
    "forget_ids", "warm_start", "with_served_vocabulary",
]  # fmt: skip
