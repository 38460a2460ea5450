"""The catalogue job on Ray Data: actors that keep a compiled program. Needs the extra `ray`."""

from __future__ import annotations

from typing import Any

from aif_jax.checks import expect, needs_extra
from aif_jax.engines.items import ItemJob
from aif_jax.readers.sources import pyarrow

RUNS = 16  # of the compiled function for what Ray hands over at once


def encode_items(dataset: Any, job: ItemJob, *, actors: int = 1, batch_size: int | None = None, **options: Any) -> Any:
    """Encodes a `ray.data.Dataset` of raw items; `ItemIndex.from_parts` merges what comes out.

    Args:
      dataset: rows with the columns of the items file.
      job: travels with the function; each actor reads it, compiles, and then takes batches.
      actors: processes, each with the model.
      batch_size: items that an actor takes at once, a multiple of the job's; None takes 16 times the job's.
      options: keyword arguments of `Dataset.map_batches`, such as `num_cpus` and `num_gpus` of an actor.

    Returns:
      A lazy `Dataset` of encoded rows, see `ItemJob.schema`; in the order of the items where `DataContext` preserves order.

    Raises:
      ImportError: Ray is missing.
      ValueError: a batch size that is no multiple of the job's. Running it fails with what `ItemJob` raises.
    """
    with needs_extra("Ray Data needs Ray", "ray"):
        from ray.data import ActorPoolStrategy  # pyright: ignore[reportMissingImports]  the extra is not installed here

    size = RUNS * job.batch_size if batch_size is None else batch_size
    expect(size >= 1 and size % job.batch_size == 0, "batch_size", f"a multiple of the job's, {job.batch_size}", size)
    given = {"compute": ActorPoolStrategy(size=actors), "batch_format": "pyarrow", "batch_size": size}
    return dataset.map_batches(EncodeItems, fn_constructor_args=(job,), **given, **options)


class EncodeItems:
    """What an actor of `encode_items` runs: a table of raw items in, encoded rows out."""

    def __init__(self, job: ItemJob):
        self.job = job
        self.job.compile()

    def __call__(self, table: Any) -> Any:
        return pyarrow().Table.from_batches(self.job(table.to_batches()), schema=self.job.schema)
