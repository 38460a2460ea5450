"""The catalogue job on Ray Data: actors that keep a compiled program. Needs the extra `ray`."""

from __future__ import annotations

from typing import Any

from aif_jax.checks import expect, needs_extra
from aif_jax.jobs import ItemJob
from aif_jax.readers.sources import pyarrow

RUNS = 16  # of the compiled function for what Ray hands over at once


def encode_items(dataset: Any, job: ItemJob, *, actors: int = 1, batch_size: int | None = None, **options: Any) -> Any:
    """Encodes a `ray.data.Dataset` of raw items; `ItemIndex.from_parts` merges what comes out.

    Args:
      dataset: rows with the columns of the items file.
      job: goes through the object store once; each actor reads it, compiles, and then takes batches.
      actors: processes, each with the model.
      batch_size: items that an actor takes at once, a multiple of the job's; None takes 16 times the job's.
      options: keyword arguments of `Dataset.map_batches`, such as `num_cpus` and `num_gpus` of an actor.

    Returns:
      A lazy `Dataset` of encoded rows, see `ItemJob.schema`; in the order of the items where `DataContext` preserves order.

    Raises:
      ImportError: Ray is missing.
      ValueError: a batch size that is no multiple of the job's. Running it fails with what `ItemJob` raises.
    """
    size = RUNS * job.batch_size if batch_size is None else batch_size
    expect(size >= 1 and size % job.batch_size == 0, "batch_size", f"a multiple of the job's, {job.batch_size}", size)
    return dataset.map_batches(EncodeItems, batch_size=size, **_actors(job, actors), **options)


class EncodeItems:
    """What an actor of `encode_items` runs: a table of raw items in, encoded rows out.

    Args:
      held: the reference to the job in a list: Ray resolves none among arguments of a constructor, so the actor does.
    """

    def __init__(self, held: list[Any]):
        self.job: ItemJob = _fetch(held)
        self.job.compile()
        self.batches = 0  # so far, for messages

    def __call__(self, table: Any) -> Any:
        encoded = list(self.job(table.to_batches(), first=self.batches))
        self.batches += len(table.to_batches())
        return pyarrow().Table.from_batches(encoded, schema=self.job.schema)


def _actors(job: ItemJob, count: int) -> dict[str, Any]:
    """Arguments that all calls share."""
    with needs_extra("Ray Data needs Ray", "ray"):
        import ray  # pyright: ignore[reportMissingImports]  the extra is not installed where types are checked
        from ray.data import ActorPoolStrategy  # pyright: ignore[reportMissingImports]

    constructor = {"held": [ray.put(job)]}
    return {"compute": ActorPoolStrategy(size=count), "batch_format": "pyarrow", "fn_constructor_kwargs": constructor}


def _fetch(held: list[Any]) -> Any:
    with needs_extra("Ray Data needs Ray", "ray"):
        import ray  # pyright: ignore[reportMissingImports]

    return ray.get(held[0])
