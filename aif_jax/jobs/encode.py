"""The catalogue job: raw items in and rows of an `ItemIndex` out."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import jax
import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.vocabulary import Kind
from aif_jax.export.contents import open as open_model
from aif_jax.features import empty_items
from aif_jax.index import parts
from aif_jax.index.build import BATCH, IN_FLIGHT, checked, rebatch
from aif_jax.index.store import ItemProgram
from aif_jax.model import build
from aif_jax.readers.sources import pyarrow
from aif_jax.store.codec import Packed, Storage
from aif_jax.store.folders import local
from aif_jax.store.trained import Trained


class Source:
    """Gives a `Trained`; two of one version are equal, so that a process that runs many tasks keeps one compiled program.

    The machine that plans a job has it, and those that run it. Pickled, it is the path of its folder, or its config and
    parameters as NumPy arrays; the version goes with it, and a worker that finds another one in the folder raises
    `VersionMismatch`.
    """

    def __init__(self, trained: Trained, folder: Path | None = None):
        trained.need_encoder("job" if folder is None else str(folder))
        self.version = trained.version
        self.folder = folder
        self._trained: Trained | None = trained

    @property
    def encoder(self) -> Encoder:
        """The encoder of the model."""
        return self.open().need_encoder("job")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and (self.version, self.folder) == (other.version, other.folder)

    def __hash__(self) -> int:
        return hash((self.version, self.folder))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"version": self.version, "folder": self.folder}
        if self.folder is not None:
            return state
        trained = self.open()
        expected = "a model that `build` makes of its config; a job of an assembled one is made on the worker"
        expect(not trained.config.assembled, "job, to be pickled", expected, repr(trained.model))
        params = jax.tree.map(np.asarray, trained.params)
        return state | {"config": trained.config, "params": params, "encoder": trained.encoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.version, self.folder, self._trained = state["version"], state["folder"], None
        if self.folder is None:
            trained = Trained(build(state["config"]), state["params"], state["encoder"])
            self._trained = trained.with_version(self.version)

    def open(self) -> Trained:
        """The model; a worker reads it from the folder."""
        if self._trained is None and self.folder is not None:
            trained = open_model(self.folder)
            if trained.version != self.version:
                raise VersionMismatch(f"job, model in {self.folder}", expected=self.version, got=trained.version)
            self._trained = trained
        assert self._trained is not None
        return self._trained


class Numbered(NamedTuple):
    """Some rows of a batch."""

    number: int  # of the batch in its iterator, from 0
    first: int  # the row of the batch that is the first here
    batch: Any  # Arrow record batch


def refuse(given: Sequence[Numbered], check: Callable[[Any], object], error: Exception, *, id_column: str) -> NoReturn:
    """Raises the error that `check` raised of some rows, with the batch and the first row that it refuses.

    Halves the rows, so it takes a few more calls; an error of no row, such as a missing column, names the batch alone.
    """
    arrow = pyarrow()
    table = arrow.Table.from_batches([one.batch for one in given]).combine_chunks()
    begin, end = given[0].number, given[-1].number
    where = f"batch {begin}" if begin == end else f"batches {begin} to {end}"
    if not _error(check, table.slice(0, 0)) and _error(check, table):
        # rows that pass: one less than the fewest that do not
        good = bisect.bisect_left(range(1, table.num_rows), True, key=lambda rows: bool(_error(check, table.slice(0, rows))))
        places = ((one.number, one.first + row) for one in given for row in range(one.batch.num_rows))
        number, row = next(itertools.islice(places, good, None))
        name = repr(table.column(id_column)[good].as_py()) if id_column in table.schema.names else "unknown"
        where, error = f"batch {number}, row {row} ({id_column} {name})", _error(check, table.slice(good, 1)) or error
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f"{where}: {error}") from error


def _error(check: Callable[[Any], object], table: Any) -> Exception | None:
    try:
        check(table)
    except (TypeError, ValueError) as error:
        return error
    return None


ROWS = 1 << 14  # of an Arrow batch, taken at once: an engine may hand over a million rows in one
FILE_RUNS = 16  # of the item function for what is read of a file at once


@functools.lru_cache(maxsize=4)
def _program(source: Source, storage: Storage, batch_size: int) -> ItemProgram:
    return ItemProgram(source.open(), storage=storage, batch_size=batch_size, mesh=None)


class ItemJob:
    """Encodes a catalogue wherever it is called: `job(batches)` gives Arrow batches of stored rows for batches of raw items.

    The item function runs on batches of one size, filled up with zeros, so one compiled program serves and rows are those of
    `ItemIndex.build` bit for bit, however the engine cuts the catalogue. `ItemIndex.from_parts` merges what comes out; its
    columns are in `aif_jax/index/parts.py`. A job can be pickled: one of `load` travels as a path, another with its parameters.

    Args:
      trained, storage, batch_size: see `ItemIndex.build`.

    Attributes:
      version: fingerprint of params, config and encoder.
      kind: kind of the raw ids.

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

    def __init__(self, trained: Trained | Source, *, storage: Storage = "float32", batch_size: int = BATCH):
        self._source = trained if isinstance(trained, Source) else Source(trained)
        self.version, self.batch_size = self._source.version, batch_size
        self.storage: Storage = storage
        self.kind: Kind = self._source.encoder.vocabularies["item"].kind or "integers"
        self._program()  # refuses what does not fit, here and now

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """The job of the model in a folder: an export, a run of `fit` or a checkpoint, which every worker must be able to read.

        Args:
          folder: folder of the model.
          options: see the class.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError, ExportError: a damaged folder.
          ValueError: a model without encoder, or as the class.
        """
        path = local(folder)
        return cls(Source(open_model(path), path), **options)

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(version={self.version[:12]}..., storage={self.storage!r}, batch_size={self.batch_size})"

    def _program(self) -> Any:
        """The compiled function of a version: one in a process, however many tasks it runs."""
        return _program(self._source, self.storage, self.batch_size)

    @property
    def schema(self) -> Any:
        """Arrow schema of what comes out."""
        return parts.schema(self.kind)

    def compile(self) -> None:
        """Reads the model and compiles its item function, so that the first batch need not wait."""
        program = self._program()
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
        program = self._program()
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

    for some in _slices(batches, first):
        try:
            keys, features, ids = encode(some.batch)
        except (TypeError, ValueError) as error:
            refuse([some], encode, error, id_column=encoder.columns.item_id)
        kind = kind or keys.kind
        yield keys, features, ids


def _slices(batches: Iterable[Any], first: int) -> Iterator[Numbered]:
    for number, batch in enumerate(batches, first):
        for start in range(0, batch.num_rows, ROWS):
            yield Numbered(number, start, batch.slice(start, ROWS))
