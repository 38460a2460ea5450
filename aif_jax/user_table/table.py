"""`UserTable`: what is kept of every user's whole history, for one model version; the nearline half of the user side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.checks import check_encoding, expect
from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.raw import column_of, plain
from aif_jax.encoding.times import STAMP_ZERO, seconds_of, stamps, whole_seconds
from aif_jax.encoding.vocabulary import Vocabulary, as_ids
from aif_jax.features import SINCE, no_events
from aif_jax.index.parts import Part, Parts, column, rows_of, stored_by
from aif_jax.output import Bar, track
from aif_jax.store import snapshots
from aif_jax.store.codec import Layout, Packed, Storage
from aif_jax.store.folders import CheckpointError
from aif_jax.store.snapshots import SnapshotWriter, partition_of
from aif_jax.store.trained import Trained
from aif_jax.trees import take
from aif_jax.types import Events, Streamed, UserFeatures, UserMemory
from aif_jax.user_table.rows import NONE, MemoryRows, Rows, Stored, UserId, UserProgram, positions_of, ranges


class ClockError(RuntimeError):
    """Events are later than this machine's clock, and nothing but that clock says that they are wrong."""


class Written(NamedTuple):
    """When the messages of n events were written to the stream.

    Attributes:
      seconds: float64 [n] since 1970; NaN where the stream does not tell.
      by_broker: bool [n] whether by the clock of the broker; else of the producer.
    """

    seconds: np.ndarray
    by_broker: np.ndarray


def check_future(stamped: np.ndarray, written: Written | None, *, clock: Callable[[], float], skew: int) -> None:
    """Raises for events of the future: all that come after one would be late.

    An event that is later than its own message is wrong wherever and whenever it is read. One that is later than this machine's
    clock is wrong or the clock is; where the broker's clock has confirmed it, this machine's does not count.

    Args:
      written: when their messages were written; None where that is not known.

    Raises:
      ValueError: an event later than its message. ClockError: one later than `clock`, without a broker's time.
    """
    seconds = stamped.astype(np.int64) + STAMP_ZERO
    doubtful = np.ones(len(seconds), bool)
    if written is not None:
        early = seconds > written.seconds + skew  # never where the stream does not tell
        if early.any():
            at = int(np.argmax(early))
            moment = f"that of their message, {written.seconds[at]:.0f}"
            expect(False, "events", f"times up to {moment}, {skew} s of skew allowed", int(seconds[at]))
        doubtful = ~(written.by_broker & np.isfinite(written.seconds))
    now, last = int(clock()), int(seconds[doubtful].max(initial=0))
    if last > now + skew:
        raise ClockError(
            f"events: expected times up to this machine's clock, {now}, {skew} s of skew allowed, got {last}, {last - now} s"
            f" later; set the clock right, or let the stream carry the broker's time (Kafka:"
            f" message.timestamp.type=LogAppendTime), or give clock=None for a stream that is not of today"
        )


CHUNK = 1 << 13  # rows that are copied at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(snapshots.Manifest):
    """The manifest of a user table on disk, without its arrays.

    Attributes:
      users: rows.
      layout: layout of a row, see `describe`.
    """

    NOUN = "user table"
    FORMAT = "aif_jax.user_table/2"
    REBUILD = "build the table again from the log: UserTable.build or aif-jax users build"

    users: int
    layout: list[list[Any]]

    def fits(self, arrays: Mapping[str, Any]) -> bool:
        """As `snapshots.Manifest.fits`."""
        rows = [leaf["shape"] for name, leaf in arrays.items() if name.startswith("rows/")]
        good = type(self.users) is int and all(shape[:1] == [self.users] for shape in rows) and self.batch_size <= 1 << 20
        return good and self.fits_memory(self.users)


inspect = Manifest.inspect


