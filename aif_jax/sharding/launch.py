"""Starts the processes of one job on this host, and ends all when one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

GRACE = 10.0  # seconds for processes to end by themselves once one has failed


def start(command: Callable[[str, int], Sequence[str]], count: int, **options: object) -> list[subprocess.Popen]:
    """Starts `count` processes.

    Args:
      command: (address of the coordinator, index of the process) to the words of its command.
      count: processes.
      options: keyword arguments of `subprocess.Popen`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started: list[subprocess.Popen] = []
    try:
        for index in range(count):
            started.append(subprocess.Popen(list(command(address, index)), **options))  # type: ignore[arg-type]
    except BaseException:
        stop(started)
        raise
    return started


def wait(started: Sequence[subprocess.Popen], *, grace: float = GRACE) -> int:
    """Waits for all; when one fails the others get `grace` seconds, to say why they fail too, and are killed.

    Returns:
      0, or the exit code of the first that failed, which stderr names; 128 + n for one that signal n ended.
    """
    first, deadline = 0, None
    try:
        while any(process.poll() is None for process in started):
            failed = [index for index, process in enumerate(started) if process.poll()]
            if failed and deadline is None:
                code = started[failed[0]].returncode
                how = f"signal {-code} ended it" if code < 0 else f"exit code {code}"
                print(f"error: process {failed[0]} of {len(started)}: {how}; all are stopped", file=sys.stderr)
                first, deadline = (128 - code if code < 0 else code), time.monotonic() + grace
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in started]
        return first or next((128 - code if code < 0 else code for code in codes if code), 0)
    finally:
        stop(started)


def stop(started: Sequence[subprocess.Popen]) -> None:
    """Kills those that run: a process of `jax.distributed` ignores SIGTERM until its next step."""
    for process in started:
        if process.poll() is None:
            process.kill()
    for process in started:
        process.wait()


def end_with(parent: int) -> None:
    """Ends this process when its parent, of that id, is gone; looks once a second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="aif_jax.parent", daemon=True).start()
