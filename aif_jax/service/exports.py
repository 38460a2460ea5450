"""The served folder: one export, or several with a file `current` that says which of them serve; or the mirror of a store.

    root/current            a line for each version that serves: FOLDER [sha256=DIGEST] [share=0.1]
    root/2026-11-26/        an export, as `export.save` wrote it
    root/deltas/NAME/       deltas that build on an export or on one another, in the order of their names

The first line has the share that the others leave. The file is replaced by one rename, so a reader sees all of it or none.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.export.consume.files import MANIFEST
from aif_jax.store.folders import new_file

CURRENT = "current"
DELTAS = "deltas"
"""Folder of the deltas, in a store of exports and in a served folder, see `export.Delta`."""
CURRENT_BYTES = 1 << 16
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")
DIGEST = re.compile(r"[0-9a-f]{64}")


class ExportEntry(NamedTuple):
    """One version that serves."""

    folder: str  # its name within the root; "" for the root
    sha256: str | None = None  # of its manifest, where it is pinned
    share: float = 0.0  # of the users


def read_current(root: Path, *, only: str | None = None) -> list[ExportEntry]:
    """The versions that serve: `only` one folder, or those in `current`, or the root where it is an export.

    Raises:
      FileNotFoundError: neither an export nor a file `current`.
      ValueError: names that are no plain folder names, digests or shares that are none, shares of more than 1.
    """
    if only is not None:
        expect(PLAIN.fullmatch(only), "--version", "the name of a folder of the served one", repr(only))
        return [ExportEntry(only, share=1.0)]
    if (root / MANIFEST).is_file():
        return [ExportEntry("", share=1.0)]
    try:
        with (root / CURRENT).open("rb") as file:
            text = file.read(CURRENT_BYTES + 1).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{root}: expected an exported folder, or folders with a file {CURRENT!r}, got neither; write one: aif-jax export"
        ) from None
    return parse_current(text)


def parse_current(text: str) -> list[ExportEntry]:
    """The versions that a file `current` names; raises as `read_current`.

    Example:
      >>> parse_current("tuesday\\nwednesday share=0.25")
      [ExportEntry(folder='tuesday', sha256=None, share=0.75), ExportEntry(folder='wednesday', sha256=None, share=0.25)]
    """
    entries = []
    for line in text.splitlines():
        folder, *words = line.split()[:4] or [""]
        if not folder:
            continue
        settings: dict[str, str] = {name: value for name, _, value in (word.partition("=") for word in words)}
        expect(PLAIN.fullmatch(folder), CURRENT, "names of folders", repr(folder[:80]))
        expect(settings.keys() <= {"sha256", "share"}, CURRENT, "FOLDER [sha256=DIGEST] [share=SHARE]", repr(line[:120]))
        digest, share = settings.get("sha256"), settings.get("share", "0")
        expect(digest is None or DIGEST.fullmatch(digest), f"{CURRENT} {folder}", "a sha256 of 64 hex digits", repr(digest))
        expect(re.fullmatch(r"0?\.\d+|[01](\.0*)?", share), f"{CURRENT} {folder}", "a share in [0, 1]", repr(share))
        entries.append(ExportEntry(folder, digest, float(share)))
    names = [entry.folder for entry in entries]
    expect(entries and len(set(names)) == len(names), CURRENT, "different folders, at least one", names)
    rest = 1.0 - sum(entry.share for entry in entries[1:])
    expect(rest >= 0, CURRENT, "shares of at most 1 in all", 1.0 - rest)
    return [entries[0]._replace(share=rest), *entries[1:]]


def publish(root: str | Path, entries: Sequence[ExportEntry | str]) -> None:
    """Says which folders of `root` serve from now on; services that follow it load, verify and swap.

    Args:
      entries: folder names, or `ExportEntry`s with digest and share; the first has the share that the others leave.

    Raises:
      FileNotFoundError: a folder that is no export.
      ValueError: as `read_current`.
    """
    root, lines = Path(root), []
    for entry in (entry if isinstance(entry, ExportEntry) else ExportEntry(entry) for entry in entries):
        if not (root / entry.folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{root / entry.folder}: expected an exported folder, got none; write one: aif-jax export")
        words = [f"sha256={entry.sha256}"] if entry.sha256 else []
        lines.append(" ".join([entry.folder, *words, *([f"share={entry.share:.6f}"] if entry.share and lines else [])]))
    text = "\n".join(lines) + "\n"
    parse_current(text)
    with new_file(root / CURRENT) as partial:
        partial.write_text(text)
        partial.chmod(0o644)


def path_of(root: Path, entry: ExportEntry) -> Path:
    """The export of an entry; ValueError for a link, which could lead out of the root."""
    path = root / entry.folder
    expect(not entry.folder or not path.is_symlink(), str(path), "a folder", "a link")
    return path


logger = logging.getLogger(__name__)


class Mirror:
    """Downloads what is current in a store and names it in the folder's file `current`, at once and whenever it changes.

    A snapshot is fetched whole and verified before it is named. What goes wrong is logged, and the versions before go on.

    Args:
      folder: local, made where it is missing; one process at a time mirrors into it.

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
        self._deltas, self._delta = store.below(DELTAS), None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self) -> str:
        """Fetches the current export, if it is another one, and deltas that are new; returns the name of the export.

        Raises what `SnapshotStore.fetch` raises.
        """
        if self._name is None or self.store.current() != self._name:
            fetched = self.store.fetch(self.folder)
            publish(self.folder, [fetched.name])
            self._name = fetched.name
            self._remove_old()
        if (newest := self._deltas.current()) != self._delta:
            there, names = self.folder / DELTAS, self._deltas.names()
            for name in names:
                self._deltas.fetch(there, name)
            for name in set(self._deltas.names_in(there)) - set(names):
                shutil.rmtree(there / name, ignore_errors=True)
            self._delta = newest
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
