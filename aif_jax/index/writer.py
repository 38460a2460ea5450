"""`IndexWriter`: applies an ordered stream of updates to an index, and resumes after being killed at any moment.

A snapshot on disk records a position for each partition: it holds every update up to there and none after it. After a kill
`resume` reads the newest complete snapshot, and the caller replays each partition after its position; updates that it holds
already are skipped. Positions rise within a partition; gaps are allowed, as Kafka's offsets have them.

One writer owns a directory, see `Lease`; snapshots are named by the number of their owner and a count, and so sort by age.
Every owner claims the next number by making the file `.owner-NUMBER`, and locks it until it ends, however it ends. Where a lock
says nothing (no locks, a takeover), the highest number owns the directory, and a writer checks that at every save.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import expect
from aif_jax.index.item_index import ItemIndex, inspect, positions_by_partition
from aif_jax.store import sealed
from aif_jax.store.folders import CheckpointError, local, remove_folder, remove_unfinished
from aif_jax.store.trained import Trained
from aif_jax.types import ItemFeatures

CLAIM = re.compile(r"\.owner-(\d+)")


class WriterConflict(RuntimeError):
    """Another writer owns the directory; one that lost it (`takeover`) saves nothing more."""


class Lease:
    """Write lock on a directory, with a fencing token `number`, 0: not held; `release` or the end of the process frees it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.number = 0
        self._close: Callable[[], Any] = lambda: None

    def take(self, *, above: int = 0, takeover: bool = False) -> None:
        """Become the owner, with a number above `above`; `takeover` takes it from a living owner. WriterConflict otherwise."""
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
        """Raise WriterConflict unless this is the owner."""
        if not self.number:
            raise WriterConflict(f"{self.directory}: this writer is closed; resume to go on")
        claims = self._claims()
        last = max(claims, default=0)
        if last > self.number:
            taken = f"{self.directory}: {_described(claims[last], last)} took over"
            raise WriterConflict(f"{taken}; this writer (owner {self.number}) saves no more; stop it")

    def release(self, *, undo: bool = False) -> None:
        """Let the next owner in; `undo` also removes the claim, and the directory where nothing else is in it."""
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
    """Return whether the process that made a claim holds it."""
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
logger = logging.getLogger(__name__)


