"""Folders that appear complete or not at all, and disappear at once.

`new_folder` is the only place of the package that gives a finished folder its name. Contents are written into a hidden work
folder in the same directory, forced to disk, and renamed. A killed process leaves its work folder, which the next `new_folder`
of the same name removes, or `remove_unfinished` for all names in a directory. The work folder of a process that still runs is
locked and stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

WORK = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.partial")  # as `tempfile.mkdtemp` names work folders
OLD = ".old"  # ends the name of the folder that `exist="replace"` moved into the work folder
AT_CURRENT_FOLDER, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, exist: Literal["error", "replace"] = "error") -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends well and is removed when the block raises.

    Files and folders are forced to disk before the rename, so no half-written folder ever has the name, not even after a
    power cut. The yielded folder is alone in its parent: scratch files may go to `partial.parent` and vanish with it.

    Args:
      path: the folder that appears; its parents are made.
      exist: "error" refuses a path where something is; "replace" removes the old folder once the new one has its name. Linux
        swaps the two in one step where the file system can; elsewhere the name is missing for a moment.

    Yields:
      An empty folder on the same file system.

    Raises:
      FileExistsError: something is at `path`, before or after the block; it stays as it is.
      NotADirectoryError: `exist="replace"` and `path` is not a folder.

    Example:
      >>> import tempfile
      >>> target = Path(tempfile.mkdtemp()) / "model"
      >>> with new_folder(target) as partial:
      ...     _ = (partial / "weights").write_text("1 2 3")
      ...     target.exists()
      False
      >>> [file.name for file in target.iterdir()]
      ['weights']
    """
    if exist not in ("error", "replace"):
        raise ValueError(f"exist: expected 'error' or 'replace', got {exist!r}")
    target = Path(path).absolute()
    _check_target(target, exist)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in unfinished(target):
        _clean(leftover, target)
    work, lock = _work_folder(target)
    try:
        partial = work / target.name
        partial.mkdir()
        yield partial
        _sync(partial)
        _check_target(target, exist)
        if exist == "replace" and target.is_dir():
            _replace(partial, target)
        else:
            _rename(partial, target)
        _sync_one(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder: its name goes first, so that a kill in between leaves no folder with half of its files.

    Raises:
      FileNotFoundError: nothing is there.
    """
    target = Path(path).absolute()
    work, lock = _work_folder(target)
    try:
        os.rename(target, work / target.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def unfinished(path: str | os.PathLike[str]) -> list[Path]:
    """Work folders for `path`: of a process that is writing it now, or of one that was killed."""
    target = Path(path).absolute()
    return [folder for folder, name in _work_folders(target.parent) if name == target.name]


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
    """Removes the work folders that killed processes left in a directory, whatever name they were for."""
    for folder, name in _work_folders(Path(directory).absolute()):
        _clean(folder, folder.with_name(name))


def _work_folders(directory: Path) -> list[tuple[Path, str]]:
    """Work folders in a directory, each with the name that it is for."""
    if not directory.is_dir():
        return []
    matches = [(folder, WORK.fullmatch(folder.name)) for folder in sorted(directory.iterdir())]
    return [(folder, match[1]) for folder, match in matches if match]


def _check_target(target: Path, exist: str) -> None:
    if exist == "error" and os.path.lexists(target):
        raise FileExistsError(f"{target}: expected a new folder, but something is there; it stays as it is")
    if os.path.lexists(target) and not target.is_dir():
        raise NotADirectoryError(f"{target}: expected a folder to replace, got something else; it stays as it is")


def _rename(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)
    except OSError:
        _check_target(target, "error")  # another process was faster
        raise


def _replace(partial: Path, target: Path) -> None:
    if not _exchange(partial, target):
        os.rename(target, partial.with_name(target.name + OLD))
        os.rename(partial, target)


def _work_folder(target: Path) -> tuple[Path, int]:
    """A new work folder and its lock, which the kernel releases when the process ends, however it ends."""
    while True:  # until no other process takes the folder for a leftover before it is locked
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: there nobody removes the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.lexists(work):
            return work, lock
        os.close(lock)


def _clean(leftover: Path, target: Path) -> None:
    """Removes a work folder unless its process still runs; finishes a replacement that was killed between its two renames."""
    try:
        descriptor = os.open(leftover, os.O_RDONLY)
    except FileNotFoundError:
        return  # its process, or another that cleans, was faster
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (leftover / (target.name + OLD)).is_dir() and not os.path.lexists(target):
            os.rename(leftover / target.name, target)
        shutil.rmtree(leftover, ignore_errors=True)
    except OSError:
        return  # its process still runs, or the file system has no locks
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; False where the platform or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(AT_CURRENT_FOLDER, os.fsencode(first), AT_CURRENT_FOLDER, os.fsencode(second), EXCHANGE) == 0


def _sync(folder: Path) -> None:
    """Forces a folder and everything in it to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
