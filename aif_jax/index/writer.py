"""`IndexWriter`: applies an ordered stream of updates to an index and resumes after being killed at any moment.

A snapshot on disk records a position for each partition: it holds every update up to there and none after it. After a kill
`resume` reads the newest complete snapshot, and the caller replays each partition after its position; updates that it holds
already are skipped. Positions rise within a partition; gaps are allowed, as Kafka's offsets have them.

One writer owns a directory, see `lease.py`; snapshots are named by the number of their owner and a count, and so sort by age.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aif_jax.checkpoint import METADATA_FILE, CheckpointError
from aif_jax.checks import expect
from aif_jax.encoder import Encoder
from aif_jax.folders import remove_folder, remove_unfinished
from aif_jax.index.files import inspect
from aif_jax.index.item_index import ItemIndex
from aif_jax.index.lease import Lease
from aif_jax.model import PreRanker
from aif_jax.types import ItemFeatures, Params

SNAPSHOT = re.compile(r"(\d{6,})-(\d{10,})")
logger = logging.getLogger(__name__)


class IndexWriter:
    """Applies updates in order, and saves a snapshot every so many updates or seconds.

    `IndexWriter.start` takes a new directory, `IndexWriter.resume` one with snapshots; `close`, or the end of a `with` block,
    saves what is left and releases the directory. One thread applies; `index`, the latest snapshot, may be read from any.

    Args:
      directory: of the snapshots.
      index: to start from.
      positions: of the last update of each partition that is in `index`.
      every_updates: updates between two snapshots; None saves by time alone.
      every_seconds: between two snapshots, checked when an update arrives; None saves by count alone.
      keep: how many snapshots stay; at least 1.
      background: saves in a thread while updates continue. A snapshot takes time that grows with the table.
      clock: seconds, monotonic.

    Raises:
      ValueError, TypeError: a number out of range, positions that are no integers.
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
        background: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (("every_updates", every_updates), ("every_seconds", every_seconds), ("keep", keep)):
            expect(value is None or value > 0, name, "more than 0", value)
        self.directory = Path(directory).absolute()
        self._lease = Lease(self.directory)
        self.index = index
        self._positions = {_integer(p, "partition"): _integer(at, "position") for p, at in (positions or {}).items()}
        self._saved_positions: dict[int, int] = {}
        self._every_updates, self._every_seconds, self._keep = every_updates, every_seconds, keep
        self._background, self._clock = background, clock
        self._changes = 1  # what is not on disk counts as a change
        self._saved_changes = 0
        self._tried_changes, self._tried_at = 0, clock()  # of the last save, whatever became of it
        self._saving: Future[None] | None = None
        self._snapshots = 0
        self._pushing: list[Callable[[ItemIndex], ItemIndex]] | None = None

    @classmethod
    def start(cls, directory: str | Path, index: ItemIndex, **options: Any) -> IndexWriter:
        """A writer for a directory without snapshots; saves the first one before it returns. Arguments as the class.

        Raises:
          FileExistsError: there are snapshots in `directory`.
          WriterConflict: another writer has the directory.
        """
        writer = cls(directory, index, **options)
        writer._lease.take()
        try:
            if there := snapshots(directory):
                raise FileExistsError(f"{writer.directory}: holds {len(there)} snapshots already; use IndexWriter.resume")
            remove_unfinished(writer.directory)
            writer._save(*writer._next_snapshot())
        except BaseException:
            writer._lease.release()
            raise
        return writer

    @classmethod
    def resume(
        cls,
        directory: str | Path,
        model: PreRanker,
        params: Params,
        *,
        encoder: Encoder | None = None,
        version: str | None = None,
        mesh: Any = None,
        takeover: bool = False,
        **options: Any,
    ) -> IndexWriter:
        """A writer that continues the newest complete snapshot; replay each partition after its entry in `writer.positions`.

        Args:
          directory: of an earlier writer.
          model, params, encoder, version, mesh: as in `ItemIndex.load`.
          takeover: take the directory from a writer that is alive, for one that hangs; its next save raises WriterConflict.
          options: `every_updates`, `every_seconds`, `keep`, `background`, `clock`, as for the class.

        Raises:
          FileNotFoundError: no complete snapshot there.
          WriterConflict: another writer has the directory.
          CheckpointError: the newest snapshot was altered; names it, and the one before it.
          VersionMismatch, ValueError: it belongs to another model.
        """
        directory = Path(directory).absolute()
        if not (there := snapshots(directory)):
            raise FileNotFoundError(f"{directory}: no complete snapshot of an index")
        lease = Lease(directory)
        lease.take(above=_number(there[-1])[0], takeover=takeover)
        try:
            there = snapshots(directory)  # again: the owner before may have saved one
            index = ItemIndex.load(there[-1], model, params, encoder=encoder, version=version, mesh=mesh)
            writer = cls(directory, index, positions=inspect(there[-1]).positions, **options)
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
        """Of the last update of each partition that is in `index`."""
        return dict(self._positions)

    @property
    def saved_positions(self) -> dict[int, int]:
        """Of the last update of each partition that is on disk: only these may be committed to the stream."""
        return dict(self._saved_positions)

    def upsert(self, ids: Any, features: ItemFeatures | None = None, *, position: int, partition: int = 0) -> bool:
        """Applies an update of some items; False where the position is not after the partition's last one: applied already.

        Args:
          ids, features: as in `ItemIndex.upsert`.
          position: in the stream; rises within a partition.
          partition: of the stream.

        Raises:
          TypeError, ValueError: items that do not fit, a position that is no integer; nothing has changed then.
          OSError, WriterConflict: a snapshot could not be saved, now or before in the background. The update is in all the
            same; a later one tries again.
        """
        return self._apply(lambda index: index.upsert(ids, features), position, partition)

    def delete(self, ids: Any, *, position: int, partition: int = 0) -> bool:
        """Applies a deletion; arguments, returns and errors as `upsert`. No ids move the position alone."""
        return self._apply(lambda index: index.delete(ids), position, partition)

    def snapshot(self) -> None:
        """Saves the latest snapshot now and removes the oldest ones beyond `keep`; may raise OSError, WriterConflict."""
        self.wait()
        task = self._next_snapshot()
        if not self._background:
            return self._save(*task)
        thread = ThreadPoolExecutor(1, "index-writer")
        self._saving = thread.submit(self._save, *task)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the snapshot that is being saved, and raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def begin_push(self) -> None:
        """From now on updates are also recorded for a new version; build it from a catalogue at least as new as `positions`."""
        self._pushing = []

    def finish_push(self, index: ItemIndex) -> ItemIndex:
        """Applies the updates since `begin_push` to a new version, makes it the latest snapshot, saves and returns it.

        Raises:
          RuntimeError: no push was begun.
        """
        if self._pushing is None:
            raise RuntimeError("finish_push: expected begin_push before it")
        for change in self._pushing:
            index = change(index)
        self.index, self._pushing, self._changes = index, None, self._changes + 1
        self.snapshot()
        return index

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

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _apply(self, change: Callable[[ItemIndex], ItemIndex], position: int, partition: int) -> bool:
        position, partition = _integer(position, "position"), _integer(partition, "partition")
        if partition in self._positions and position <= self._positions[partition]:
            return False
        self.index = change(self.index)
        self._positions[partition] = position
        self._changes += 1
        if self._pushing is not None:
            self._pushing.append(change)
        if self._due():
            self.snapshot()
        return True

    def _due(self) -> bool:
        by_count = self._every_updates is not None and self._changes - self._tried_changes >= self._every_updates
        return by_count or (self._every_seconds is not None and self._clock() - self._tried_at >= self._every_seconds)

    def _next_snapshot(self) -> tuple[ItemIndex, dict[int, int], int, Path]:
        """What `_save` saves: the state now."""
        self._tried_changes, self._tried_at = self._changes, self._clock()
        self._snapshots += 1
        path = self.directory / f"{self._lease.number:06d}-{self._snapshots:010d}"
        return self.index, self.positions, self._changes, path

    def _save(self, index: ItemIndex, positions: dict[int, int], changes: int, path: Path) -> None:
        self._lease.check()
        index.save(path, positions=positions)
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
    folders = Path(directory).absolute().glob("[0-9]*-[0-9]*")
    return sorted((f for f in folders if SNAPSHOT.fullmatch(f.name) and (f / METADATA_FILE).is_file()), key=_number)


def _number(snapshot: Path) -> tuple[int, int]:
    """Number of the owner, and of the snapshot."""
    owner, number = snapshot.name.split("-")
    return int(owner), int(number)


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name}: expected an integer, got {value!r}")
