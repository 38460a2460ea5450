"""What the command lines and reports of all experiments share."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with `--smoke` and `--json`; the description is the script's own header."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="everything in seconds, on a small world that the script makes")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure that is printed to this file")
    return made


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes figures to a file, with the machine they were measured on."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, "machine": machine()}, indent=2, default=_plain) + "\n", encoding="utf-8")
    print(f"figures written to {path}")


def machine() -> dict[str, Any]:
    """Device, processor, threads, versions and commit: what a measured figure must be quoted with."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _commit(),
    }


class Spent(NamedTuple):
    """Seconds of a part of a script."""

    wall: float
    cpu: float  # of all threads


class Parts:
    """Where the time of a script goes: `with parts("train"): ...`; a part that comes again is added up."""

    def __init__(self):
        self._began = time.perf_counter(), time.process_time()
        self.spent: dict[str, Spent] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time of the body."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            before = self.spent.get(name, Spent(0.0, 0.0))
            self.spent[name] = Spent(before.wall + time.perf_counter() - wall, before.cpu + time.process_time() - cpu)

    @property
    def total(self) -> Spent:
        """Since the start."""
        return Spent(time.perf_counter() - self._began[0], time.process_time() - self._began[1])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {spent.wall:.0f}" for name, spent in self.spent.items())
        return f"{self.total.wall:.0f} s ({self.total.cpu:.0f} s of CPU time); seconds by part: {parts}"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A plain text table; numbers are printed to four digits."""
    cells = [list(header)] + [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def interleaved(functions: dict[str, Callable[[int], float]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of every function in turn, round by round, so that a drift of the machine hits all alike.

    Args:
      functions: name to a function of the round that does the work and returns the milliseconds that count.
      rounds: how often.

    Returns:
      Name to float64 [rounds].
    """
    times = {name: np.zeros(rounds) for name in functions}
    for i in range(rounds):
        for name in list(functions) if i % 2 == 0 else reversed(functions):
            times[name][i] = functions[name](i)
    return times


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else np.asarray(value).tolist()