class IndexWriter:
    """Applies updates in order, and saves a snapshot every so many updates or seconds.

    `IndexWriter.start` takes a new directory, `IndexWriter.resume` one with snapshots; `close`, or the end of a `with` block,
    saves what is left and releases the directory. One thread applies; `index`, the latest snapshot, may be read from any.

    Args:
      index: to start from.
      positions: positions of the last update of each partition that is in the index.
      every_updates: updates between two snapshots; None saves by time alone.
      every_seconds: between two snapshots, checked when an update arrives; None saves by count alone.
      keep: how many snapshots stay; at least 1.

    Raises:
      ValueError, TypeError: a number or a position out of range, positions that are no integers, a directory that is a URL.
    """

    def __init__(
        self,
        directory: str | Path,
        index: ItemIndex,
        *,
        positions: Mapping[int, int] | None = None,
        every_updates: int | None = 1000,
        every_seconds: float | None = None,
        keep: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (("every_updates", every_updates), ("every_seconds", every_seconds), ("keep", keep)):
            expect(value is None or value > 0, name, "more than 0", value)
        self.directory, self.index = local(directory), index
        self._lease = Lease(self.directory)
        self._positions = positions_by_partition(positions)
        self._saved_positions: dict[int, int] = {}
        self._every_updates, self._every_seconds, self._keep, self._clock = every_updates, every_seconds, keep, clock
        self._unsaved = self._untried = 1  # changes since the last save, and since the last try; of a new writer the index
        self._tried_at, self._snapshots = clock(), 0

    @classmethod
    def start(cls, directory: str | Path, index: ItemIndex, **options: Any) -> IndexWriter:
        """Return a writer for a directory without snapshots; saves the first one before it returns. Arguments as the class.

        Raises FileExistsError: there are snapshots in `directory`; WriterConflict: another writer has the directory.
        """
        writer = cls(directory, index, **options)
        writer._lease.take()
        try:
            if there := snapshots(directory):
                raise FileExistsError(f"{writer.directory}: holds {len(there)} snapshots already; use {cls.__name__}.resume")
            remove_unfinished(writer.directory)
            writer.snapshot()
        except BaseException:
            writer._lease.release()
            raise
        return writer

    @classmethod
    def resume(
        cls, directory: str | Path, trained: Trained, *, mesh: Any = None, takeover: bool = False, **options: Any
    ) -> IndexWriter:
        """Return a writer that continues the newest complete snapshot; replay partitions after their `writer.positions`.

        Args:
          mesh: see `ItemIndex.load`.
          takeover: take the directory from a writer that is alive, for one that hangs; its next save raises WriterConflict.
          options: `every_updates`, `every_seconds`, `keep`, `clock`, as for the class.

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
            index = ItemIndex.load(there[-1], trained, mesh=mesh)
            writer = cls(directory, index, positions=inspect(there[-1]).positions, **options)
        except BaseException as error:
            if isinstance(error, CheckpointError) and len(there) > 1:
                error.add_note(f"Without that folder the writer would resume from {there[-2]}.")
            lease.release()
            raise
        writer._lease = lease
        writer._saved_positions, writer._unsaved, writer._untried = writer.positions, 0, 0
        writer._remove_old()  # what a kill in the middle of a save or a removal left: there may be nothing left to save
        return writer

    @property
    def positions(self) -> dict[int, int]:
        """Of the last update of each partition that is in the index."""
        return dict(self._positions)

    @property
    def saved_positions(self) -> dict[int, int]:
        """Of the last update of each partition that is on disk: only these may be committed to the stream."""
        return dict(self._saved_positions)

    def upsert(self, ids: Any, features: ItemFeatures | None = None, *, position: int, partition: int = 0) -> bool:
        """Apply an update of some items; False where the position is not after the partition's last one: applied already.

        Args:
          ids, features: see `ItemIndex.upsert`.
          position: in the stream; rises within a partition.

        Raises:
          TypeError, ValueError: items that do not fit, a position that is no integer; nothing has changed then.
          OSError, WriterConflict: a snapshot could not be saved. The update is in all the same; a later one tries again.
        """
        return self.update(lambda index: index.upsert(ids, features), position=position, partition=partition)

    def delete(self, ids: Any, *, position: int, partition: int = 0) -> bool:
        """Apply a deletion; arguments, returns and errors as `upsert`. No ids move the position alone."""
        return self.update(lambda index: index.delete(ids), position=position, partition=partition)

    def update(self, change: Callable[[ItemIndex], ItemIndex], *, position: int, partition: int = 0) -> bool:
        """Apply a function of the index, such as several changes of one partition as one; returns and raises as `upsert`."""
        ((partition, position),) = positions_by_partition({partition: position}).items()
        if partition in self._positions and position <= self._positions[partition]:
            return False
        self.index = change(self.index)
        self._positions[partition] = position
        self._unsaved += 1
        self._untried += 1
        if self._due():
            self.snapshot()
        return True

    def tick(self) -> None:
        """Save a snapshot where one is due by time and something changed: for streams that pause; raises as `snapshot`."""
        if self._every_seconds is not None and self._untried and self._due():
            self.snapshot()

    def snapshot(self) -> None:
        """Save the index now and remove the oldest snapshots beyond `keep`; may raise OSError, WriterConflict."""
        self._untried, self._tried_at = 0, self._clock()
        self._snapshots += 1
        self._lease.check()
        self.index.save(self.directory / f"{self._lease.number:06d}-{self._snapshots:010d}", positions=self._positions)
        self._lease.check()  # a snapshot that came too late sorts before those of the new owner
        self._saved_positions, self._unsaved = self.positions, 0
        self._remove_old()

    def close(self) -> None:
        """Save what is not on disk yet and releases the directory; may raise OSError, WriterConflict."""
        try:
            if self._unsaved:
                self.snapshot()
        finally:
            self._lease.release()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due(self) -> bool:
        by_count = self._every_updates is not None and self._untried >= self._every_updates
        return by_count or (self._every_seconds is not None and self._clock() - self._tried_at >= self._every_seconds)

    def _remove_old(self) -> None:
        """Remove what is beyond `keep`; where that fails, the next save tries again."""
        try:
            for old in snapshots(self.directory)[: -self._keep]:
                remove_folder(old)
            remove_unfinished(self.directory)
        except OSError as error:
            logger.warning("%s: an old snapshot was not removed, tried again after the next save: %s", self.directory, error)


def snapshots(directory: str | Path) -> list[Path]:
    """Return the complete snapshots in a writer's directory, oldest first."""
    folders = local(directory).glob("[0-9]*-[0-9]*")
    return sorted((folder for folder in folders if SNAPSHOT.fullmatch(folder.name) and sealed.is_complete(folder)), key=_number)


def _number(snapshot: Path) -> tuple[int, int]:
    """Return the number of the owner, and of the snapshot."""
    owner, number = snapshot.name.split("-")
    return int(owner), int(number)
