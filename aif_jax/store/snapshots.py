"""Writers of ordered streams: they apply updates to a table and resume after being killed at any moment.

A snapshot on disk records a position for each partition: it holds every update up to there and none after it. After a kill
`resume` reads the newest complete snapshot, and the caller replays each partition after its position; updates that it holds
already are skipped. Positions rise within a partition; gaps are allowed, as Kafka's offsets have them.

One writer owns a directory, see `Lease`; snapshots are named by the number of their owner and a count, and so sort by age.
Every owner claims the next number by making the file `.owner-NUMBER`, and locks it until it ends, however it ends. Where a lock
says nothing (no locks, a takeover), the highest number owns the directory, and a writer checks that at every save.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import fcntl
import json
import logging
import operator
import os
import re
import reprlib
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from aif_jax.checks import VersionMismatch, check_encoding, expect
from aif_jax.config import Config
from aif_jax.export.consume.files import memory
from aif_jax.store import sealed
from aif_jax.store.codec import STORAGES, Storage
from aif_jax.store.folders import CheckpointError, local, remove_folder, remove_unfinished
from aif_jax.store.trained import Trained
from aif_jax.trees import differences, listed

CLAIM = re.compile(r"\.owner-(\d+)")


class WriterConflict(RuntimeError):
    """Another writer owns the directory; one that lost it (`takeover`) saves nothing more."""


class Lease:
    """The right to write into a directory, until `release` or the end of object or process; `number` is 0 before `take`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.number = 0
        self._close: Callable[[], Any] = lambda: None

    def take(self, *, above: int = 0, takeover: bool = False) -> None:
        """Becomes the owner, with a number above `above`; `takeover` takes it from a living owner. WriterConflict otherwise."""
        self.directory.mkdir(parents=True, exist_ok=True)
        before = self._claims()
        last = max(before, default=0)
        if last and not takeover and _locked(before[last]):
            raise WriterConflict(f"{self.directory}: {_described(before[last], last)} is writing here; stop it first")
        number = max(last, above) + 1
        path = self.directory / f".owner-{number:06d}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            raise WriterConflict(f"{self.directory}: another writer has just started; stop it first") from None
        self._close = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # a file system without locks: there the number alone decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        self.number = number
        self.check()
        for path in before.values():
            path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises WriterConflict unless this is the owner."""
        if not self.number:
            raise WriterConflict(f"{self.directory}: this writer is closed; resume to go on")
        claims = self._claims()
        last = max(claims, default=0)
        if last > self.number:
            taken = f"{self.directory}: {_described(claims[last], last)} took over"
            raise WriterConflict(f"{taken}; this writer (owner {self.number}) saves no more; stop it")

    def release(self, *, undo: bool = False) -> None:
        """Lets the next owner in; `undo` also removes the claim, and the directory where nothing else is in it."""
        if undo and self.number:
            (self.directory / f".owner-{self.number:06d}").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.directory.rmdir()
        self.number = 0
        self._close()

    def _claims(self) -> dict[int, Path]:
        matches = ((CLAIM.fullmatch(path.name), path) for path in self.directory.iterdir())
        return {int(match[1]): path for match, path in matches if match}


def _locked(path: Path) -> bool:
    """Whether the process that made a claim holds it."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks: not held
            return isinstance(error, BlockingIOError)
    return False