def write_rows(path: str | Path, rows: MemoryRows, plain: dict[str, Any], config: Config, positions: Any) -> None:
    """Writes rows, ordered by user, and the record into a new folder, see `UserTable.save`."""
    users = Vocabulary(list(rows.of))
    trees = {"users": users.to_arrays(), "rows": rows.get(users.raw.tolist())._asdict()}
    Manifest.write(path, trees, plain | {"users": len(rows)}, config, positions)


def read_rows(path: str | Path, manifest: Manifest, *, width: int) -> MemoryRows:
    """The rows of a snapshot. Raises CheckpointError for arrays that are torn, altered, or do not fit together."""
    trees = Manifest.read(path)
    try:
        users = Vocabulary.from_arrays(trees["users"]).raw.tolist() if manifest.users else []
        stored = Stored(**trees["rows"])
        shapes = [leaf.shape for leaf in stored]
        good = len(users) == manifest.users and shapes == [(manifest.users, width), (manifest.users,), (manifest.users,)]
        expect(good, "arrays", f"rows [{manifest.users}, {width}] of as many users", f"{shapes} of {len(users)}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected arrays that fit together, got others: {error}; {manifest.REBUILD}") from error
    rows = MemoryRows(width, capacity=manifest.users)
    for start in range(0, len(users), CHUNK):
        some = slice(start, start + CHUNK)
        rows.put(users[some], stored.take(some), expected=np.full(len(users[some]), NONE))
    return rows


def add_part(rows: Rows, part: Part, users: list[UserId], words: np.ndarray) -> None:
    """Puts the rows of a part, of users without one. Raises ValueError for a user that comes twice, or has a row already."""
    before, seen = rows.get(users), set()
    known = set(np.flatnonzero(before.words.any(axis=1)).tolist())
    for at, user in enumerate(users):
        if user in seen or at in known:
            which = "is in this part" if user in seen else "has a row"
            raise ValueError(f"{part.place(at)}: expected each user once, got user {user!r}, who {which} already")
        seen.add(user)
    stored = Stored(words, column(part, "position", np.int64), column(part, "partition", np.int32))
    lost = np.count_nonzero(~rows.put(users, stored, expected=before.position))
    expect(not lost, part.name, "nobody else to write rows meanwhile", f"{lost} rows of another writer")


def describe(layout: Layout) -> list[list[Any]]:
    """The columns of a row as plain JSON."""
    return [[list(column.shape), column.dtype, column.words] for column in layout.columns]


BATCH = 256
RETRIES = 8  # of rows that another writer changed in between


class UpdateCounts(NamedTuple):
    """What became of the events of an update.

    Attributes:
      events, users: events that are in the table now, and users whose rows changed.
      repeated: events that the rows held already.
      late: events older than an earlier one of their user; each is put in its place.
      beyond: late events older than every kept event: they count in sums and SIM caches alone.
    """

    events: int
    users: int
    repeated: int
    late: int
    beyond: int

    def __add__(self, other: UpdateCounts) -> UpdateCounts:  # type: ignore[override]
        """The sum of two, count by count."""
        return UpdateCounts(*(a + b for a, b in zip(self, other, strict=True)))


