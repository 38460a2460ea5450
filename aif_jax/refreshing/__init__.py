"""Refresh: trains the served model on newer events and publishes it if the gate passes it.

`run` runs `steps.STEPS`, each done once and sealed; `gate` judges old against new on the same requests. The package is called
`refreshing` because a module `aif_jax.refresh` would hide the function.
"""

from aif_jax.refreshing.config import RefreshConfig
from aif_jax.refreshing.gate import (
    GateConfig,
    Measured,
    Requests,
    Verdict,
    judge,
    measure,
    volume,
)
from aif_jax.refreshing.run import Refreshed, refresh
from aif_jax.refreshing.warm import as_served, forgotten, warm_start

__all__ = [
    "refresh", "RefreshConfig", "Refreshed",
    "GateConfig", "Requests", "Measured", "Verdict", "measure", "judge", "volume",
    "forgotten", "warm_start", "as_served",
]  # fmt: skip
