"""A local folder of exports kept like a snapshot store, for a service that follows it: `aif-jax serve s3://bucket/model`."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.service.folder import publish

logger = logging.getLogger(__name__)


class Mirror:
    """Downloads what is current in a store and names it in the folder's file `current`, at once and whenever it changes.

    A snapshot is fetched whole and verified before it is named. What goes wrong is logged, and the versions before go on.

    Args:
      store: of exports.
      folder: local, made where it is missing; one process at a time mirrors into it.
      keep: exports that stay in the folder.
      poll: seconds between two looks at the store.

    Example:
      >>> import tempfile
      >>> root = Path(tempfile.mkdtemp())
      >>> (root / "export").mkdir()
      >>> _ = (root / "export" / "manifest.json").write_text("{}")
      >>> store = SnapshotStore(root / "store")
      >>> name = store.publish(root / "export")
      >>> mirror = Mirror(store, root / "here")
      >>> mirror.update() == name, (root / "here" / "current").read_text() == name + "\\n"
      (True, True)
    """

    def __init__(self, store: SnapshotStore, folder: str | Path, *, keep: int = 3, poll: float = 1.0):
        expect(keep >= 1, "keep", "at least 1", keep)
        expect(poll > 0, "poll", "more than 0 seconds", poll)
        self.store, self.folder, self.failures = store, Path(folder), 0
        self._keep, self._poll = keep, poll
        self._name: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self) -> str:
        """Fetches the current export, if it is another one; returns its name. Raises what `SnapshotStore.fetch` raises."""
        if self._name is None or self.store.current() != self._name:
            fetched = self.store.fetch(self.folder)
            publish(self.folder, [fetched.name])
            self._name = fetched.name
            self._remove_old()
        return self._name

    def __enter__(self) -> Mirror:
        """Fetches what is current and follows in a thread."""
        self.update()
        self._thread = threading.Thread(target=self._follow, name="aif-mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._poll):
            try:
                self.update()
            except Exception as error:  # of a store that is elsewhere: what serves goes on
                self.failures += 1
                logger.error("%s: not fetched, the versions before go on: %s: %s", self.store.url, type(error).__name__, error)

    def _remove_old(self) -> None:
        """Removes exports of the store beyond `keep`; those that serve are in memory."""
        names = sorted(name for name in self.store.names_in(self.folder) if name != self._name)
        for name in names[: max(0, len(names) - (self._keep - 1))]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
