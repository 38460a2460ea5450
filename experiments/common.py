"""What the command lines and reports of all experiments share."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.output import hidden


def script(main: Callable[..., None]) -> Callable[..., None]:
    """Return `main(arguments)` of a script, without bars where `--quiet` is given."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> None:
        with hidden("--quiet" in (sys.argv[1:] if arguments is None else arguments)):
            main(arguments)

    return run


def parser(description: str | None, *, data: bool = False, **folders: Path) -> argparse.ArgumentParser:
    """Return an argument parser with `--smoke`, `--json` and `--quiet`; the description is the script's own header.

    Args:
      data: adds `--data`, the folder that holds the data sets' folders.
      folders: defaults of options that name a folder: `results` of records, `work` of models.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--smoke", action="store_true", help="everything in seconds, on a small world that the script makes")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure that is printed to this file")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    if data:
        made.add_argument("--data", metavar="DIR", type=Path, help="the folder that holds the data sets' folders")
    for name, usual in folders.items():
        made.add_argument(f"--{name}", metavar="DIR", type=Path, default=usual, help="default %(default)s")
    return made


def options(
    description: argparse.ArgumentParser | str | None,
    arguments: list[str] | None,
    settings: Mapping[str, tuple[Any, ...]],
    **paths: str,
) -> argparse.Namespace:
    """Return the options of a script by name, and `error(text)`, which ends it with its usage.

    Args:
      description: the script's own header, or a `parser` with options of other kinds.
      arguments: words of the command line; None takes those of the process.
      settings: by name: default, value in a smoke run (None for the default), help text. The default tells the type; a number
        whose default is 1 or more must be at least 1, or a fourth value, and no number may be negative.
      paths: options that take a path, by name; their help texts.
    """
    made = description if isinstance(description, argparse.ArgumentParser) else parser(description)
    made.set_defaults(error=made.error)
    for name, text in paths.items():
        made.add_argument(f"--{name}", metavar="PATH", type=Path, help=text)
    for name, (default, _, text, *_) in settings.items():
        flag = f"--{name.replace('_', '-')}"
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        if isinstance(default, list):
            kind = {"type": type(default[0]), "nargs": "+"}
        made.add_argument(flag, **kind, default=None, help=f"{text} (default: {default})")
    given = made.parse_args(arguments)
    for name, (default, small, _, *bound) in settings.items():
        if (value := getattr(given, name)) is None:
            setattr(given, name, default if small is None or not given.smoke else small)
            continue
        first, values = (default[0], value) if isinstance(default, list) else (default, [value])
        least = bound[0] if bound else int(isinstance(first, int) and first >= 1)
        if isinstance(first, int | float) and (wrong := [each for each in values if each < least]):
            made.error(f"--{name.replace('_', '-')}: expected at least {least}, got {wrong[0]:g}")
    return given


def report(figures: Mapping[str, Any], path: Path | None, *, hidden: Collection[str] = ()) -> None:
    """Print all figures but those of the `hidden` names, see `show`, and write all to a file, see `write_json`."""
    show({name: value for name, value in figures.items() if name not in hidden})
    write_json(path, dict(figures))


def show(figures: Mapping[str, Any], title: str = "") -> None:
    """Print tables: one of the plain values, one for mappings of the same keys; others have their own."""
    tables: dict[tuple[str, ...], list[list[Any]]] = {}
    deeper: dict[str, Mapping[str, Any]] = {}
    for name, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(number): row for number, row in enumerate(value)}
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping | list) for inner in value.values()):
            deeper[f"{title}{name}"] = value
        elif isinstance(value, Mapping):
            tables.setdefault((title, *map(str, value)), []).append([name, *value.values()])
        elif not isinstance(value, list):
            tables.setdefault((title or "figure", "value"), []).append([name, value])
    for header, rows in tables.items():
        print("\n" + table(rows, header))
    for name, value in deeper.items():
        show(value, f"{name}: ")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to a file, with the machine they were measured on."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, "machine": machine()}, indent=2, default=_plain) + "\n", encoding="utf-8")
    print(f"figures written to {path}")


def machine() -> dict[str, Any]:
    """Return device, processor, threads, versions and commit: what a measured figure must be quoted with."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "processor": _processor(),
        "threads": threads(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _commit(),
    }


def threads() -> int:
    """Return cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return a plain text table; numbers are printed to four digits."""
    cells = [list(header)] + [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def size_of(tree: Any) -> int:
    """Return bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def interleaved(functions: dict[str, Callable[[int], float]], rounds: int) -> dict[str, np.ndarray]:
    """Return milliseconds float64 [rounds] of every function in turn, so that a drift of the machine hits all alike.

    A function of the number of the round does the work and returns the milliseconds that count.
    """
    times = {name: np.zeros(rounds) for name in functions}
    for i in range(rounds):
        for name in list(functions) if i % 2 == 0 else reversed(functions):
            times[name][i] = functions[name](i)
    return times


def milliseconds(call: Callable[[], Any]) -> float:
    """Return milliseconds until the result of a call is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return (time.perf_counter() - start) * 1e3


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm: int = 0) -> dict[str, float]:
    """Return median milliseconds of every call, taken in turn, after `warm` rounds that do not count."""
    arms = {name: (lambda _, call=call: milliseconds(call)) for name, call in calls.items()}
    return {name: float(np.median(times[warm:])) for name, times in interleaved(arms, rounds + warm).items()}


@contextlib.contextmanager
def picture(path: str | Path, *panels: int, size: tuple[float, float], **grid: Any) -> Iterator[tuple[Any, Any]]:
    """Lend a figure and its axes, `panels` rows and columns of them, with options of `subplots`, and write it at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure, figure.subplots(*panels, **grid)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"picture written to {path}")


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
