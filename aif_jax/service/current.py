"""Which exports of a folder serve: its file `current`, not a store's, which `publish` writes and services of the folder read.

    root/current                     a line for each version that serves: FOLDER [sha256=DIGEST] [share=0.1]
    root/2026-11-26/                 an export, as `export.save` wrote it

The first line has the share that the others leave. The file is replaced by one rename: read whole or not at all.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.store.folders import new_file
from aif_jax.store.sealed import MANIFEST

CURRENT = "current"
CURRENT_BYTES = 1 << 16
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")
MIRRORED = 3  # exports that stay in the folder of a mirror
DIGEST = re.compile(r"[0-9a-f]{64}")


class ExportEntry(NamedTuple):
    """One version that serves.

    Attributes:
      folder: name of the export within the served folder; "" for the served folder itself.
      sha256: digest that `export.save` returned, which pins every byte; None takes any.
      share: share of the users, 0 to 1; `publish` gives the rest to its first entry.
    """

    folder: str
    sha256: str | None = None
    share: float = 0.0


def read_current(root: Path) -> list[ExportEntry]:
    """Return the versions that serve: the root where it is an export, else those in `current`.

    Raises:
      FileNotFoundError: neither an export nor a file `current`.
      ValueError: names that are no plain folder names, digests or shares that are none, shares of more than 1.
    """
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
    """Return the versions that a file `current` names; raises as `read_current`."""
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
    rest = round(1.0 - sum(entry.share for entry in entries[1:]), 9)
    expect(rest >= 0, CURRENT, "shares of at most 1 in all", 1.0 - rest)
    return [entries[0]._replace(share=max(0.0, rest)), *entries[1:]]


def publish(root: str | Path, entries: Sequence[ExportEntry | str]) -> None:
    """Say which folders of `root` serve from now on; services that follow it load, verify and swap.

    Args:
      entries: folder names, or `ExportEntry`s with digest and share; the first has the share that the others leave.

    Raises:
      FileNotFoundError: a folder that is no export.
      TypeError: a lone entry, names that are no text, shares that are no numbers.
      ValueError: as `read_current`.
    """
    root, lines = Path(root), []
    listed = [entry if isinstance(entry, ExportEntry) else ExportEntry(entry) for entry in entries]
    plain = not isinstance(entries, str | ExportEntry)  # each a sequence itself
    fits = plain and all(isinstance(entry.folder, str) and isinstance(entry.share, int | float) for entry in listed)
    expect(fits, "entries", "a list of folder names, or of ExportEntry with numbers as shares", repr(entries), error=TypeError)
    for entry in listed:
        if not (root / entry.folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{root / entry.folder}: expected an exported folder, got none; write one: aif-jax export")
        words = [f"sha256={entry.sha256}"] if entry.sha256 else []
        lines.append(" ".join([entry.folder, *words, *([f"share={entry.share:.6f}"] if entry.share and lines else [])]))
    text = "\n".join(lines) + "\n"
    parse_current(text)
    with new_file(root / CURRENT) as partial:
        partial.write_text(text)
        partial.chmod(0o644)


def mirror(store: SnapshotStore, folder: str | Path) -> str:
    """Fetch what is current in a store, verified, and name it in the folder's file `current`; returns its name.

    The last `MIRRORED` exports stay in the folder. One process at a time mirrors into it. Raises as `SnapshotStore.fetch`.
    """
    root, name = Path(folder), store.fetch(folder, keep=MIRRORED).name  # those that serve are in memory
    if not (root / CURRENT).is_file() or [entry.folder for entry in read_current(root)] != [name]:
        publish(root, [name])
    return name
