"""The catalogue job on Spark's `mapInArrow`. Needs the extra `spark`, and Java."""

from __future__ import annotations

from typing import Any

from aif_jax.checks import needs_extra
from aif_jax.engines.items import ItemJob


def encode_items(frame: Any, job: ItemJob) -> Any:
    """Encodes a `pyspark.sql.DataFrame` of raw items; `ItemIndex.from_parts` merges what comes out.

    Args:
      frame: rows with the columns of the items file; a partition of it is a task.
      job: travels with the function; a Python worker that Spark uses again keeps the compiled program.

    Returns:
      A lazy `DataFrame` of encoded rows, see `ItemJob.schema`.

    Raises:
      ImportError: PySpark is missing. Running it fails with what `ItemJob` raises.
    """
    with needs_extra("Spark needs PySpark", "spark"):
        from pyspark.sql.pandas.types import from_arrow_schema  # pyright: ignore[reportMissingImports]

    return frame.mapInArrow(job, from_arrow_schema(job.schema))
