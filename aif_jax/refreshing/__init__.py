"""Tomorrow's model: from a served model and newer events to the next version in service, or to a reason why not.

`refresh` runs the steps, each done once and sealed; `gate` judges old against new on the same requests. The room has another
name than the call, because importing a module `aif_jax.refresh` would hide the function.
"""

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
    "refresh", "Refreshed",
    "GateConfig", "Requests", "Measured", "Verdict", "measure", "judge", "volume",
    "forgotten", "warm_start", "as_served",
]  # fmt: skip
