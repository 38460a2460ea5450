"""`IndexWriter`: applies an ordered stream of updates to an index, and resumes after being killed at any moment.

A snapshot on disk records a position for each partition: it holds every update up to there and none after it. After a kill
`resume` reads the newest complete snapshot, and the caller replays each partition after its position; updates that it holds
already are skipped. Positions rise within a partition; gaps are allowed, as Kafka's offsets have them. One writer has a
directory, see `store.folders.WriteLock`. Snapshots are numbered, so they sort by age.
"""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Self

from aif_jax.checks import ArgumentError, expect
from aif_jax.index.item_index import ItemIndex, inspect, positions_by_partition
from aif_jax.store import sealed
from aif_jax.store.folders import CheckpointError, WriteLock, WriterConflict, local, remove_folder, remove_unfinished
from aif_jax.store.trained import Trained
from aif_jax.types import ItemFeatures

SNAPSHOT = re.compile(r"\d{10,}")
logger = logging.getLogger(__name__)


class IndexWriter:
    """Applies updates in order, and saves a snapshot every so many updates or seconds.

    Only `IndexWriter.start`, in a new directory, and `IndexWriter.resume` make one; `close`, or the end of a `with` block,
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
    ):
        for name, value in (("every_updates", every_updates), ("every_seconds", every_seconds), ("keep", keep)):
            expect(value is None or value > 0, name, "more than 0", value, error=ArgumentError)
        self.directory, self.index = local(directory), index
        self._lock: WriteLock | None = None  # None before `start` and `resume`, and after `close`
        self._positions = positions_by_partition(positions)
        self.saved_positions: dict[int, int] = {}  # of updates on disk: only these may be committed to the stream
        self._every_updates, self._every_seconds, self._keep = every_updates, every_seconds, keep
        self._untried, self._tried_at = 0, monotonic()  # updates since the last save was tried

    @classmethod
    def start(cls, directory: str | Path, index: ItemIndex, **options: Any) -> Self:
        """Return a writer for a directory without snapshots; saves the first one before it returns. Arguments as the class.

        Raises FileExistsError: there are snapshots in `directory`; WriterConflict: another writer has the directory.
        """
        writer = cls(directory, index, **options)
        writer._lock = WriteLock(writer.directory)
        try:
            if there := snapshots(directory):
                raise FileExistsError(f"{writer.directory}: holds {len(there)} snapshots already; use {cls.__name__}.resume")
            remove_unfinished(writer.directory)
            writer.snapshot()
        except BaseException:
            writer._lock.close()
            raise
        return writer

    @classmethod
    def resume(cls, directory: str | Path, trained: Trained, **options: Any) -> Self:
        """Return a writer that continues the newest complete snapshot; replay partitions after their `writer.positions`.

        Args:
          options: `every_updates`, `every_seconds`, `keep`, as for the class.

        Raises:
          FileNotFoundError: no complete snapshot there.
          WriterConflict: another writer has the directory.
          CheckpointError: the newest snapshot was altered; names it, and the one before it.
          VersionMismatch, ValueError: it belongs to another model.
        """
        directory = local(directory)
        if not (there := snapshots(directory)):
            raise FileNotFoundError(f"{directory}: expected a complete snapshot, got none; begin with {cls.__name__}.start")
        lock = WriteLock(directory)
        try:
            there = snapshots(directory)  # again: the writer before may have saved one
            writer = cls(directory, ItemIndex.load(there[-1], trained), positions=inspect(there[-1]).positions, **options)
        except BaseException as error:
            if isinstance(error, CheckpointError) and len(there) > 1:
                error.add_note(f"Without that folder the writer would resume from {there[-2]}.")
            lock.close()
            raise
        writer._lock, writer.saved_positions = lock, writer.positions
        writer._remove_old()  # what a kill in the middle of a save or a removal left: there may be nothing left to save
        return writer

    @property
    def positions(self) -> dict[int, int]:
        """Of the last update of each partition that is in the index."""
        return dict(self._positions)

    def upsert(self, ids: Any, features: ItemFeatures | None = None, *, position: int, partition: int = 0) -> bool:
        """Apply an update of some items; False where the position is not after the partition's last one: applied already.

        Args:
          ids, features: see `ItemIndex.upsert`.
          position: in the stream; rises within a partition.

        Raises:
          TypeError, ValueError: items that do not fit, a position that is no integer; nothing has changed then.
          OSError, WriterConflict: a snapshot could not be saved. The update is in all the same; a later one tries again.
        """
        applied = self.update(lambda index: index.upsert(ids, features), position=position, partition=partition)
        self.tick()
        return applied

    def delete(self, ids: Any, *, position: int, partition: int = 0) -> bool:
        """Apply a deletion; arguments, returns and errors as `upsert`. No ids move the position alone."""
        applied = self.update(lambda index: index.delete(ids), position=position, partition=partition)
        self.tick()
        return applied

    def update(self, change: Callable[[ItemIndex], ItemIndex], *, position: int, partition: int = 0) -> bool:
        """Apply a function of the index, such as several changes of one partition as one, and save nothing: `tick` does.

        Returns as `upsert`; raises TypeError, ValueError for a position that is no integer, and what the function raises.
        """
        expect(self._lock, f"{self.directory}", "a writer of `start` or `resume`", "none, or one closed", error=WriterConflict)
        ((partition, position),) = positions_by_partition({partition: position}).items()
        if partition in self._positions and position <= self._positions[partition]:
            return False
        self.index = change(self.index)
        self._positions[partition] = position
        self._untried += 1
        return True

    def tick(self) -> None:
        """Save a snapshot where one is due, by updates or, in streams that pause, by time; raises as `snapshot`."""
        by_count = self._every_updates is not None and self._untried >= self._every_updates
        by_time = self._every_seconds is not None and monotonic() - self._tried_at >= self._every_seconds
        if self._untried and (by_count or by_time):
            self.snapshot()

    def snapshot(self) -> None:
        """Save the index now and remove the oldest snapshots beyond `keep`; may raise OSError, WriterConflict."""
        self._untried, self._tried_at = 0, monotonic()
        expect(self._lock, f"{self.directory}", "a writer of `start` or `resume`", "none, or one closed", error=WriterConflict)
        number = 1 + max(map(_number, snapshots(self.directory)), default=0)
        self.index.save(self.directory / f"{number:010d}", positions=self._positions)
        self.saved_positions = self.positions
        self._remove_old()

    def close(self) -> None:
        """Save what is not on disk yet and release the directory; may raise OSError, WriterConflict."""
        try:
            if self._positions != self.saved_positions:
                self.snapshot()
        finally:
            if self._lock is not None:
                self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
    folders = local(directory).glob("[0-9]*")
    return sorted((folder for folder in folders if SNAPSHOT.fullmatch(folder.name) and sealed.is_complete(folder)), key=_number)


def _number(snapshot: Path) -> int:
    return int(snapshot.name)
