"""`UserTableWriter`: applies a stream of events to a table in this process and resumes after being killed at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.checks import expect
from aif_jax.store.snapshots import SnapshotWriter
from aif_jax.store.trained import Trained
from aif_jax.user_table.clock import Written
from aif_jax.user_table.files import inspect
from aif_jax.user_table.table import UpdateCounts, UserTable


class UserTableWriter(SnapshotWriter):
    """Applies events in order, and saves a snapshot every so many messages or seconds; see `SnapshotWriter`.

    `UserTableWriter.start` takes a new directory, `resume` one with snapshots. One thread applies; any may read `table`.

    Args:
      directory: of the snapshots.
      table: to start from; its rows are in this process.
      options: `positions`, `every_updates`, `every_seconds`, `keep`, `background`, `clock`, as for `SnapshotWriter`.

    Attributes:
      applied: what became of all events since the start of this writer.
    """

    table: UserTable

    def __init__(self, directory: str | Path, table: UserTable, **options: Any):
        super().__init__(directory, table, **options)
        self.applied = UpdateCounts(0, 0, 0, 0, 0)

    @classmethod
    def resume(cls, directory: str | Path, trained: Trained, *, takeover: bool = False, **options: Any) -> UserTableWriter:
        """A writer that continues the newest complete snapshot; replay each partition after its entry in `writer.positions`.

        Args:
          directory: of an earlier writer.
          trained: as in `UserTable.load`.
          takeover: take the directory from a writer that is alive; its next save raises WriterConflict.
          options: as for the class.

        Raises what `IndexWriter.resume` raises.
        """

        def load(snapshot: Path) -> Any:
            table = UserTable.load(snapshot, trained)
            return cls(directory, table, positions=inspect(snapshot).positions, **options)

        return cls._continue(directory, load, takeover=takeover)

    def update(self, events: Any, *, position: int | np.ndarray, partition: int = 0, written: Written | None = None) -> bool:
        """Applies a message, or several; False where the position is not after the partition's last one: applied already.

        Args:
          events, written: as in `UserTable.update`.
          position: in the stream, of one message, or of each event [n]; rises within a partition.
          partition: of the stream; always the same for one user.

        Raises:
          TypeError, ValueError, ClockError: as `UserTable.update`; nothing has changed then.
          OSError, WriterConflict: a snapshot could not be saved. The events are in all the same; a later one tries again.
        """

        def run() -> None:
            self.applied += self.table.update(events, position=position, partition=partition, written=written)

        expect(np.size(position) > 0, "position", "one for each event", "none")
        return self._apply(run, position if np.ndim(position) == 0 else position[-1], partition)  # type: ignore[index]

    def _frozen(self) -> UserTable:
        return self.table.copy() if self._background else self.table
