"""`SnapshotStore`: folders on any file system of fsspec (a disk, S3, ...), with a pointer to the current one.

    root/current                       the name of a snapshot and the checksum of its manifest; moved by one atomic write
    root/0000000007-3f9ab2c1/snapshot-manifest.json      SHA-256 and time of every file, written last
    root/0000000007-3f9ab2c1/...                the files, under a name that nothing else ever writes to

A snapshot is never changed, so a reader sees the one that was current when it came, whole, or a later one.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from aif_jax.checks import ArgumentError, expect, expect_integer, needs_extra
from aif_jax.store.folders import local, new_folder, redacted, remove_unfinished, write_file
from aif_jax.store.sealed import digest_of

NAME = re.compile(r"(\d{10})-[0-9a-f]{8}")
FORMAT = "aif_jax.snapshot_store/1"
MANIFEST, CURRENT = "snapshot-manifest.json", "current"  # an export has a manifest.json itself
UNDONE = "rolled-back"  # an empty file in a snapshot that stays out
MODIFIED = "modified_ns"  # when a file was written, in the manifest
PLAIN = re.compile(r"(?!\.\.?\Z)[^\\\0]{1,255}")  # a part of the path of a file
PATH_BYTES = 1024  # of a path: what object stores take
RECORD_BYTES = 64 << 20  # of a manifest
Method = TypeVar("Method", bound=Callable[..., Any])
TRIES = 3  # of a fetch whose snapshot is removed in the middle
logger = logging.getLogger(__name__)


class SnapshotError(ValueError):
    """A store, or a snapshot in it, that is torn, altered or not one of this library."""


class Pointer(NamedTuple):
    """Parsed content of the file `current`."""

    name: str  # of the snapshot
    sha256: str  # of its manifest; "" takes any


def _raises_os_error(method: Method) -> Method:
    """Let a method of a store raise OSError for what its client raises, such as for a bucket that is away."""

    @functools.wraps(method)
    def translated(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (OSError, ValueError, TypeError):
            raise
        except Exception as error:
            raise OSError(f"{self.url}: cannot be read or written: {type(error).__name__}: {error}") from error

    return cast(Method, translated)


class SnapshotStore:
    """Publishes folders (exports, snapshots of indexes) and fetches the current one.

    One store holds one series of folders; use one for each kind. One process at a time publishes: two never mix files, and the
    one that sees a later pointer is refused. Any number of processes fetch meanwhile.

    Args:
      url: url of the store: a local path, "s3://bucket/index", or what else fsspec knows.
      keep: how many snapshots stay, the current one among them.
      options: keyword arguments of the file system, such as `key`, `secret`, `endpoint_url`; no message shows them.

    Raises ImportError: fsspec, or the package of this file system, is missing; ValueError: numbers out of range.

    Example:
      >>> import tempfile
      >>> root = Path(tempfile.mkdtemp())
      >>> (root / "made").mkdir()
      >>> _ = (root / "made" / "rows").write_text("1 2 3")
      >>> store = SnapshotStore(root / "store")
      >>> name = store.publish(root / "made")
      >>> (store.fetch(root / "here") / "rows").read_text(), store.current() == name
      ('1 2 3', True)
    """

    def __init__(self, url: str | os.PathLike[str], *, keep: int = 3, **options: Any):
        expect(keep >= 1, "keep", "at least 1", keep)
        self.url, self.keep = redacted(os.fspath(url)), keep
        with needs_extra(f"a snapshot store at {self.url} needs fsspec and the package of its file system", "store"):
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(os.fspath(url), **options)
        self._root = self._root.rstrip("/")
        self._on_disk = "file" in ([p] if isinstance(p := self._files.protocol, str) else p)
        self.folder = Path(self._root) if self._on_disk else None

    def __repr__(self) -> str:
        return f"SnapshotStore({self.url!r}, keep={self.keep})"

    @_raises_os_error
    def publish(self, folder: str | os.PathLike[str], *, unless_current: bool = False) -> str:
        """Upload a folder, verify it, make it the current snapshot, and remove those beyond `keep`; returns its name.

        A kill at any moment leaves the snapshot that was current before, or the new one.

        Args:
          folder: local folder with at least one file.
          unless_current: where the current snapshot, or a complete one after it, has the same files, make that current and
            return its name: a caller that was killed while it published calls again and publishes once. Not one rolled back.

        Raises:
          FileNotFoundError: no such folder, or one that changes meanwhile.
          ValueError: the name or time of a file is none that a store takes.
          SnapshotError: what was uploaded reads back as something else; a later one is current; `unless_current` of a rollback.
          OSError: of the file system or the network.
        """
        source = local(folder, "folder")
        files = sorted(path for path in source.rglob("*") if path.is_file())
        expect(files, f"{source}", "a folder with files", "none; give an export or a snapshot", error=FileNotFoundError)
        mine = f"a folder without a file {MANIFEST!r}, which the store writes"
        expect(not (source / MANIFEST).exists(), str(source), mine, "one; remove it")
        entries: dict[str, dict[str, Any]] = {}
        for file in files:
            relative = file.relative_to(source).as_posix()
            entries[relative] = {"sha256": digest_of(file), MODIFIED: file.stat().st_mtime_ns}
        _expect_readable(entries)
        if unless_current:
            there, digests = self._pointer(), {file: entry["sha256"] for file, entry in entries.items()}
            for name in [name for name in self.names() if there is None or name >= there.name]:
                manifest, listed = self._manifest(name)
                if {file: entry["sha256"] for file, entry in listed.items()} == digests:
                    if there is None or name != there.name:
                        got, out = f"those of {name}, which was", "publish newer ones, or these by themselves"
                        stays = not self._files.exists(self._path(name, UNDONE))
                        expect(stays, self.url, "files that were not rolled back", f"{got}; {out}", error=SnapshotError)
                        self._point(name, manifest)
                    return name
        numbers = [int(name.partition("-")[0]) for name in (*self._listed(), self.current() or "0")]  # complete or not
        name = f"{1 + max(numbers):010d}-{secrets.token_hex(4)}"
        for file, relative in zip(files, entries, strict=True):
            place = self._path(name, relative)
            self._make_parent(place)
            self._files.put_file(str(file), place)
        for relative, entry in entries.items():
            with self._files.open(self._path(name, relative), "rb") as uploaded:
                self._expect_same(name, relative, entry, hashlib.file_digest(uploaded, "sha256").hexdigest())
        manifest = json.dumps({"format": FORMAT, "files": entries}, indent=1, sort_keys=True).encode()
        self._put(self._path(name, MANIFEST), manifest)
        before = self._pointer()
        if before is not None and before.name > name:
            raise SnapshotError(f"{self.url}: expected the current snapshot before {name}, got {before.name}; publish again")
        for undone in [other for other in self.names() if before is not None and before.name < other < name]:
            self._files.rm_file(self._path(undone, MANIFEST))  # rolled back, or never current: no rollback may meet it
        self._point(name, manifest)
        self._remove_old(name)
        return name

    @_raises_os_error
    def rolled_back(self, file: str) -> dict[str, bytes]:
        """Return a small file of each complete snapshot after the current one that `rollback` took out of use, if it has it."""
        current = self.current()
        later = {name: files for name, files in self._listed().items() if current is not None and name > current}
        return {name: self._read(name, file) for name, files in later.items() if {UNDONE, MANIFEST, file} <= files}

    @_raises_os_error
    def rollback(self) -> str:
        """Make the complete snapshot before the current one current again; returns its name.

        Readers follow as they follow a publish. The snapshot that was current stays until the next publish, which removes it.

        Raises:
          FileNotFoundError: an empty store, or none before the current one any more (`keep`).
          SnapshotError: the manifest of the snapshot before is torn or altered.
          OSError: of the file system or the network.
        """
        current = self.current()
        before = [name for name in self.names() if current is not None and name < current]
        if current is None or not before:
            few = f"none before {current}, which stays current; publish with a larger keep"
            got = "an empty store; publish first" if current is None else few
            raise FileNotFoundError(f"{self.url}: expected a snapshot to go back to, got {got}")
        manifest, _ = self._manifest(before[-1])
        self._put(self._path(current, UNDONE), b"")
        self._point(before[-1], manifest)
        return before[-1]

    @_raises_os_error
    def fetch(self, directory: str | os.PathLike[str], name: str | None = None, *, keep: int | None = None) -> Path:
        """Download a snapshot into `directory/NAME`, which appears complete or not at all; returns that path.

        A folder of that name is returned as it is, with the time of now: the last one fetched has the latest. What killed
        fetches left is removed.

        Args:
          directory: a local folder, made where it is missing; one process at a time fetches into it.
          name: name of the snapshot; None: the current one.
          keep: how many fetched snapshots stay, those fetched last; None: all.

        Raises:
          FileNotFoundError: an empty store, or no such snapshot (any more).
          SnapshotError: torn or altered.
          OSError: of the file system or the network.
        """
        target = local(directory, "directory")
        keep = None if keep is None else expect_integer(keep, "keep", least=1)
        for _ in range(TRIES):  # where a snapshot is removed meanwhile, there are newer ones
            wanted = self._pointer() if name is None else Pointer(name, "")
            if wanted is None:
                raise FileNotFoundError(f"{self.url}: expected a store with a current snapshot, got none; publish one")
            expected = "the name of a snapshot, such as '0000000007-3f9ab2c1'"
            expect(NAME.fullmatch(wanted.name), "name", expected, repr(name), error=ArgumentError)
            with contextlib.suppress(FileNotFoundError):
                found = self._fetch(target, wanted)
                for old in fetched(target)[:-keep] if keep else ():
                    shutil.rmtree(old, ignore_errors=True)
                return found
        got = "none or a part of it; name another"
        raise FileNotFoundError(f"{self.url}: expected the snapshot {name or self.current()}, got {got}")

    @_raises_os_error
    def current(self) -> str | None:
        """Return the name of the current snapshot; None for an empty store."""
        pointer = self._pointer()
        return None if pointer is None else pointer.name

    @_raises_os_error
    def names(self) -> list[str]:
        """Return the names of all complete snapshots, oldest first."""
        return [name for name, files in self._listed().items() if MANIFEST in files]

    def _remove_old(self, current: str) -> None:
        """Remove older snapshots beyond `keep`, and interrupted uploads; failures are logged, the next publish tries again."""
        before = {name: files for name, files in self._listed().items() if name < current}
        whole = [name for name, files in before.items() if MANIFEST in files]
        for name in sorted(before.keys() - set(whole[max(0, len(whole) - (self.keep - 1)) :])):
            try:
                if name in whole:  # the manifest first: what is left of a removal that is killed is an interrupted upload
                    self._files.rm_file(self._path(name, MANIFEST))
                self._files.rm(self._path(name), recursive=True)
            except FileNotFoundError:
                continue  # another process was faster
            except Exception as error:  # of its client: see `_raises_os_error`
                logger.warning("%s: %s was not removed, tried again next time: %s", self.url, name, type(error).__name__)

    def _fetch(self, directory: Path, wanted: Pointer) -> Path:
        remove_unfinished(directory)
        target = directory / wanted.name
        if target.is_dir():
            os.utime(target)
            return target
        _, entries = self._manifest(*wanted)
        with new_folder(target) as work:
            for relative, entry in entries.items():
                file, now = work / relative, time.time_ns()
                file.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(self._path(wanted.name, relative), str(file))
                self._expect_same(wanted.name, relative, entry, digest_of(file))
                os.utime(file, ns=(now, min(entry[MODIFIED], now)))  # how old a model is counts from its export
        return target

    def _expect_same(self, name: str, relative: str, entry: Mapping[str, Any], got: str) -> None:
        """Raise SnapshotError where the SHA-256 of a file is not that of the manifest."""
        where, wanted = f"{self.url}: {name}/{relative}", entry["sha256"]
        expect(got == wanted, where, f"sha256 {wanted}", f"{got}; publish again", error=SnapshotError)

    def _point(self, name: str, manifest: bytes) -> None:
        """Move the pointer, by one atomic write."""
        self._put(self._path(CURRENT), json.dumps(Pointer(name, hashlib.sha256(manifest).hexdigest())._asdict()).encode())

    def _manifest(self, name: str, sha256: str = "") -> tuple[bytes, dict[str, dict[str, Any]]]:
        """Return the manifest of a snapshot, which must have that checksum where one is known, and the files that it lists."""
        raw = self._read(name, MANIFEST)
        if sha256 not in ("", got := hashlib.sha256(raw).hexdigest()):
            raise SnapshotError(f"{self.url}: {name}: expected a manifest of sha256 {sha256}, got {got}; publish again")
        return raw, _entries(raw, f"{self.url}: {name}")

    def _pointer(self) -> Pointer | None:
        try:
            raw = self._read(CURRENT)
        except FileNotFoundError:
            return None
        try:
            pointer = Pointer(**json.loads(raw))
            expect(NAME.fullmatch(pointer.name) and re.fullmatch("[0-9a-f]{64}", pointer.sha256), CURRENT, "a pointer", raw)
        except (ValueError, TypeError, RecursionError) as error:
            got = f"{raw[:80]!r}; publish again"
            raise SnapshotError(f"{self.url}: {CURRENT}: expected the name of a snapshot, got {got}") from error
        return pointer

    def _listed(self) -> dict[str, set[str]]:
        """Return the files of every snapshot, complete or not, oldest first."""
        self._files.invalidate_cache()  # other processes write here
        listed: dict[str, set[str]] = {}
        for path in sorted(self._files.find(self._root)):
            name, _, relative = path.removeprefix(self._root).lstrip("/").partition("/")
            if relative and NAME.fullmatch(name):
                listed.setdefault(name, set()).add(relative)
        return listed

    def _read(self, *parts: str) -> bytes:
        """Return a small file; SnapshotError for one of more than `RECORD_BYTES`, of which nothing is read."""
        self._files.invalidate_cache()  # other processes write here
        size, where = self._files.size(self._path(*parts)) or 0, f"{self.url}: {'/'.join(parts)}"
        expect(size <= RECORD_BYTES, where, f"at most {RECORD_BYTES} bytes", f"{size}; publish again", error=SnapshotError)
        return self._files.cat_file(self._path(*parts))

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _make_parent(self, path: str) -> None:
        if self._on_disk:  # object stores have no folders
            os.makedirs(os.path.dirname(path), exist_ok=True)

    def _put(self, path: str, data: bytes) -> None:
        """Write a small file by one atomic step: object stores do so with every object, a disk by a rename."""
        if not self._on_disk:
            return self._files.pipe_file(path, data)
        self._make_parent(path)
        write_file(path, data)


def fetched(directory: Path) -> list[Path]:
    """Return the snapshots that were fetched into a folder, the last one last."""
    found = [path for path in directory.glob("*-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _entries(raw: bytes, where: str) -> dict[str, dict[str, Any]]:
    """Return the files that a manifest lists; SnapshotError for one that is torn, or whose paths lead elsewhere."""
    try:
        record = json.loads(raw)
        expect(record["format"] == FORMAT, "format", FORMAT, record["format"])
        _expect_readable(record["files"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{where}: {MANIFEST} is torn, altered or not of this library: {error!r}; publish again") from error
    return record["files"]


def _expect_readable(files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError, or another error of what is no mapping, for files that a manifest must not list."""
    for relative, entry in files.items():
        parts = relative.split("/")
        fits = all(map(PLAIN.fullmatch, parts)) and len(relative.encode()) <= PATH_BYTES
        expect(fits, "path", f"names of at most 255 characters without \\, {PATH_BYTES} bytes in all", repr(relative[:80]))
        folders = itertools.accumulate(parts[:-1], "{}/{}".format)
        expect(not files.keys() & set(folders), "path", "no file that is also a folder", relative)
        expect(re.fullmatch("[0-9a-f]{64}", entry["sha256"]), relative, "a sha256", entry)
        modified = entry[MODIFIED]
        expect(type(modified) is int and 0 <= modified < 1 << 62, relative, f"{MODIFIED} since 1970", modified)
    expect(files, "files", "at least one", files)