class UserTable:
    """A row of bounded size for every user, updated by events in constant time, whatever the length of the history.

    Rows belong to a model version, as those of an `ItemIndex` do. A user's events must come in the order of the stream and by
    one partition; each row holds its own position, so that an event that comes twice counts once, also after a kill.

    Args:
      trained: model whose `update_user` makes the rows, with the encoder for raw events.
      storage: storage of matrices: "float32", "bfloat16" or "int8" with a scale for each vector. Everything else is exact.
      rows: where rows are kept; None keeps them in this process.
      batch_size: users in one run of the update function.
      clock: seconds since 1970; events more than the encoder's `max_skew` later are refused. None takes any time, for streams
        that are not of today.

    Attributes:
      version: version of that model.
      row_bytes: bytes of one user.

    Example:
      >>> import aif_jax as aif
      >>> raw = {"user": ["ann", "bob", "ann"], "item": [7, 8, 8], "time": [1_600_000_000, 1_600_000_007, 1_600_000_009]}
      >>> data = aif.read(raw, items={"item": [7, 8], "category": [1, 2]}, columns=aif.Columns())
      >>> model = aif.build(aif.presets.two_tower(data.schema, width=4, short_length=4))
      >>> table = UserTable(aif.Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder))
      >>> table.update(raw, position=0), table.update(raw, position=0).repeated
      (UpdateCounts(events=3, users=2, repeated=0, late=0, beyond=0), 3)
      >>> int(table.memory("ann").count), len(table)
      (2, 2)
    """

    inspect = staticmethod(inspect)
    """`inspect(path)`: the manifest of a snapshot on disk."""

    def __init__(
        self,
        trained: Trained,
        *,
        storage: Storage = "float32",
        rows: Rows | None = None,
        batch_size: int = BATCH,
        clock: Callable[[], float] | None = time.time,
    ):
        self.encoder = trained.need_encoder("UserTable")
        self.trained = trained = trained.on_device()
        self.version, self._clock = trained.version, clock
        self.storage: Storage = storage
        self._program = UserProgram(trained.model, trained.params, storage=storage, batch_size=batch_size)
        self.row_bytes = self._program.empty.nbytes
        self.rows: Rows = MemoryRows(len(self._program.empty)) if rows is None else rows

    @classmethod
    def build(
        cls, trained: Trained, events: Dataset | Iterable[Any],
        *, until: Any = None, position: int | None = None, partition: int = 0, progress: bool = True, **options: Any,
    ) -> UserTable:  # fmt: skip
        """A table from a log of events, in bounded memory next to the rows.

        Args:
          events: a `Dataset` that the encoder made, or raw events by column in the order of time, such as Arrow record batches.
          until: events before this time alone: an integer in `Columns.time_unit`, an ISO date, or a `datetime`; of a `Dataset`.
          position, partition: in the stream, of the last event that the log holds: the stream goes on behind it.
          options: `storage`, `rows`, `batch_size`, `clock`, as for the class.

        Raises:
          EncodingMismatch: a data set that another encoder made.
          TypeError, ValueError: as `update`.
        """
        table = cls(trained, **options)
        if not isinstance(events, Dataset):
            expect(until is None, "until", "None for raw events", until)
            for raw in track(events, label="user table", unit="batches", show=progress):
                table._apply(raw, position, partition, again=True)
            return table
        check_encoding("events", expected=table.encoder.version, got=events.encoding)
        log = events.log
        at = None if until is None else np.full(log.users, seconds_of(until, "until", unit=table.encoder.columns.time_unit))
        ends = log.offsets[1:] if at is None else log.history_end_at(np.arange(log.users), at)
        counts = ends - log.offsets[:-1]
        counts[0] = 0  # the unknown user
        users = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        with Bar(int(counts.sum()), label="user table", unit="events", show=progress) as bar:
            for start in range(0, len(users), table._program.batch_size):
                some = users[start : start + table._program.batch_size]
                index = ranges(log.offsets[some], counts[some])
                given = Events(item=log.item[index], action=log.action[index], time=stamps(log.time[index], "events"))
                names, at = events.users.ids_of(some).tolist(), positions_of(position, len(index))
                table._run(names, given, counts[some], at, partition, again=True, lanes=table._program.batch_size)
                bar.update(len(index))
        return table

    def update(
        self, events: Any, *, position: int | np.ndarray | None = None, partition: int = 0, written: Written | None = None
    ) -> UpdateCounts:
        """Applies some events of some users, such as messages of a stream that came together: one message after the other.

        Args:
          events: raw values by column of the events file, `Columns.user` among them: a mapping, an Arrow batch or table.
          position: in the stream, one for all events or one for each [n], in rising order. Events whose user's row is there
            already, or further, are left out. None applies the events in any case.
          partition: partition of the stream; always the same for one user.
          written: when the messages of the events were written; None where the stream does not tell.

        Raises:
          TypeError, ValueError: events that do not fit the encoder, times before 1963 or after those of their messages, ids of
            both kinds, a user whose events came by another partition; nothing has changed then.
          ClockError: events later than the clock that no broker's time confirms; nothing has changed then.
          RuntimeError: another writer changes the same rows all the time.
        """
        return self._apply(events, position, partition, again=position is None, written=written)

    def memory(self, user: UserId) -> UserMemory:
        """What is kept of a user, decoded, on the host: to inspect a table."""
        return jax.tree.map(np.asarray, _unpack(self._packed(user)))

    def features(
        self, user: UserId, record: Mapping[str, Any] | None = None, *, now: Any, events: Any = None, places: int = SINCE[0]
    ) -> UserFeatures:
        """Features of ONE user for the engine and `model.user`: the row and what came since, in place of a whole history.

        Args:
          user: raw id; one without a row has an empty history.
          record: raw values by column of the users file; None for an unknown profile.
          now: time of the request, in `Columns.time_unit`, or a `datetime`.
          events: raw events by column that the table does not hold yet; those in the second of the request or later are left
            out, as `Encoder.user` does.
          places: that the features have for these; with more, the first ones are applied here, which takes longer.

        Raises what `Encoder.user` raises.
        """
        packed, since = self._packed(user), no_events(places)
        moment = whole_seconds(now, "now", unit=self.encoder.columns.time_unit)
        expect(not moment.ndim, "now", "one time", f"an array of shape {list(moment.shape)}")
        if events is not None:
            self.encoder.expect_of_user(events, user)
            new, _ = self.encoder.events(events)
            late = new.time > stamps(int(moment) + self.encoder.max_skew, "now")
            expect(not late.any(), "events", f"times up to {self.encoder.max_skew} s after the request's", "a later one")
            new = take(new, new.time < stamps(moment, "now"))
            if (more := len(new.time) - places) > 0:
                before, new = take(new, slice(0, more)), take(new, slice(more, None))
                words = self._program(np.asarray(packed.words)[None], before, np.array([more])).words[0]
                packed = Packed(words=words, layout=packed.layout)
            since = jax.tree.map(lambda empty, leaf: np.concatenate([leaf, empty[len(leaf) :]]), since, new)
        ids, floats = self.encoder.profile(record)
        history = Streamed(memory=packed, since=since, now=stamps(moment, "now")[()], version=self.version)
        return UserFeatures(ids=ids, floats=floats, history=history, encoding=self.encoder.version)

    def __contains__(self, user: UserId) -> bool:
        """Whether a user has a row."""
        return bool(self.rows.get([user]).words.any())

    def __len__(self) -> int:
        """Users with a row; of a table in this process."""
        return len(self._in_memory())

    def __repr__(self) -> str:
        count = f"{len(self.rows):,} users" if isinstance(self.rows, MemoryRows) else type(self.rows).__name__
        return f"UserTable({count}, {self.row_bytes} bytes a row, storage={self.storage!r}, version={self.version[:12]}...)"

    def copy(self) -> UserTable:
        """A table with a copy of the rows, for a snapshot while updates continue."""
        made = object.__new__(UserTable)
        made.__dict__ |= self.__dict__ | {"rows": self._in_memory().copy()}
        return made

    def save(self, path: str | Path, *, positions: Mapping[int, int] | None = None) -> None:
        """Writes the rows into a new folder, which appears complete or not at all.

        Args:
          path: a local folder that does not exist yet.
          positions: how far in the stream the table is, by partition.

        Raises:
          FileExistsError: something is there already.
          ValueError: a URL, or a table whose rows are in another store, which keeps them itself.
        """
        record = {"version": self.version, "encoding": self.encoder.version, "storage": self.storage}
        record |= {"batch_size": self._program.batch_size, "layout": describe(self._program.layout)}
        write_rows(path, self._in_memory(), record, self.trained.config, positions)

    @classmethod
    def from_parts(
        cls, trained: Trained, parts: Parts,
        *, users: int | None = None, rows: Rows | None = None, clock: Callable[[], float] | None = time.time,
    ) -> UserTable:  # fmt: skip
        """Merges rows that `jobs.UserJob` made, in bounded memory next to the rows; equals `build` of a `Dataset` bit for bit.

        Args:
          trained, rows, clock: see the class. `rows` must have none of the users yet.
          parts: as `ItemIndex.from_parts`; storage and batch size are theirs.
          users: how many there must be, so that a lost part is noticed; None takes what is there.

        Raises:
          ImportError, FileNotFoundError, CheckpointError, VersionMismatch, TypeError: as `ItemIndex.from_parts`.
          ValueError: missing columns, rows of another kind, a user that comes twice, another number of users.
        """
        (stamp, stream), count = stored_by(parts, trained.version, BATCH), 0
        table = cls(trained, storage=stamp.storage, batch_size=stamp.batch_size, rows=rows, clock=clock)
        for part in stream:
            ids, words = rows_of(part, stamp, len(table._program.empty))
            add_part(table.rows, part, ids if isinstance(ids, list) else ids.tolist(), words)
            count += len(words)
        expect(users is None or count == users, "parts", f"{users} users", count)
        return table

    @classmethod
    def load(cls, path: str | Path, trained: Trained, *, clock: Callable[[], float] | None = time.time) -> UserTable:
        """The table in a folder, if it belongs to a model; `clock` as for the class.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError: torn or altered, not a user table.
          ValueError: another config; EncodingMismatch, VersionMismatch: another encoder, other parameters.
        """
        manifest = inspect(path)
        manifest.check_model(path, trained)
        table = cls(trained, storage=manifest.storage, batch_size=manifest.batch_size, clock=clock)
        if manifest.layout != describe(table._program.layout):
            raise CheckpointError(f"{path}: expected rows of this version's layout, got another; {Manifest.REBUILD}")
        table.rows = read_rows(path, manifest, width=len(table._program.empty))
        return table

    def _in_memory(self) -> MemoryRows:
        if not isinstance(self.rows, MemoryRows):
            raise ValueError(f"table: expected rows in this process, got those of {type(self.rows).__name__}")
        return self.rows

    def _packed(self, user: UserId) -> Packed:
        """The row of a user, or of one without events."""
        words = self.rows.get([user]).words[0]
        return Packed(words=words if words.any() else self._program.empty, layout=self._program.layout)

    def _apply(self, raw: Any, position: Any, partition: int, *, again: bool, written: Written | None = None) -> UpdateCounts:
        """Applies raw events; `again` also to rows that are as far as that."""
        events, order = self.encoder.events(raw)
        at = positions_of(position, len(order))[order]
        ids = as_ids(plain(column_of(raw, self.encoder.columns.user)), self.encoder.columns.user)
        expect(len(ids) == len(order), "events", "a user for each event", f"{len(ids)} for {len(order)} events")
        names = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        numbers: dict[UserId, int] = {}
        owner = np.fromiter((numbers.setdefault(names[i], len(numbers)) for i in order), np.int64, len(order))
        counts = np.bincount(owner, minlength=len(numbers))
        by_user = np.lexsort((at, owner))  # and by message; within one as `Encoder.events` orders them
        written = written and Written(*(np.asarray(leaf)[order][by_user] for leaf in written))
        return self._run(list(numbers), take(events, by_user), counts, at[by_user], partition, again=again, written=written)

    def _run(
        self, users: list[UserId], events: Events, counts: np.ndarray, at: np.ndarray, partition: int,
        *, again: bool, lanes: int | None = None, written: Written | None = None,
    ) -> UpdateCounts:  # fmt: skip
        """Applies events of one user after the other, at positions `at` int64 [sum of counts] of the stream.

        Rows that others changed meanwhile are read again.
        """
        if self._clock is not None:
            check_future(np.asarray(events.time), written, clock=self._clock, skew=self.encoder.max_skew)
        partition, streamed = partition_of(partition), bool((at > NONE).any())
        applied, starts, left = UpdateCounts(0, 0, 0, 0, 0), np.cumsum(counts) - counts, np.arange(len(users))
        for _ in range(RETRIES):
            before = self.rows.get([users[i] for i in left])
            _check_partition([users[i] for i in left], before, partition if streamed else None)
            index, row = ranges(starts[left], counts[left]), np.repeat(np.arange(len(left)), counts[left])
            fresh = np.ones(len(index), bool) if again else at[index] > before.position[row]
            new = np.bincount(row[fresh], minlength=len(left))
            applied += UpdateCounts(0, 0, int(counts[left[new == 0]].sum()), 0, 0)
            left, before, new, index = left[new > 0], before.take(np.flatnonzero(new)), new[new > 0], index[fresh]
            if not len(left):
                return applied
            lanes = lanes or self._program.lanes
            made = self._program.in_order(before.words, take(events, index), new, at[index], lanes=lanes)
            position = np.maximum(before.position, np.maximum.reduceat(at[index], np.cumsum(new) - new))
            where = np.full(len(left), partition, np.int32) if streamed else before.partition
            good = self.rows.put([users[i] for i in left], Stored(made.words, position, where), expected=before.position)
            done = left[good]
            sums = new[good].sum(), good.sum(), (counts[done] - new[good]).sum(), made.late[good].sum(), made.beyond[good].sum()
            applied += UpdateCounts(*map(int, sums))
            left = left[~good]
            if not len(left):
                return applied
        raise RuntimeError(f"update: another writer changed the rows of {len(left)} users {RETRIES} times in between")


