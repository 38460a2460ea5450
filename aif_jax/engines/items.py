"""Raw items in, rows of an `ItemIndex` out: a function of Arrow record batches that runs wherever its pickle is sent."""

from __future__ import annotations

import bisect
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.encoding.vocabulary import Kind
from aif_jax.export.contents import open as open_model
from aif_jax.features import empty_items
from aif_jax.index import parts
from aif_jax.index.build import BATCH, IN_FLIGHT, checked, rebatch
from aif_jax.index.store import ItemProgram
from aif_jax.model import build
from aif_jax.store.codec import Packed, Storage
from aif_jax.store.folders import local
from aif_jax.store.trained import Trained

ROWS = 1 << 14  # of an Arrow batch, taken at once: an engine may hand over a million rows in one


class ItemJob:
    """Encodes a catalogue wherever it is called: `job(batches)` gives Arrow batches of stored rows for batches of raw items.

    The item function runs on batches of one size, filled up with zeros, so one compiled program serves and rows are those of
    `ItemIndex.build` bit for bit, however the engine cuts the catalogue. `ItemIndex.from_parts` merges what comes out; its
    columns are in `aif_jax/index/parts.py`. A job can be pickled: one of a folder travels as its path and version, another
    with its parameters.

    Args:
      model: a `Trained`, or the folder of an export, a run of `fit` or a checkpoint, which every worker must be able to read.
      storage, batch_size: see `ItemIndex.build`.

    Attributes:
      version: fingerprint of params, config and encoder.
      kind: kind of the raw ids.

    Raises:
      FileNotFoundError: nothing in the folder. CheckpointError, ExportError: a damaged folder.
      ValueError: a model without encoder, an unknown storage, a batch size below 1.

    Example:
      >>> import jax, pyarrow as pa, aif_jax as aif
      >>> items = {"item": [7, 8, 9], "category": ["tea", "cup", "tea"]}
      >>> data = aif.read({"user": [1, 1], "item": [7, 8], "time": [20, 30]}, items=items, columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False))
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder)
      >>> job = aif.engines.ItemJob(trained)
      >>> rows = list(job([pa.RecordBatch.from_pydict(items)]))
      >>> rows[0].schema.names
      ['id', 'row', 'version', 'storage', 'batch_size']
      >>> aif.ItemIndex.from_parts(trained, rows, items=3, progress=False).ids.tolist()
      [7, 8, 9]
    """

    def __init__(self, model: Trained | str | Path, *, storage: Storage = "float32", batch_size: int = BATCH):
        self._folder = None if isinstance(model, Trained) else local(model)
        self._trained = model if isinstance(model, Trained) else open_model(model)
        encoder = self._trained.need_encoder("job" if self._folder is None else str(self._folder))
        self.version, self.batch_size = self._trained.version, batch_size
        self.storage: Storage = storage
        self.kind: Kind = encoder.vocabularies["item"].kind or "integers"
        _program(self)  # refuses what does not fit, here and now

    def __repr__(self) -> str:
        return f"ItemJob(version={self.version[:12]}..., storage={self.storage!r}, batch_size={self.batch_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ItemJob) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[object, ...]:
        return self.version, self._folder, self.storage, self.batch_size

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_trained": None}
        if self._folder is not None:
            return state
        trained = self._open()
        expected = "a model that `build` makes of its config; a job of an assembled one is made on the worker"
        expect(not trained.config.assembled, "job, to be pickled", expected, repr(trained.model))
        return state | {"_trained": (trained.config, jax.tree.map(np.asarray, trained.params), trained.encoder)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_trained"] is not None:
            config, params, encoder = state["_trained"]
            self._trained = Trained(build(config), params, encoder).with_version(self.version)

    def _open(self) -> Trained:
        """The model; a worker reads it from the folder."""
        if self._trained is None:
            assert self._folder is not None
            trained = open_model(self._folder)
            if trained.version != self.version:
                raise VersionMismatch(f"job, model in {self._folder}", expected=self.version, got=trained.version)
            self._trained = trained
        return self._trained

    @property
    def schema(self) -> Any:
        """Arrow schema of what comes out."""
        return parts.schema(self.kind)

    def compile(self) -> None:
        """Reads the model and compiles its item function, so that the first batch need not wait."""
        program = _program(self)
        jax.block_until_ready(program(empty_items(program.trained.config.schema, 1)))

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Encodes items in bounded memory.

        Args:
          batches: Arrow record batches of raw items, of any number of rows, with the columns of the items file.

        Yields:
          Arrow record batches of at most `batch_size` rows in the order of the items, see `schema`.

        Raises:
          TypeError, ValueError: what `Encoder.items` refuses, with batch, row and id.
          VersionMismatch: the folder of the job has another model now.
        """
        program = _program(self)
        stamp = parts.RowVersion(self.version, self.storage, self.batch_size)
        running: deque[tuple[np.ndarray, Packed]] = deque()

        def done() -> Any:
            ids, stored = running.popleft()
            return parts.to_batch(ids, np.asarray(stored.words)[: len(ids)], stamp)

        for _, features, ids in rebatch(_encoded(program, batches), self.batch_size):
            running.append((ids, program(features)))
            if len(running) > IN_FLIGHT:
                yield done()
        while running:
            yield done()


@functools.lru_cache(maxsize=4)
def _program(job: ItemJob) -> ItemProgram:
    """The compiled function of equal jobs: one in a process, however many tasks it runs."""
    return ItemProgram(job._open(), storage=job.storage, batch_size=job.batch_size, mesh=None)


def _encoded(program: ItemProgram, batches: Iterable[Any]) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Keys, features and raw ids of some rows at a time."""
    encoder, kind = program.trained.need_encoder("ItemJob"), None

    def encode(batch: Any) -> tuple[Any, Any, np.ndarray]:
        ids, features = encoder.items(batch)
        return *checked(program, ids, features, kind=kind), ids

    for number, batch in enumerate(batches):
        for start in range(0, batch.num_rows, ROWS):
            some = batch.slice(start, ROWS)
            try:
                keys, features, ids = encode(some)
            except (TypeError, ValueError) as error:
                _refuse(some, encode, error, f"batch {number}", start, encoder.columns.item_id)
            kind = kind or keys.kind
            yield keys, features, ids


def _refuse(batch: Any, check: Callable[[Any], object], error: Exception, where: str, start: int, id_column: str) -> NoReturn:
    """Raises the error that `check` raised of some rows, with the batch and the first row that it refuses.

    Halves the rows, so it takes a few more calls; an error of no row, such as a missing column, names the batch alone.
    """
    if not _error(check, batch.slice(0, 0)):
        # rows that pass: one less than the fewest that do not
        good = bisect.bisect_left(range(1, batch.num_rows), True, key=lambda rows: bool(_error(check, batch.slice(0, rows))))
        name = repr(batch.column(id_column)[good].as_py()) if id_column in batch.schema.names else "unknown"
        where, error = f"{where}, row {start + good} ({id_column} {name})", _error(check, batch.slice(good, 1)) or error
    raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}") from error


def _error(check: Callable[[Any], object], batch: Any) -> Exception | None:
    try:
        check(batch)
    except (TypeError, ValueError) as error:
        return error
    return None
