"""Raw items in, rows of an `ItemIndex` out: a function of Arrow record batches, and its adapters to Ray Data and Spark."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.checks import VersionMismatch, needs_extra
from aif_jax.export.contents import open as open_model
from aif_jax.index import parts
from aif_jax.index.build import ahead, checked, rebatch
from aif_jax.index.store import BATCH, ItemProgram
from aif_jax.readers import encode_items
from aif_jax.readers.tables import Problems, pyarrow
from aif_jax.store.codec import Storage
from aif_jax.store.folders import local


@dataclasses.dataclass(frozen=True)
class ItemJob:
    """Encodes a catalogue wherever it is called: `job(batches)` gives Arrow batches of stored rows for batches of raw items.

    The item function runs on batches of one size, filled up with zeros, so one compiled program serves and rows are those of
    `ItemIndex.build` bit for bit, however the engine cuts the catalogue. `ItemIndex.from_parts` merges what comes out; its
    columns are in `aif_jax/index/parts.py`. A pickled job is its path and version: every worker reads the folder.

    Attributes:
      folder: an export, a run of `fit` or a checkpoint.
      storage, batch_size: see `ItemIndex.build`.
      version: fingerprint of params, config and encoder.
      schema: Arrow schema of what comes out.

    Raises:
      FileNotFoundError: nothing in the folder. CheckpointError, ExportError: a damaged folder.
      ValueError: a model without encoder, an unknown storage, a batch size below 1.

    Example:
      >>> import tempfile, jax, pyarrow as pa, aif_jax as aif
      >>> items = {"item": [7, 8, 9], "category": ["tea", "cup", "tea"]}
      >>> data = aif.read({"user": [1, 1], "item": [7, 8], "time": [20, 30]}, items=items, columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False))
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder)
      >>> aif.checkpoint.save(folder := tempfile.mkdtemp() + "/model", trained)
      >>> rows = list(aif.engines.ItemJob(folder)([pa.RecordBatch.from_pydict(items)]))
      >>> aif.ItemIndex.from_parts(trained, rows, items=3, progress=False).ids.tolist()
      [7, 8, 9]
    """

    folder: str | Path
    storage: Storage = "float32"
    batch_size: int = BATCH
    version: str = dataclasses.field(init=False)
    schema: Any = dataclasses.field(init=False)

    def __post_init__(self):
        trained = open_model(folder := local(self.folder))
        kind = trained.need_encoder(str(folder)).vocabularies["item"].kind or "integers"
        ItemProgram(trained, storage=self.storage, batch_size=self.batch_size)  # refuses here and now
        self.__dict__.update(folder=folder, version=trained.version, schema=parts.schema(kind))

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Encode items in bounded memory, in their order, into Arrow record batches of at most `batch_size` rows.

        Args:
          batches: Arrow record batches of raw items, of any number of rows, with the columns of the items file.

        Raises:
          ValueError: what `readers.encode_items` refuses, with batch and item.
          VersionMismatch: the folder of the job has another model now.
        """
        program, made_by = _program(self), parts.RowVersion(self.version, self.storage, self.batch_size)
        encoded = rebatch(_encoded(program, batches), self.batch_size)
        for ids, stored in ahead((ids, program(features)) for _, features, ids in encoded):
            yield parts.to_batch(ids, np.asarray(stored.words)[: len(ids)], made_by)


@functools.lru_cache(maxsize=4)
def _program(job: ItemJob) -> ItemProgram:
    """Return the compiled function of equal jobs: one in a process, however many tasks it runs."""
    trained = open_model(job.folder)
    if trained.version != job.version:
        raise VersionMismatch(f"job, model in {job.folder}", expected=job.version, got=trained.version)
    return ItemProgram(trained, storage=job.storage, batch_size=job.batch_size)


def _encoded(program: ItemProgram, batches: Iterable[Any]) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Yield keys, features and raw ids of each batch; an error names the batch and its first bad item."""
    encoder = program.trained.need_encoder("ItemJob")
    for number, batch in enumerate(batches):
        problems, name = Problems(), encoder.columns.item_id
        try:
            ids, features = encode_items(batch, encoder, problems=problems)
            keys, features = checked(program, ids, features, kind=encoder.vocabularies["item"].kind)
        except (TypeError, ValueError) as error:
            row = next((problem.row for problem in problems.listed() if problem.row), 0)
            item = f" ({name} {batch.column(name)[row - 1].as_py()!r})" if row else ""  # an engine's rows are nobody's
            raise ValueError(f"batch {number}{item}: {error}") from error
        yield keys, features, ids


def encode_with_ray(dataset: Any, job: ItemJob, *, actors: int = 1, **options: Any) -> Any:
    """Encode a `ray.data.Dataset` of raw items; needs the extra `ray`.

    Args:
      dataset: rows with the columns of the items file.
      actors: processes, each with the model and its compiled program.
      options: keyword arguments of `Dataset.map_batches`, such as `num_cpus`; `batch_size` is 16 times the job's by default.

    Returns:
      A lazy `Dataset` of encoded rows, see `ItemJob.schema`; in the order of the items where `DataContext` preserves order.
      Running it fails with what `ItemJob` raises.
    """
    with needs_extra("Ray Data needs Ray", "ray"):
        from ray.data import ActorPoolStrategy  # pyright: ignore[reportMissingImports]  the extra is not installed here

    options = {"batch_size": 16 * job.batch_size, "compute": ActorPoolStrategy(size=actors)} | options
    return dataset.map_batches(RayActor, fn_constructor_args=(job,), batch_format="pyarrow", **options)


class RayActor:
    """What an actor of `encode_with_ray` runs: a table of raw items in, encoded rows out."""

    def __init__(self, job: ItemJob):
        self.job = job

    def __call__(self, table: Any) -> Any:
        return pyarrow().Table.from_batches(self.job(table.to_batches()), schema=self.job.schema)


def encode_with_spark(frame: Any, job: ItemJob) -> Any:
    """Encode a `pyspark.sql.DataFrame` of raw items by `mapInArrow`, a partition a task; needs the extra `spark`, and Java.

    Returns:
      A lazy `DataFrame` of encoded rows, see `ItemJob.schema`. Running it fails with what `ItemJob` raises.
    """
    with needs_extra("Spark needs PySpark", "spark"):
        from pyspark.sql.pandas.types import from_arrow_schema  # pyright: ignore[reportMissingImports]

    return frame.mapInArrow(job, from_arrow_schema(job.schema))
