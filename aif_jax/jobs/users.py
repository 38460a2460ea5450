"""The user job: users' whole histories in, the rows of a `UserTable` out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.raw import column_of, plain
from aif_jax.encoding.vocabulary import Kind, as_ids, string_array
from aif_jax.index import parts
from aif_jax.jobs.problems import Numbered, refuse
from aif_jax.jobs.source import Source
from aif_jax.readers.sources import pyarrow
from aif_jax.store.codec import Storage
from aif_jax.store.trained import Trained
from aif_jax.types import Events
from aif_jax.user_table.program import UserProgram
from aif_jax.user_table.rows import NONE
from aif_jax.user_table.table import BATCH

ROWS = 1 << 14  # of an Arrow batch, taken at once: an engine may hand over a million users in one
EVENTS = 1 << 17  # of users whose rows are computed together, but for a user with more


class UserJob:
    """Makes rows of users wherever it is called: `job(batches)` gives Arrow batches of rows for batches of raw events.

    Events come ordered by user, ascending, each user's in any order: then a user is complete when the next one begins, and
    memory is bounded by the longest history. Rows are those of `UserTable.build` of the same events as a `Dataset`, bit for
    bit, however the engine cuts the users; `UserTable.from_parts` merges them. A job can be pickled, as an `ItemJob`.

    Args:
      trained, storage, batch_size: as for `UserTable`.
      position, partition: in the stream, of the last event of the log, as for `UserTable.build`.

    Attributes:
      version: fingerprint of params, config and encoder.
      kind: of the raw user ids.
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

    def __init__(
        self,
        trained: Trained,
        *,
        storage: Storage = "float32",
        batch_size: int = BATCH,
        position: int | None = None,
        partition: int = 0,
    ):
        self._set(Source(trained), storage, batch_size, position, partition)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        storage: Storage = "float32",
        batch_size: int = BATCH,
        position: int | None = None,
        partition: int = 0,
    ) -> UserJob:
        """The job of the model in a folder, as `ItemJob.load`."""
        job = object.__new__(cls)
        job._set(Source.of_folder(folder), storage, batch_size, position, partition)
        return job

    def _set(self, model: Source, storage: Storage, batch_size: int, position: int | None, partition: int) -> None:
        self.version = model.version
        self.storage: Storage = storage
        self.batch_size = batch_size
        self.position, self.partition = NONE if position is None else position, partition
        encoder = model.encoder
        self.kind: Kind = encoder.vocabularies["user"].kind or "integers"
        self.column = encoder.columns.user
        self._source = model
        _program(model, storage, batch_size)

    def __repr__(self) -> str:
        return f"UserJob(version={self.version[:12]}..., storage={self.storage!r}, batch_size={self.batch_size})"

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
        program, encoder = _program(self._source, self.storage, self.batch_size), self._source.encoder
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
        expect(
            batch.schema == schema,
            f"batch {number}",
            f"the columns of the batches before, {_named(schema)}",
            _named(batch.schema),
        )
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
    ids = as_ids(plain(column_of(table, encoder.columns.user)), encoder.columns.user)
    users = ids if isinstance(ids, np.ndarray) else string_array(ids)
    change = np.append(True, users[1:] != users[:-1])[: len(users)]
    owner = (np.cumsum(change) - 1)[order]
    at = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=int(change.sum()))
    return users[change], jax.tree.map(lambda leaf: leaf[at], events), counts


@functools.lru_cache(maxsize=2)
def _program(model: Source, storage: Storage, batch_size: int) -> UserProgram:
    """The compiled update function of a version: one in a process, however many tasks it runs."""
    trained = model.open()
    return UserProgram(trained.model, trained.params, storage=storage, batch_size=batch_size)
