"""Writers of snapshots that are killed at work, again and again, and what their notes must say then."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


def killed(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    *,
    kills: int,
    pause: float,
    chance: random.Random,
    awaited: Callable[[int], tuple[str, int]] = lambda number: ("applied", 1 + 4 * number),
    before: Callable[[int, Any], None] = lambda number, process: None,
) -> Iterator[int]:
    """Runs `work(*arguments)` in processes, one after another, until one ends by itself; yields the number of each kill.

    A kill comes at random up to `pause` seconds after the process has written a word so many times into `log` as
    `awaited(number)` says, and after `before(number, process)`; from the kill of number `kills` on processes are left alone.
    """
    number = 0
    while True:
        process = CONTEXT.Process(target=work, args=arguments)
        seen = len(log.read_text()) if log.exists() else 0
        process.start()
        word, times = awaited(number)
        while process.is_alive() and not (log.exists() and log.read_text()[seen:].count(word) >= times):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, pause))
        before(number, process)
        if number < kills and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        number += 1
        yield number


def last_position(log: Path, *, first: int) -> int:
    """The position of the last update in a log with lines "start AT" and "applied AT FRESH SAVED"; checks that none was lost,
    left out or applied twice. `first`: the position before any update."""
    position = saved = first
    for line in log.read_text().splitlines():
        word, *numbers = line.split()
        if word == "start":
            assert int(numbers[0]) >= saved, "an update that had been saved was lost"
            position = int(numbers[0])
        elif len(numbers) == 3:  # else a kill cut the line
            assert int(numbers[0]) == position + 1 and numbers[1] == "1", "an update was left out or applied twice"
            position, saved = int(numbers[0]), max(saved, int(numbers[2]))
    return position