def _described(path: Path, number: int) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['process']} on {owner['host']} (owner {number}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"owner {number}"


SNAPSHOT = re.compile(r"(\d{6,})-(\d{10,})")
LAST, LAST_PARTITION = 2**63 - 1, 2**31 - 1  # what int64 positions and int32 partitions hold, as Kafka's do
logger = logging.getLogger(__name__)
Writer = TypeVar("Writer", bound="SnapshotWriter")
Made = TypeVar("Made", bound="Manifest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(abc.ABC):
    """The manifest of a snapshot on disk, without its arrays; rows belong to one model. Fields: `index.Manifest`."""

    version: str
    config: Config
    encoding: str
    storage: Storage
    batch_size: int
    positions: dict[int, int]
    library: str
    leaves: dict[str, str]
    nbytes: int

    NOUN: ClassVar[str]
    FORMAT: ClassVar[str]
    REBUILD: ClassVar[str]
    """What to do about a snapshot that cannot be read."""

    @classmethod
    def inspect(cls: type[Made], path: str | Path) -> Made:
        """Reads the manifest of a snapshot.

        Raises:
          FileNotFoundError: nothing there.
          CheckpointError: torn, altered, not of this kind, or written by another version.
        """
        record = sealed.inspect(path, format=cls.FORMAT, rebuild=cls.REBUILD)
        try:
            manifest = cls(
                **{field.name: record[field.name] for field in dataclasses.fields(cls) if field.name in record} | {
                    "config": Config.from_json(record["config"]),
                    "positions": positions_by_partition({int(name): at for name, at in record["positions"].items()}),
                    "library": record["aif_jax"],
                    "leaves": {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in record["arrays"].items()},
                    "nbytes": sealed.nbytes(record),
                }
            )  # fmt: skip
            good = manifest.storage in STORAGES and type(manifest.batch_size) is int and manifest.batch_size >= 1
            good = good and all(isinstance(text, str) for text in (manifest.version, manifest.encoding))
            expect(good and manifest.fits(record["arrays"]), "fields", f"those of {cls.FORMAT}", reprlib.repr(record))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path}: the record cannot be read: {error!r}; {cls.REBUILD}") from error
        return manifest

    @abc.abstractmethod
    def fits(self, arrays: Mapping[str, Any]) -> bool:
        """Whether the fields of a kind fit the arrays, given by path with dtype and shape."""

    def fits_memory(self, rows: int) -> bool:
        """Whether a batch of such rows fits in memory: it is filled up with zeros."""
        return self.batch_size * max(1, self.nbytes // max(1, rows)) <= memory()

    @classmethod
    def write(
        cls, path: str | Path, trees: Any, plain: Mapping[str, Any], config: Config, positions: Mapping[int, int] | None
    ) -> None:
        """Writes a snapshot into a new folder: its arrays, its fields that are plain JSON, config and positions."""
        at = {str(partition): position for partition, position in sorted(positions_by_partition(positions).items())}
        record = {**plain, "config": json.loads(json.dumps(config.to_json())), "positions": at}
        sealed.write(path, trees, record, format=cls.FORMAT)

    @classmethod
    def read(cls, path: str | Path, like: Any = None) -> Any:
        """The arrays of a snapshot, see `sealed.read`."""
        return sealed.read(path, format=cls.FORMAT, like=like, rebuild=cls.REBUILD)

    def check_model(self, path: str | Path, trained: Trained) -> None:
        """Raises unless the snapshot was made by this model: ValueError, EncodingMismatch, VersionMismatch."""
        if self.config != trained.config:
            lines = differences(self.config.to_json(), trained.config.to_json(), path="config", source="snapshot")
            raise ValueError(f"{path}: expected config and schema of the model, got others; {self.REBUILD}:\n{listed(lines)}")
        check_encoding(f"{self.NOUN} in {path}", expected=trained.encoding, got=self.encoding)
        if self.version != trained.version:
            raise VersionMismatch(f"{self.NOUN} in {path}", expected=trained.version, got=self.version)


class SnapshotWriter:
    """What writers share: positions, snapshots in time, one owner. A subclass changes `table` in `_apply`.

    Args:
      table: to start from: has `save(path, positions=...)`, and its class `load(path, trained)` and `inspect(path)`.
      positions: positions of the last update of each partition that is in the table.
      every_updates: updates between two snapshots; None saves by time alone.
      every_seconds: between two snapshots, checked when an update arrives; None saves by count alone.
      keep: how many snapshots stay; at least 1.
      background: saves in a thread while updates continue. A snapshot takes time that grows with the table.

    Raises:
      ValueError, TypeError: a number or a position out of range, positions that are no integers, a directory that is a URL.
    """

    def __init__(
        self,
        directory: str | Path,
        table: Any,
        *,
        positions: Mapping[int, int] | None = None,
        every_updates: int | None = 1000,
        every_seconds: float | None = None,
        keep: int = 3,
        background: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (("every_updates", every_updates), ("every_seconds", every_seconds), ("keep", keep)):
            expect(value is None or value > 0, name, "more than 0", value)
        self.directory = local(directory)
        self.table = table
        self._lease = Lease(self.directory)
        self._positions = positions_by_partition(positions)
        self._saved_positions: dict[int, int] = {}
        self._every_updates, self._every_seconds, self._keep = every_updates, every_seconds, keep
        self._background, self._clock = background, clock
        self._changes = 1  # what is not on disk counts as a change
        self._saved_changes = 0
        self._tried_changes, self._tried_at = 0, clock()  # of the last save, whatever became of it
        self._saving: Future[None] | None = None
        self._snapshots = 0

    def _frozen(self) -> Any:
        """The table as it is now, with a `save(path, positions=...)` that may run in a thread while updates continue.

        As it is, for tables that never change; a writer of one that does must copy it.
        """
        return self.table

    kind: ClassVar[Any]
    """Class of the table."""

    @classmethod
    def start(cls: type[Writer], directory: str | Path, table: Any, **options: Any) -> Writer:
        """A writer for a directory without snapshots; saves the first one before it returns. Arguments as the class.

        Raises:
          FileExistsError: there are snapshots in `directory`.
          WriterConflict: another writer has the directory.
        """
        writer = cls(directory, table, **options)
        writer._lease.take()
        try:
            if there := snapshots(directory):
                raise FileExistsError(f"{writer.directory}: holds {len(there)} snapshots already; use {cls.__name__}.resume")
            remove_unfinished(writer.directory)
            writer._save(*writer._next_snapshot())
        except BaseException:
            writer._lease.release()
            raise
        return writer

    @classmethod
    def resume(
        cls: type[Writer], directory: str | Path, trained: Trained,
        *, load: Mapping[str, Any] | None = None, takeover: bool = False, **options: Any,
    ) -> Writer:  # fmt: skip
        """A writer that continues the newest complete snapshot; replay each partition after its entry in `writer.positions`.

        Args:
          load: further arguments of the table's `load`, such as the `mesh` of an index.
          takeover: take the directory from a writer that is alive, for one that hangs; its next save raises WriterConflict.
          options: `every_updates`, `every_seconds`, `keep`, `background`, `clock`, as for the class.

        Raises:
          FileNotFoundError: no complete snapshot there.
          WriterConflict: another writer has the directory.
          CheckpointError: the newest snapshot was altered; names it, and the one before it.
          VersionMismatch, ValueError: it belongs to another model.
        """
        directory = local(directory)
        if not (there := snapshots(directory)):
            raise FileNotFoundError(f"{directory}: expected a complete snapshot, got none; begin with {cls.__name__}.start")
        lease = Lease(directory)
        lease.take(above=_number(there[-1])[0], takeover=takeover)
        try:
            there = snapshots(directory)  # again: the owner before may have saved one
            table = cls.kind.load(there[-1], trained, **(load or {}))
            writer = cls(directory, table, positions=cls.kind.inspect(there[-1]).positions, **options)
        except BaseException as error:
            if isinstance(error, CheckpointError) and len(there) > 1:
                error.add_note(f"Without that folder the writer would resume from {there[-2]}.")
            lease.release()
            raise
        writer._lease = lease
        writer._saved_positions, writer._changes = writer.positions, 0
        writer._remove_old()  # what a kill in the middle of a save or a removal left: there may be nothing left to save
        return writer

    @property
    def positions(self) -> dict[int, int]:
        """Of the last update of each partition that is in the table."""
        return dict(self._positions)

    @property
    def saved_positions(self) -> dict[int, int]:
        """Of the last update of each partition that is on disk: only these may be committed to the stream."""
        return dict(self._saved_positions)

    def skip(self, *, position: int, partition: int = 0) -> bool:
        """Moves past a message that changes nothing; returns and raises as an update."""
        return self._apply(lambda: None, position, partition)

    def tick(self) -> None:
        """Saves a snapshot where one is due by time and something changed: for streams that pause; raises as `snapshot`."""
        if self._every_seconds is not None and self._changes > self._tried_changes and self._due():
            self.snapshot()

    def snapshot(self) -> None:
        """Saves the table now and removes the oldest snapshots beyond `keep`; may raise OSError, WriterConflict."""
        self.wait()
        task = self._next_snapshot()
        if not self._background:
            return self._save(*task)
        thread = ThreadPoolExecutor(1, "snapshot-writer")
        self._saving = thread.submit(self._save, *task)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the snapshot that is being saved, and raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Saves what is not on disk yet, waits for it and releases the directory; may raise OSError, WriterConflict."""
        try:
            if self._saving is not None:
                self._saving.exception()  # an update that this save lost is saved below, or raises there
                self._saving = None
            if self._saved_changes < self._changes:
                self._save(*self._next_snapshot())
        finally:
            self._lease.release()

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _apply(self, change: Callable[[], None], position: int, partition: int) -> bool:
        """Runs a change unless its position is not after the partition's last one; saves a snapshot where one is due."""
        position, partition = integer(position, "position"), partition_of(partition)
        if partition in self._positions and position <= self._positions[partition]:
            return False
        change()
        self._positions[partition] = position
        self._changes += 1
        if self._due():
            self.snapshot()
        return True

    def _due(self) -> bool:
        by_count = self._every_updates is not None and self._changes - self._tried_changes >= self._every_updates
        return by_count or (self._every_seconds is not None and self._clock() - self._tried_at >= self._every_seconds)

    def _next_snapshot(self) -> tuple[Any, dict[int, int], int, Path]:
        """What `_save` saves: the state now."""
        self._tried_changes, self._tried_at = self._changes, self._clock()
        self._snapshots += 1
        path = self.directory / f"{self._lease.number:06d}-{self._snapshots:010d}"
        return self._frozen(), self.positions, self._changes, path

    def _save(self, table: Any, positions: dict[int, int], changes: int, path: Path) -> None:
        self._lease.check()
        table.save(path, positions=positions)
        self._lease.check()  # a snapshot that came too late sorts before those of the new owner
        self._saved_positions, self._saved_changes = positions, changes
        self._remove_old()

    def _remove_old(self) -> None:
        """Removes what is beyond `keep`; where that fails, the next save tries again."""
        try:
            for old in snapshots(self.directory)[: -self._keep]:
                remove_folder(old)
            remove_unfinished(self.directory)
        except OSError as error:
            logger.warning("%s: an old snapshot was not removed, tried again after the next save: %s", self.directory, error)


def snapshots(directory: str | Path) -> list[Path]:
    """The complete snapshots in a writer's directory, oldest first."""
    folders = local(directory).glob("[0-9]*-[0-9]*")
    return sorted((folder for folder in folders if SNAPSHOT.fullmatch(folder.name) and sealed.is_complete(folder)), key=_number)


def integer(value: Any, name: str, *, most: int = LAST) -> int:
    """A number of a stream, 0 to `most`; TypeError for what is no integer, ValueError for one out of range."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
            expect(0 <= number <= most, name, f"an integer from 0 to {most}", number)
            return number
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def partition_of(value: Any) -> int:
    """A partition's number; raises as `integer`."""
    return integer(value, "partition", most=LAST_PARTITION)


def positions_by_partition(positions: Mapping[Any, Any] | None) -> dict[int, int]:
    """Positions in a stream by partition, checked; {} of None. Raises as `integer`."""
    return {partition_of(partition): integer(at, "position") for partition, at in (positions or {}).items()}


def _number(snapshot: Path) -> tuple[int, int]:
    """Number of the owner, and of the snapshot."""
    owner, number = snapshot.name.split("-")
    return int(owner), int(number)
