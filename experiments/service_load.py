"""What the service adds to the engine, and how much load it carries.

Claim     HTTP adds at most 0.3 ms to the median of a ranking and keeps 85 % of the engine's requests a second
Command   python -m experiments.service_load --json service_load.json      (or --smoke)
Time      about a minute on 2 CPU cores
Method    1,000 candidates, k=300, users with cached states, so that what differs is HTTP; callers: see `callers`. Overhead: one
          caller, engine in this process and service in another, interleaved request by request. Requests a second: `--callers`
          of each in turn, each alone on the machine, with the processor time of service and client for one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import export
from aif_jax.service.calls import Call
from aif_jax.service.current import publish
from aif_jax.service.features import Context
from aif_jax.service.models import Models
from aif_jax.serving import Candidates, Request, ServingConfig, compute_inline
from experiments import common
from experiments.callers import Load, caller, load

NAME, USERS, NOW = "model", 16, 1_700_000_000


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measure and print the figures."""
    settings = {
        "items": (20_000, 200, "catalogue size"),
        "candidates": (1000, 50, "candidates of a request"),
        "k": (300, 10, "k of a request"),
        "rounds": (1000, 10, "interleaved requests of each"),
        "seconds": (10.0, 0.5, "seconds of each load"),
        "callers": (8, 2, "callers at once"),
    }
    options = common.options(__doc__, arguments, settings)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    common.report(figures, options.json)


class World:
    """An export, and the calls: users have a feature version, so their states are cached."""

    def __init__(self, folder: Path, options: Any):
        rng, count = np.random.default_rng(0), options.items
        ids, users = 1000 + 7 * np.arange(count), np.arange(USERS)
        items = {"item": ids, "category": [f"c{number % 10}" for number in range(count)], "bid": np.linspace(1, 2, count)}
        events = {"user": np.repeat(users, 12), "item": rng.choice(ids, 12 * USERS)}
        events["time"] = NOW - rng.integers(100, 10**6, 12 * USERS)
        data = aif.read(events, items=items, columns=aif.Columns(side=("bid",)))
        sizes: dict[str, Any] = dict(width=8, short_length=4, long_length=8, towers=(8,)) if options.smoke else {}
        model = aif.build(aif.presets.aif(data.schema, **sizes))
        own = [{name: events[name][events["user"] == user].tolist() for name in ("item", "time")} for user in users]
        self.users: list[dict[str, Any]] = [{"user": user, "events": each, "now": NOW} for user, each in enumerate(own)]
        trained = aif.Trained(model, model.init(jax.random.key(0), data.catalogue), data.encoder)
        index = aif.ItemIndex.build(trained, [items], progress=False)
        export.save(folder / NAME, trained, index, platforms=(jax.default_backend(),))
        publish(folder, (NAME,))
        self.folder, self.options, self.candidates = folder, options, rng.choice(ids, options.candidates, replace=False)
        self.config = ServingConfig(buckets=(options.candidates,), max_k=options.k)

    def packed(self) -> list[str]:
        """Return the calls, by user, in JSON."""
        more = {"feature_version": 1, "candidates": self.candidates.tolist(), "k": self.options.k}
        return [json.dumps(each | more) for each in self.users]


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Return all figures."""
    world, calls = World(folder / "models", options), folder / "calls.json"
    calls.write_text(json.dumps(world.packed()), encoding="utf-8")
    callers, seconds = options.callers, options.seconds
    with served(world) as (process, address):  # idle while the engine in this process has the machine
        figures = asyncio.run(overheads(world, address))
        before = processor_seconds(process)
        seen = load(address, calls, callers=callers, seconds=seconds)
        # the clients' first calls, one a user and caller, count among the service's
        requests = seen.requests + callers * USERS
        figures |= {"http_rps": seen.rps, "http_client_cpu_ms": seen.client_ms}
        figures["http_service_cpu_ms"] = 1e3 * (processor_seconds(process) - before) / requests
        alone = asyncio.run(engine_load(world))
        figures |= {"engine_rps": alone.rps, "engine_cpu_ms": alone.client_ms, "http_rps_share": seen.rps / alone.rps}
        figures["http_cpu_share"] = alone.client_ms / figures["http_service_cpu_ms"]
    return figures


@contextlib.contextmanager
def served(world: World) -> Iterator[tuple[int, str]]:
    """Run `aif-jax serve` of the export, and lend its process id and address."""
    command = [sys.executable, "-m", "aif_jax", "serve", str(world.folder), "--port", "0", "--log-level", "error"]
    command += ["--serving.buckets", *map(str, world.config.buckets), "--serving.max-k", str(world.config.max_k)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"the service did not start: exit code {process.wait()}")
        try:
            yield process.pid, json.loads(line)["http"]
        finally:
            process.terminate()


def processor_seconds(process: int) -> float:
    """Return processor time that a process has taken."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


async def overheads(world: World, address: str) -> dict[str, Any]:
    """Return medians of one caller over the engine in this process, interleaved."""
    times: dict[str, list[float]] = {"engine": [], "http": []}
    async with engine(world) as in_process:
        with caller(address, [call.encode() for call in world.packed()]) as rank:
            for number in range(-USERS, world.options.rounds):  # states are cached from 0 on
                user = number % USERS
                for name in list(times) if number % 2 else reversed(times):
                    start = time.perf_counter()
                    if name == "engine":
                        await in_process(user)
                    else:
                        rank(user)  # blocks the loop of this process, which has nothing else to do
                    if number >= 0:
                        times[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    figures = {f"{name}_p50_ms": value for name, value in medians.items()}
    return figures | {"http_overhead_p50_ms": medians["http"] - medians["engine"]}


@contextlib.asynccontextmanager
async def engine(world: World) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Run the engine of the same export, in this process."""
    models = Models(world.folder / NAME, config=world.config)
    await models.start()
    one, given = models.held[0], Candidates(world.candidates)

    async def rank(user: int) -> None:
        request = Request(user=user, feature_version=1, context=Context(Call(**world.users[user])))
        await one.engine.rank(request, world.options.k, candidates=given)

    try:
        yield rank
    finally:
        await models.close()


async def engine_load(world: World) -> Load:
    """Load of callers of the engine in this process, each of which waits for its answer."""
    count = 0
    async with engine(world) as rank:
        for user in range(USERS):
            await rank(user)
        start, cpu = time.perf_counter(), time.process_time()

        async def run(user: int) -> None:
            nonlocal count
            while time.perf_counter() - start < world.options.seconds:
                await rank(user % USERS)
                user, count = user + 1, count + 1

        await asyncio.gather(*map(run, range(world.options.callers)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Load(count / seconds, 1e3 * cpu / count, count)


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
