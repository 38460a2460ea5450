"""One process with an event loop a core, of an interpreter without a GIL, beside worker processes with one loop each.

Command   python -m experiments.loops --interpreter PYTHON --json loops.json      (or --smoke; --help lists all)
Time      3 minutes on two cores
Needs     PYTHON: an interpreter with the package's dependencies, such as a free-threaded build of 3.14; without it, this one
Load      of `experiments.service_load`, over HTTP: 1,000 candidates, k=300, cached users; client processes on the same cores.
Ways      workers   `aif-jax serve --workers N` of this interpreter
          loops     one process of PYTHON with N loops on one port, an engine each; `no_gil` says whether it runs without one
          gil       the same with PYTHON_GIL=1
Figures   by way and N: requests a second, processor time of a request in the service, MiB that its processes have (a share of
          what they have in common): medians of loads in turn. Each loop and each worker has its cache of states, so the
          share of hits is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.output import track
from aif_jax.service.core import Service
from aif_jax.service.models import Models
from aif_jax.service.process import Listening, bind, listening
from aif_jax.service.processes import loop_factory
from aif_jax.serving import ServingConfig, compute_inline
from experiments import common
from experiments.service_load import SIZES, World, load, processor_seconds

COUNTS = (1, 2)


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the figures."""
    settings = SIZES | {
        "rounds": (7, 1, "loads of each way"),
        "seconds": (3.0, 0.3, "seconds of each load"),
        "callers": (16, 2, "callers at once"),
        "interpreter": (sys.executable, None, "the other interpreter"),
    }
    parser = common.parser(__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "LOOPS"), help="one such process")
    options = common.options(parser, arguments, settings)
    if options.serve:
        return serve(Path(options.serve[0]), int(options.serve[1]), options)
    with tempfile.TemporaryDirectory() as folder:
        common.report(measure(Path(folder), options), options.json)


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """All figures."""
    world, calls = World(folder / "models", options), folder / "calls"
    world.write(calls)
    found: dict[str, list[tuple[float, float, float]]] = {}
    with contextlib.ExitStack() as stack:
        ways: dict[str, tuple[int, str]] = {}
        no_gil = []
        for count in COUNTS:
            service = stack.enter_context(world.serving(workers=count))
            ways[f"workers {count}"] = service.process.pid, service.address
            for way, more in (("loops", {}), ("gil", {"PYTHON_GIL": "1"})):
                process, ready = stack.enter_context(started(options, folder / "models", count, more))
                no_gil += [ready["no_gil"]] if way == "loops" else []
                ways[f"{way} {count}"] = process, ready["http"]
        for number in track(range(options.rounds), label="loads", unit="rounds"):
            for name in list(ways) if number % 2 else reversed(ways):
                process, address = ways[name]
                before = sum(map(processor_seconds, family(process)))
                seen = load("http", address, calls, callers=options.callers, seconds=options.seconds, clients=2)
                spent = sum(map(processor_seconds, family(process))) - before
                mib = sum(map(resident, family(process)))
                found.setdefault(name, []).append((seen.rps, 1e3 * spent / max(1, seen.requests), mib))
    medians = {name: np.median(each, axis=0) for name, each in found.items()}
    figures = {what: {n: float(each[i]) for n, each in medians.items()} for i, what in enumerate(("rps", "cpu_ms", "mib"))}
    return figures | {"no_gil": all(no_gil)}


@contextlib.contextmanager
def started(options: Any, folder: Path, loops: int, environment: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """A process with so many loops: its number, and what it says when it is ready."""
    words = ["--serve", folder, loops, "-k", options.k, "--candidates", options.candidates]
    command = [options.interpreter, "-m", "experiments.loops", *map(str, words)]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, env=os.environ | environment, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, json.loads(process.stdout.readline())
        finally:
            process.kill()


def family(process: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *map(int, children)]


def resident(process: int) -> float:
    """MiB of a process, with its share of what others have too."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def serve(folder: Path, loops: int, options: Any) -> None:
    """Serves in so many loops until it is killed."""
    held = bind("127.0.0.1", 0, reuse=True)
    where = Listening(http_port=held.getsockname()[1], reuse_port=True)
    ready = threading.Barrier(loops + 1)

    async def one() -> None:
        models = Models(folder, config=ServingConfig(buckets=(options.candidates,), max_k=options.k))
        async with Service(models) as service, listening(service, where):
            await asyncio.to_thread(ready.wait)
            await asyncio.Event().wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(one())

    for _ in range(loops):
        threading.Thread(target=run, daemon=True).start()
    ready.wait()
    no_gil = not getattr(sys, "_is_gil_enabled", lambda: True)()
    print(json.dumps({"http": f"http://127.0.0.1:{where.http_port}", "no_gil": no_gil}), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
