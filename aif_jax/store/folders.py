"""Folders and files that appear complete or not at all, also after a power cut; folders disappear at once.

Contents are written into a hidden work folder in the same directory, forced to disk, and renamed. The work folder of a killed
process is removed by the next `new_folder` of the name, or by `remove_unfinished`; that of a running one is locked and stays.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

WORK = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.partial")  # as `tempfile.mkdtemp` names work folders
OWNER = ".owner"  # file that a `WriteLock` locks, and says whose it is
METADATA_FILE = "_CHECKPOINT_METADATA"  # a folder that holds one is a checkpoint or a snapshot; Orbax writes it last
DAYS = 14  # compiled programs that no run used for so long are removed
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a `Path` of a URL has lost the other


class CheckpointError(ValueError):
    """A folder that is torn, altered, or not one of this library."""


class WriterConflict(RuntimeError):
    """Another writer has the directory, or this one is closed."""


class WriteLock:
    """The lock of a directory's only writer, held from here until `close`, its last reference, or the end of the process.

    Raises:
      WriterConflict: another writer has the directory; says which process on which host.
      OSError: a file system without locks.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / OWNER, os.O_CREAT | os.O_RDWR, 0o644)
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 1024).decode(errors="replace") or "another process"
            self.close()
            raise WriterConflict(f"{directory}: {owner} is writing here; stop it first") from None
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {since})".encode())


def local(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Return the absolute path of a local file or folder; ValueError for a URL, which would become a folder's name."""
    if URL.match(os.fspath(path)):
        where, hint = redacted(os.fspath(path)), "aif_jax.connectors.SnapshotStore copies there"
        raise ValueError(f"{name}: expected a local path, got the URL {where!r}; {hint}")
    return Path(path).absolute()


def redacted(url: str) -> str:
    """Return a URL without what may be a secret: "redis://***@host:6379/0?***"."""
    return re.sub(r"\?.*", "?***", re.sub(r"(?<=:/)(/?).*@", r"\1***@", url), flags=re.S)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder, which gets the name `path` when the block ends well and is removed when the block raises.

    Raises:
      FileExistsError: something is at `path`, before or after the block; it stays as it is.
      ValueError: a URL.
    """
    target = local(path)
    expect_nothing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(target) as work:
        partial = work / target.name
        partial.mkdir()
        yield partial
        for root, _, files in os.walk(partial):
            for path in (*(os.path.join(root, name) for name in files), root):
                sync(path)
        expect_nothing(target)
        try:
            os.rename(partial, target)
        except OSError:  # another process had the name first, after the check
            expect_nothing(target)
            raise
        sync(target.parent)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield where to write a file, which gets the name `path` when the block ends well and is removed when the block raises.

    A kill or a power cut leaves the old file or the new one, whole. A device, a pipe or a socket at `path` stays: the contents
    are written into it. FileNotFoundError for a missing folder, IsADirectoryError for a folder at `path`, ValueError for a URL.
    """
    target = local(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield target
        return
    with _work_folder(target) as work:
        yield work / target.name
        sync(work / target.name)
        os.replace(work / target.name, target)
        sync(target.parent)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, or replace it: whole and on disk when this returns; see `new_file`."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder: its name goes first, so a kill leaves no half of it. Raises FileNotFoundError where nothing is."""
    target = local(path)
    with _work_folder(target) as work:
        os.rename(target, work / target.name)


def unfinished(path: Path) -> str:
    """Return, for a message that says that nothing is at `path`, the first work folder for it; "" without one."""
    hint = "is being written, or was left by a save that was killed"
    return next((f"; {folder} {hint}" for folder, name in _work_folders(path.parent) if name == path.name), "")


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
    """Remove the work folders that killed processes left in a directory, whatever name they were for."""
    for folder, _ in _work_folders(local(directory)):
        _clean(folder)


def sync(path: str | Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _work_folders(directory: Path) -> list[tuple[Path, str]]:
    """Return the work folders in a directory, each with the name that it is for."""
    matches = [(folder, WORK.fullmatch(folder.name)) for folder in sorted(directory.glob(".*.partial"))]
    return [(folder, match[1]) for folder, match in matches if match]


def expect_nothing(target: Path) -> None:
    """Raise FileExistsError where something is at a path."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: expected a new folder, but something is there; name another, or remove it")


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """Make a work folder, locked until the block or the process ends, and then removed; those of killed processes go first."""
    for leftover, name in _work_folders(target.parent):
        if name == target.name:
            _clean(leftover)
    while True:  # until no other process takes the folder for a leftover before it is locked
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: there nobody removes the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.lexists(work):
            break
        os.close(lock)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _clean(leftover: Path) -> None:
    """Remove a work folder unless its process still runs."""
    with contextlib.suppress(OSError):  # its process still runs, another was faster, or the file system has no locks
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def compiled_folder(name: str = "aif_jax") -> Path:
    """Return the folder of compiled programs for this JAX on this machine, in the folder `name` of the user's cache directory.

    Removes programs of any version that no run used for DAYS. Raises OSError if it cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
    features = hashlib.sha256(cpu_features().encode()).hexdigest()[:8]
    folder = cache / f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{platform.machine()}-{features}"  # pyright: ignore[reportPrivateImportUsage]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in cache.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another run was faster
                if time.time() - max(path.stat().st_atime, path.stat().st_mtime) > DAYS * 86_400 and path.is_file():
                    path.unlink()
    except OSError as error:
        got = f"{folder} ({error}). Name another: JAX_COMPILATION_CACHE_DIR=FOLDER"
        raise OSError(f"compiled programs: expected a folder that can be written, got {got}") from error
    return folder


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's features, on which compiled programs rely, or its name if the system lists none."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()
