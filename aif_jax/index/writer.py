"""`IndexWriter`: applies an ordered stream of updates to an index and can go on after being killed at any moment. Source: ours.

A snapshot on disk and the stream's position belong together: every update up to the position is in, none after it. After a kill
`resume` reads the newest complete snapshot, and the caller replays the stream from `position + 1`. Updates that are in already
are passed over, a gap is refused.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aif_jax.checkpoint import METADATA_FILE, CheckpointError
from aif_jax.index.files import inspect, load
from aif_jax.index.item_index import ItemIndex
from aif_jax.model import PreRanker
from aif_jax.types import ItemFeatures, Params

SNAPSHOT = re.compile(r"[0-9]{10}")
PART = re.compile(SNAPSHOT.pattern + r"(\.orbax-checkpoint-tmp.*)?")  # Orbax gives a folder its name when it is complete


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One entry of the update stream.

    Attributes:
      position: in the stream; each entry's is one more than that of the entry before.
      ids: of the items that change, integers or strings [n].
      features: what they are now, leading axis [n]; None deletes them.
    """

    position: int
    ids: Any
    features: ItemFeatures | None = None


class IndexWriter:
    """Applies updates in order, and saves a snapshot every so many updates or seconds.

    One thread applies; `index` may be read from any. A snapshot takes time that grows with the table; with `submit` it is
    written elsewhere while updates go on.

    Args:
      directory: of the snapshots; must not hold any yet, see `resume`. The first one is written at once.
      index: to start from.
      position: of the last update that is in `index`.
      every_updates: stream entries between two snapshots; None leaves it to time.
      every_seconds: between two snapshots, looked at when an update comes; None leaves it to the count.
      keep: how many snapshots stay; at least 1.
      submit: runs the saving of a snapshot, such as `ThreadPoolExecutor(1).submit`: what it returns must have `result()`.
        None saves before `apply` returns.
      clock: seconds, monotonic.

    Raises:
      FileExistsError: there are snapshots in `directory`.
      ValueError: a number out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        index: ItemIndex,
        *,
        position: int = 0,
        every_updates: int | None = 1000,
        every_seconds: float | None = None,
        keep: int = 3,
        submit: Callable[[Callable[[], None]], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._configure(
            directory, index, position, every_updates=every_updates, every_seconds=every_seconds, keep=keep, submit=submit,
            clock=clock,
        )  # fmt: skip
        if found := snapshots(self.directory):
            raise FileExistsError(f"{self.directory}: holds {len(found)} snapshots already; use IndexWriter.resume")
        self.snapshot()
        self.wait()

    def _configure(
        self, directory: str | Path, index: ItemIndex, position: int, *, every_updates: int | None = 1000,
        every_seconds: float | None = None, keep: int = 3, submit: Callable[[Callable[[], None]], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        for name, value in (("every_updates", every_updates), ("every_seconds", every_seconds), ("keep", keep)):
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        self.directory = Path(directory).absolute()
        self._index = index
        self._position = position
        self._every_updates = every_updates
        self._every_seconds = every_seconds
        self._keep = keep
        self._submit = submit
        self._clock = clock
        self._saved_position = position
        self._saved_at = clock()
        self._saving: Any = None
        self._next = 0  # number of the next snapshot
        self._pushing: list[Update] | None = None

    @classmethod
    def resume(
        cls, directory: str | Path, model: PreRanker, params: Params, *, version: str | None = None, mesh: Any = None,
        **options: Any,
    ) -> IndexWriter:  # fmt: skip
        """A writer that goes on from the newest complete snapshot of a directory.

        Args:
          directory: of an earlier writer.
          model, params, version, mesh: as in `ItemIndex.load`.
          options: `every_updates`, `every_seconds`, `keep`, `submit`, `clock`, as for a new writer.

        Returns:
          the writer; replay the stream from `writer.position + 1`.

        Raises:
          FileNotFoundError: no complete snapshot there.
          CheckpointError: the newest snapshot was altered; names it, and the one before it.
          VersionMismatch, ValueError: it belongs to another model.
        """
        directory = Path(directory).absolute()
        found = snapshots(directory)
        if not found:
            raise FileNotFoundError(f"{directory}: no complete snapshot of an index")
        try:
            index = load(found[-1], model, params, version=version, mesh=mesh)
        except CheckpointError as error:
            if len(found) > 1:
                error.add_note(f"Without that folder the writer would resume from {found[-2]}.")
            raise
        writer = cls.__new__(cls)
        writer._configure(directory, index, inspect(found[-1]).position, **options)
        writer._next = int(found[-1].name) + 1
        for left in directory.iterdir():  # what a kill in the middle of a save or a removal left
            if PART.fullmatch(left.name) and left not in found:
                shutil.rmtree(left, ignore_errors=True)
        return writer

    @property
    def index(self) -> ItemIndex:
        """The latest snapshot."""
        return self._index

    @property
    def position(self) -> int:
        """Of the last update that is in `index`."""
        return self._position

    @property
    def saved_position(self) -> int:
        """Of the last update that is on disk, or on its way there."""
        return self._saved_position

    def apply(self, update: Update) -> bool:
        """Applies one update, unless it is in already.

        Returns:
          whether it was applied; False for a position that is not after `position`.

        Raises:
          ValueError: a gap in the stream, or features that do not fit; nothing has changed then.
        """
        if update.position <= self._position:
            return False
        if update.position > self._position + 1:
            raise ValueError(
                f"update stream: expected position {self._position + 1}, got {update.position}: updates are missing"
            )
        self._index = _applied(self._index, update)
        self._position = update.position
        if self._pushing is not None:
            self._pushing.append(update)
        if self._due():
            self.snapshot()
        return True

    def snapshot(self) -> None:
        """Saves the latest snapshot now and removes the oldest ones beyond `keep`."""
        self.wait()
        index, position, path = self._index, self._position, self.directory / f"{self._next:010d}"
        if self._submit is None:
            self._save(index, position, path)
        else:
            self._saving = self._submit(lambda: self._save(index, position, path))
        self._next, self._saved_position, self._saved_at = self._next + 1, position, self._clock()

    def wait(self) -> None:
        """Waits for the snapshot that is being saved, and raises what went wrong with it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def begin_push(self) -> None:
        """From here on updates are also kept for a new version that is being built.

        Build it beside the old one, in any thread, from a catalogue that is at least as new as `position` is now; then hand it
        to `finish_push`. Until then the old version goes on.
        """
        self._pushing = []

    def finish_push(self, index: ItemIndex) -> ItemIndex:
        """Brings a new version up to the stream's position and makes it the latest snapshot, which is saved.

        The old version stays readable as long as someone holds a snapshot of it.

        Args:
          index: built from the new parameters after `begin_push`.

        Returns:
          the new version with the updates that came meanwhile.

        Raises:
          RuntimeError: no push was begun.
        """
        if self._pushing is None:
            raise RuntimeError("finish_push: expected begin_push before it")
        for update in self._pushing:
            index = _applied(index, update)
        self._index, self._pushing = index, None
        self.snapshot()
        return index

    def close(self) -> None:
        """Saves what is not on disk yet, and waits for it."""
        if self._saved_position < self._position:
            self.snapshot()
        self.wait()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due(self) -> bool:
        by_count = self._every_updates is not None and self._position - self._saved_position >= self._every_updates
        return by_count or (self._every_seconds is not None and self._clock() - self._saved_at >= self._every_seconds)

    def _save(self, index: ItemIndex, position: int, path: Path) -> None:
        index.save(path, position=position)
        for old in snapshots(self.directory)[: -self._keep]:
            (old / METADATA_FILE).unlink()  # first, so that a kill in between leaves no folder that looks complete
            shutil.rmtree(old)


def snapshots(directory: str | Path) -> list[Path]:
    """The complete snapshots in a writer's directory, oldest first."""
    folders = Path(directory).absolute().glob("[0-9]*")
    return sorted(f for f in folders if SNAPSHOT.fullmatch(f.name) and (f / METADATA_FILE).is_file())


def _applied(index: ItemIndex, update: Update) -> ItemIndex:
    return index.delete(update.ids) if update.features is None else index.upsert(update.ids, update.features)
