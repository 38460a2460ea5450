"""Catalogue and user jobs on Spark's `mapInArrow`. Needs the extra `spark`, and Java."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from aif_jax.checks import expect
from aif_jax.jobs import ItemJob, UserJob


def encode_items(frame: Any, job: ItemJob) -> Any:
    """Encodes a `pyspark.sql.DataFrame` of raw items; `ItemIndex.from_parts` merges what comes out.

    Args:
      frame: rows with the columns of the items file; a partition of it is a task.
      job: is broadcast; a Python worker that Spark uses again keeps the compiled program.

    Returns:
      A lazy `DataFrame` of encoded rows, see `ItemJob.schema`.

    Raises:
      ImportError: PySpark is missing. Running it fails with what `ItemJob` raises.
    """
    return _mapped(frame, job)


def user_rows(frame: Any, job: UserJob, *, partitions: int) -> Any:
    """Makes rows of users from a `pyspark.sql.DataFrame` of raw events; `UserTable.from_parts` merges what comes out.

    Args:
      frame: rows with the columns of the events file, in any order; Spark brings the events of a user together and sorts them.
      job: as for `encode_items`.
      partitions: tasks.

    Returns:
      A lazy `DataFrame` of rows of users, see `UserJob.schema`.

    Raises:
      ImportError: PySpark is missing.
      ValueError: fewer than one partition. Running it fails with what `UserJob` raises.
    """
    expect(partitions >= 1, "partitions", "at least 1", partitions)
    ordered = frame.repartition(partitions, job.column).sortWithinPartitions(job.column)
    return _mapped(ordered, job)


class Task:
    """What a Python worker runs for a partition; the job comes by a broadcast variable."""

    def __init__(self, shared: Any):
        self.shared = shared

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        return self.shared.value(batches)


def schema(job: ItemJob | UserJob) -> Any:
    """The schema of what comes out of a job as Spark's `StructType`, for a call of `mapInArrow` by hand."""
    from pyspark.sql.pandas.types import from_arrow_schema  # pyright: ignore[reportMissingImports]

    return from_arrow_schema(job.schema)


def _mapped(frame: Any, job: ItemJob | UserJob) -> Any:
    return frame.mapInArrow(Task(frame.sparkSession.sparkContext.broadcast(job)), schema(job))
