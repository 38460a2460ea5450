"""The catalogue job: raw items in, the rows of an `ItemIndex` out."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.encoding.vocabulary import Kind
from aif_jax.features import empty_items
from aif_jax.index import parts
from aif_jax.index.build import BATCH, IN_FLIGHT, checked, rebatch
from aif_jax.index.store import ItemProgram
from aif_jax.jobs.problems import Numbered, refuse
from aif_jax.jobs.source import Source
from aif_jax.readers.sources import pyarrow
from aif_jax.store.codec import Packed, Storage
from aif_jax.store.trained import Trained
from aif_jax.store.version import VersionMismatch

ROWS = 1 << 14  # of an Arrow batch, encoded at once
FILE_RUNS = 16  # of the item function for what is read of a file at once


class ItemJob:
    """Encodes a catalogue wherever it is called: `job(batches)` gives Arrow batches of stored rows for batches of raw items.

    The item function runs on batches of one size, filled up with zeros, so one compiled program serves and rows are those of
    `ItemIndex.build` bit for bit, however the engine cuts the catalogue. `ItemIndex.from_parts` merges what comes out; its
    columns are in `aif_jax/index/parts.py`. A job can be pickled: one of `load` travels as a path, another with its parameters.

    Args:
      trained, storage, batch_size: as for `ItemIndex.build`.

    Attributes:
      version: fingerprint of params, config and encoder.
      kind: of the raw ids.

    Raises:
      ValueError: a model without encoder, an unknown storage, a batch size below 1.

    Example:
      >>> import jax, pyarrow as pa, aif_jax as aif
      >>> items = {"item": [7, 8, 9], "category": ["tea", "cup", "tea"]}
      >>> data = aif.read({"user": [1, 1], "item": [7, 8], "time": [20, 30]}, items=items, columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False))
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder)
      >>> job = aif.jobs.ItemJob(trained)
      >>> rows = list(job([pa.RecordBatch.from_pydict(items)]))
      >>> rows[0].schema.names
      ['id', 'row', 'version', 'storage', 'batch_size']
      >>> aif.ItemIndex.from_parts(trained, rows, items=3, progress=False).ids.tolist()
      [7, 8, 9]
    """

    def __init__(self, trained: Trained, *, storage: Storage = "float32", batch_size: int = BATCH):
        self._set(Source(trained), storage, batch_size)

    @classmethod
    def load(cls, folder: str | Path, *, storage: Storage = "float32", batch_size: int = BATCH) -> ItemJob:
        """The job of the model in a folder: an export, a run of `fit` or a checkpoint, which every worker must be able to read.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError, ExportError: a damaged folder.
          ValueError: a model without encoder, or as the class.
        """
        job = object.__new__(cls)
        job._set(Source.of_folder(folder), storage, batch_size)
        return job

    def _set(self, model: Source, storage: Storage, batch_size: int) -> None:
        self.version = model.version
        self.storage: Storage = storage
        self.batch_size = batch_size
        self.kind: Kind = model.encoder.vocabularies["item"].kind or "integers"
        self._source = model
        _program(model, storage, batch_size)  # refuses what does not fit, here and now

    def __repr__(self) -> str:
        return f"ItemJob(version={self.version[:12]}..., storage={self.storage!r}, batch_size={self.batch_size})"

    @property
    def schema(self) -> Any:
        """Arrow schema of what comes out."""
        return parts.schema(self.kind)

    def compile(self) -> None:
        """Reads the model and compiles its item function, so that the first batch need not wait."""
        program = _program(self._source, self.storage, self.batch_size)
        jax.block_until_ready(program(empty_items(program.trained.config.schema, 1)))

    def __call__(self, batches: Iterable[Any], *, first: int = 0) -> Iterator[Any]:
        """Encodes items in bounded memory.

        Args:
          batches: Arrow record batches of raw items, of any number of rows, with the columns of the items file.
          first: number of the first of them, for messages.

        Yields:
          Arrow record batches of at most `batch_size` rows in the order of the items, see `schema`.

        Raises:
          TypeError, ValueError: what `Encoder.items` refuses, with batch, row and id.
          VersionMismatch: the folder of the job has another model now.
        """
        program = _program(self._source, self.storage, self.batch_size)
        stamp = parts.RowVersion(self.version, self.storage, self.batch_size)
        running: deque[tuple[np.ndarray, Packed]] = deque()

        def done() -> Any:
            ids, stored = running.popleft()
            return parts.to_batch(ids, np.asarray(stored.words)[: len(ids)], stamp)

        for _, features, ids in rebatch(_encoded(program, batches, first), self.batch_size):
            running.append((ids, program(features)))
            if len(running) > IN_FLIGHT:
                yield done()
        while running:
            yield done()

    def encode_file(self, source: str | Path, target: str | Path) -> int:
        """Encodes a Parquet file of raw items into one of encoded rows: for an engine that deals out files and moves no rows.

        Args:
          source: with the columns of the items file; others are not read.
          target: is there when it is complete, and replaces what was there; named `*.parquet` for `ItemIndex.from_parts`.

        Returns:
          How many items.

        Raises:
          FileNotFoundError: no such source, or no folder for the target.
          ValueError: a source that is no Parquet file; with TypeError what a call raises, with the file.
        """
        arrow, parquet = pyarrow(), pyarrow("pyarrow.parquet")
        columns = [*self._source.encoder.columns.of("items")]
        try:
            with parquet.ParquetFile(source) as opened:
                batches = opened.iter_batches(FILE_RUNS * self.batch_size, columns=columns)
                return parts.write(Path(target), self(batches), self.schema)
        except (TypeError, ValueError, OSError, arrow.ArrowException) as error:
            of_disk = getattr(error, "errno", None) is not None  # no such file, a full disk
            if of_disk or isinstance(error, VersionMismatch):
                raise
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{source}: {error}") from error


def _encoded(program: ItemProgram, batches: Iterable[Any], first: int) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Keys, features and raw ids of some rows at a time."""
    encoder, kind = program.trained.need_encoder("ItemJob"), None

    def encode(batch: Any) -> tuple[Any, Any, np.ndarray]:
        ids, features = encoder.items(batch)
        return *checked(program, ids, features, kind=kind), ids

    for number, batch in enumerate(batches, first):
        for start in range(0, batch.num_rows, ROWS):
            some = batch.slice(start, ROWS)
            try:
                keys, features, ids = encode(some)
            except (TypeError, ValueError) as error:
                refuse([Numbered(number, start, some)], encode, error, id_column=encoder.columns.item_id)
            kind = kind or keys.kind
            yield keys, features, ids


@functools.lru_cache(maxsize=2)
def _program(model: Source, storage: Storage, batch_size: int) -> ItemProgram:
    """The compiled item function of a version: one in a process, however many tasks it runs."""
    return ItemProgram(model.open(), storage=storage, batch_size=batch_size, mesh=None)
