"""One writer for a directory: a lock with an owner, whose number rises with every owner.

Every owner claims the next number by making the file `.owner-NUMBER`, and locks it until it ends, however it ends. Where a lock
says nothing (no locks, a takeover), the highest number owns the directory, and a writer checks that at every save.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLAIM = re.compile(r"\.owner-(\d+)")


class WriterConflict(RuntimeError):
    """Another writer owns the directory: a second one is refused, the one that lost it saves nothing more."""


class Lease:
    """The right to write into a directory, until `release` or the end of object or process; `number` is 0 before `take`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.number = 0
        self._close: Callable[[], Any] = lambda: None

    def take(self, *, above: int = 0, takeover: bool = False) -> None:
        """Becomes the owner, with a number above `above`; `takeover` takes it from a living owner. WriterConflict otherwise."""
        self.directory.mkdir(parents=True, exist_ok=True)
        before = self._claims()
        last = max(before, default=0)
        if last and not takeover and _locked(before[last]):
            raise WriterConflict(f"{self.directory}: {_described(before[last], last)} is writing here; stop it first")
        number = max(last, above) + 1
        path = self.directory / f".owner-{number:06d}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            raise WriterConflict(f"{self.directory}: another writer has just started") from None
        self._close = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # a file system without locks: there the number alone decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        self.number = number
        self.check()
        for path in before.values():
            path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises WriterConflict unless this is the owner."""
        if not self.number:
            raise WriterConflict(f"{self.directory}: this writer is closed")
        claims = self._claims()
        last = max(claims, default=0)
        if last > self.number:
            owner = _described(claims[last], last)
            raise WriterConflict(f"{self.directory}: {owner} took over; this writer (owner {self.number}) saves no more")

    def release(self) -> None:
        """Lets the next owner in."""
        self.number = 0
        self._close()

    def _claims(self) -> dict[int, Path]:
        matches = ((CLAIM.fullmatch(path.name), path) for path in self.directory.iterdir())
        return {int(match[1]): path for match, path in matches if match}


def _locked(path: Path) -> bool:
    """Whether the process that made a claim holds it."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks: not held
            return isinstance(error, BlockingIOError)
    return False


def _described(path: Path, number: int) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['process']} on {owner['host']} (owner {number}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"owner {number}"