def _check_partition(users: list[UserId], rows: Stored, partition: int | None) -> None:
    """Raises ValueError for a user whose events came by another partition: positions of two cannot be compared."""
    moved = (rows.position > NONE) & (rows.partition != partition)
    if partition is not None and moved.any():
        at = int(np.argmax(moved))
        expected = f"events of user {users[at]!r} by partition {rows.partition[at]}, as before"
        raise ValueError(f"update: expected {expected}, got partition {partition}; build the table again for other partitions")


_unpack = jax.jit(Packed.widened)


class UserTableWriter(SnapshotWriter):
    """Applies events in order, and saves a snapshot every so many messages or seconds; see `SnapshotWriter`.

    `UserTableWriter.start` takes a new directory, `resume` one with snapshots. One thread applies; any may read `table`.

    Args:
      table: to start from; its rows are in this process.
      options: `positions`, `every_updates`, `every_seconds`, `keep`, `background`, `clock`, as for `SnapshotWriter`.

    Attributes:
      applied: what became of all events since the start of this writer.
    """

    kind = UserTable
    table: UserTable

    def __init__(self, directory: str | Path, table: UserTable, **options: Any):
        super().__init__(directory, table, **options)
        self.applied = UpdateCounts(0, 0, 0, 0, 0)

    def update(self, events: Any, *, position: int | np.ndarray, partition: int = 0, written: Written | None = None) -> bool:
        """Applies a message, or several; False where the position is not after the partition's last one: applied already.

        Args:
          position: in the stream, of one message, or of each event [n]; rises within a partition.
          partition: partition of the stream; always the same for one user.

        Raises:
          TypeError, ValueError, ClockError: as `UserTable.update`; nothing has changed then.
          OSError, WriterConflict: a snapshot could not be saved. The events are in all the same; a later one tries again.
        """

        def run() -> None:
            self.applied += self.table.update(events, position=position, partition=partition, written=written)

        expect(np.size(position) > 0, "position", "one for each event", "none; give position=")
        return self._apply(run, position if np.ndim(position) == 0 else position[-1], partition)  # type: ignore[index]

    def _frozen(self) -> UserTable:
        return self.table.copy() if self._background else self.table
