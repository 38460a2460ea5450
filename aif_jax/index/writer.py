"""`IndexWriter`: applies an ordered stream of updates to an index and resumes after being killed, see `snapshots.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aif_jax.index.item_index import ItemIndex
from aif_jax.store.snapshots import SnapshotWriter
from aif_jax.types import ItemFeatures


class IndexWriter(SnapshotWriter):
    """Applies updates in order, and saves a snapshot every so many updates or seconds.

    `IndexWriter.start` takes a new directory, `IndexWriter.resume` one with snapshots; `close`, or the end of a `with` block,
    saves what is left and releases the directory. One thread applies; `index`, the latest snapshot, may be read from any.

    Args:
      directory: of the snapshots.
      index: to start from.
      options: `positions`, `every_updates`, `every_seconds`, `keep`, `background`, `clock`, as for `SnapshotWriter`.

    Raises:
      ValueError, TypeError: a number out of range, positions that are no integers.
    """

    kind = ItemIndex

    def __init__(self, directory: str | Path, index: ItemIndex, **options: Any):
        super().__init__(directory, index, **options)
        self._pushing: list[Callable[[ItemIndex], ItemIndex]] | None = None

    @property
    def index(self) -> ItemIndex:
        """The latest snapshot."""
        return self.table

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
        return self._change(lambda index: index.upsert(ids, features), position, partition)

    def delete(self, ids: Any, *, position: int, partition: int = 0) -> bool:
        """Applies a deletion; arguments, returns and errors as `upsert`. No ids move the position alone."""
        return self._change(lambda index: index.delete(ids), position, partition)

    def update(self, changes: Sequence[tuple[Any, Any]], *, position: int, partition: int = 0) -> bool:
        """Applies several changes of one partition, in order, as one: all of them are in, or none.

        Args:
          changes: pairs of what `ItemIndex.upsert` takes as (ids, features), and None; or of None and ids to delete.
          position: in the stream, of the last of them.
          partition: of the stream.

        Returns and raises as `upsert`.
        """

        def run(index: ItemIndex) -> ItemIndex:
            for upserted, deleted in changes:
                index = index.delete(deleted) if upserted is None else index.upsert(*upserted)
            return index

        return self._change(run, position, partition)

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
        self.table, self._pushing, self._changes = index, None, self._changes + 1
        self.snapshot()
        return index

    def _change(self, change: Callable[[ItemIndex], ItemIndex], position: int, partition: int) -> bool:
        def run() -> None:
            self.table = change(self.table)
            if self._pushing is not None:
                self._pushing.append(change)

        return self._apply(run, position, partition)
