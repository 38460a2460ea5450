"""The jobs: raw items in and rows of an `ItemIndex` out, or users' whole histories in and rows of a `UserTable` out."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import jax
import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.raw import column_of, plain
from aif_jax.encoding.vocabulary import Kind, as_ids, id_array
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
from aif_jax.trees import take
from aif_jax.types import Events
from aif_jax.user_table.rows import NONE, UserProgram
from aif_jax.user_table.table import BATCH as USER_BATCH


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
EVENTS = 1 << 17  # of users whose rows are computed together, but for a user with more


class Job:
    """What the two jobs share: a model by value or by its folder, and how its rows are stored."""

    rows_of: ClassVar[str]
    """The vocabulary of the raw ids: "item" or "user"."""

    def __init__(self, trained: Trained | Source, *, storage: Storage = "float32", batch_size: int = BATCH):
        self._source = trained if isinstance(trained, Source) else Source(trained)
        self.version, self.batch_size = self._source.version, batch_size
        self.storage: Storage = storage
        self.kind: Kind = self._source.encoder.vocabularies[self.rows_of].kind or "integers"
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
        return _program(self.rows_of, self._source, self.storage, self.batch_size)


@functools.lru_cache(maxsize=4)
def _program(rows_of: str, source: Source, storage: Storage, batch_size: int) -> Any:
    trained = source.open()
    if rows_of == "item":
        return ItemProgram(trained, storage=storage, batch_size=batch_size, mesh=None)
    return UserProgram(trained.model, trained.params, storage=storage, batch_size=batch_size)


class ItemJob(Job):
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

    rows_of = "item"

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


class UserJob(Job):
    """Makes rows of users wherever it is called: `job(batches)` gives Arrow batches of rows for batches of raw events.

    Events come ordered by user, ascending, each user's in any order: then a user is complete when the next one begins, and
    memory is bounded by the longest history. Rows are those of `UserTable.build` of the same events as a `Dataset`, bit for
    bit, however the engine cuts the users; `UserTable.from_parts` merges them. A job can be pickled, as an `ItemJob`.

    Args:
      trained, storage, batch_size: see `UserTable`.
      position, partition: in the stream, of the last event of the log, as for `UserTable.build`.

    Attributes:
      version: fingerprint of params, config and encoder.
      kind: kind of the raw user ids.
      column: that holds them in events.

    Raises:
      ValueError: as `UserTable`.

    Example:
      >>> import jax, pyarrow as pa, aif_jax as aif
      >>> events = {"user": ["ann", "ann", "bob"], "item": [7, 8, 7], "time": [20, 30, 25]}
      >>> data = aif.read(events, items={"item": [7, 8], "category": [1, 2]}, columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, short_length=4))
      >>> trained = aif.Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder)
      >>> job = aif.jobs.UserJob(trained)
      >>> rows = list(job([pa.RecordBatch.from_pydict(events)]))
      >>> table = aif.UserTable.from_parts(trained, rows, users=2)
      >>> int(table.memory("ann").count)
      2
    """

    rows_of = "user"

    def __init__(
        self, trained: Trained | Source,
        *, storage: Storage = "float32", batch_size: int = USER_BATCH, position: int | None = None, partition: int = 0,
    ):  # fmt: skip
        super().__init__(trained, storage=storage, batch_size=batch_size)
        self.position, self.partition = NONE if position is None else position, partition
        self.column = self._source.encoder.columns.user

    @property
    def schema(self) -> Any:
        """Arrow schema of what comes out."""
        arrow = pyarrow()
        return parts.schema(self.kind, {"position": arrow.int64(), "partition": arrow.int32()})

    def __call__(self, batches: Iterable[Any], *, first: int = 0) -> Iterator[Any]:
        """Makes the rows of users from their whole histories.

        Args:
          batches: Arrow record batches of raw events, of any number of rows, ordered by user.
          first: number of the first of them, for messages.

        Yields:
          Arrow record batches in the order of the users, see `schema`.

        Raises:
          TypeError, ValueError: what `Encoder.events` refuses, or a user below the one before, with batch, row and user.
          VersionMismatch: the folder of the job has another model now.
        """
        program, encoder = self._program(), self._source.encoder
        stamp, arrow = parts.RowVersion(self.version, self.storage, self.batch_size), pyarrow()
        for given in _complete(batches, self.column, first=first, users=self.batch_size):
            table = arrow.Table.from_batches([one.batch for one in given]).combine_chunks()
            check = functools.partial(_grouped, encoder)
            try:
                users, events, counts = check(table)
            except (TypeError, ValueError) as error:
                refuse(given, check, error, id_column=self.column)
            empty = np.zeros((len(users), len(program.empty)), np.uint32)
            words = program(empty, events, counts, lanes=self.batch_size).words
            place = {
                "position": arrow.array(np.full(len(users), self.position, np.int64)),
                "partition": arrow.array(np.full(len(users), self.partition, np.int32)),
            }
            yield parts.to_batch(users, words, stamp, place)


def _complete(batches: Iterable[Any], column: str, *, first: int, users: int) -> Iterator[list[Numbered]]:
    """Slices of batches with all events of some users, about so many of them; refuses users that are not in order."""
    compute = pyarrow("pyarrow.compute")
    waiting: list[Numbered] = []
    begun, last, schema = 0, None, None
    for number, base, batch in _slices(batches, first):
        schema = schema or batch.schema
        expected = f"the columns of the batches before, {_named(schema)}"
        expect(batch.schema == schema, f"batch {number}", expected, _named(batch.schema))
        expect(column in batch.schema.names, f"batch {number}", f"a column {column!r}", batch.schema.names)
        ids = batch.column(column)
        expect(not ids.null_count, f"batch {number}, column {column!r}", "a user for each event", "none for some")
        falls = np.flatnonzero(plain(compute.less(ids[1:], ids[:-1])))
        if last is not None and ids[0].as_py() < last:
            falls = np.append(-1, falls)
        if len(falls):
            row = int(falls[0]) + 1
            before = last if row == 0 else ids[row - 1].as_py()
            where, got = f"batch {number}, row {base + row}", f"{ids[row].as_py()!r} after {before!r}"
            raise ValueError(f"{where}: expected users in ascending order, got {got}")
        starts = np.flatnonzero(plain(compute.not_equal(ids[1:], ids[:-1]))) + 1
        starts = starts if last is None or ids[0].as_py() == last else np.append(0, starts)
        begun, last = begun + len(starts), ids[-1].as_py()
        cut = int(starts[-1]) if len(starts) else 0  # where the last user begins, who may go on in the next batch
        if cut or (len(starts) and waiting):
            waiting += [Numbered(number, base, batch.slice(0, cut))] if cut else []
            if begun >= users or sum(one.batch.num_rows for one in waiting) >= EVENTS:
                yield waiting
                waiting, begun = [], 0
        waiting.append(Numbered(number, base + cut, batch.slice(cut)))
    if waiting:
        yield waiting


def _slices(batches: Iterable[Any], first: int) -> Iterator[Numbered]:
    for number, batch in enumerate(batches, first):
        for start in range(0, batch.num_rows, ROWS):
            yield Numbered(number, start, batch.slice(start, ROWS))


def _named(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _grouped(encoder: Encoder, table: Any) -> tuple[np.ndarray, Events, np.ndarray]:
    """Users [n] of a table that is ordered by user, their events one user after the other, and how many each has."""
    events, order = encoder.events(table)
    users = id_array(as_ids(plain(column_of(table, encoder.columns.user)), encoder.columns.user))
    change = np.append(True, users[1:] != users[:-1])[: len(users)]
    owner = (np.cumsum(change) - 1)[order]
    at = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=int(change.sum()))
    return users[change], take(events, at), counts
