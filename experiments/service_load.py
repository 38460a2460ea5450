"""What the service adds to the engine, and how much load it carries.

Claim     HTTP adds at most 0.3 ms to the median of a ranking and keeps 85 % of the engine's requests a second. Publishes under
          load, failures and memory are tested: `tests/reliability`.
Command   python -m experiments.service_load --json service_load.json      (or --smoke)
Time      about a minute on 2 CPU cores
Measured  experiments/README.md, with the machine
Load      1,000 candidates, k=300, users with cached states, so that what differs is HTTP. Clients are processes with
          connections that stay open and messages that are packed before the clock starts, see `callers`.
Method    overhead: one caller, engine in this process and service in another, interleaved request by request. Requests a
          second: `--callers` of each in turn, each alone on the machine, with the processor time of service and client
          for one request, which says what would be left of the engine with clients on other machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.service.features import Context
from aif_jax.service.models import Models, publish
from aif_jax.serving import Candidates, Request, ServingConfig, compute_inline
from experiments import common, replicas
from experiments.callers import Load, caller, load
from experiments.replicas import NAMES, Replica


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


class World(replicas.World):
    """Two exports of one model, and the calls: users have a feature version, so their states are cached."""

    def __init__(self, folder: Path, options: Any):
        sizes: dict[str, Any] = {"items": options.items, "candidates": options.candidates, "small": options.smoke}
        super().__init__(folder, users=16, **sizes)
        self.options, self.config = options, ServingConfig(buckets=(options.candidates,), max_k=options.k)
        publish(folder, NAMES[:1])

    def fields(self, user: int) -> dict[str, Any]:
        """Return a call by its fields, its features encoded."""
        each = self.features[user]
        features = {"floats": np.asarray(each.floats)} | {f"history.{name}": v for name, v in vars(each.history).items()}
        common = {"user": user, "feature_version": 1, "features": features, "encoding": each.encoding}
        return common | {"candidates": self.candidates, "k": self.options.k}

    def packed(self) -> list[str]:
        """Return the calls, by user, in JSON."""
        return [json.dumps(self.fields(user), default=lambda array: array.tolist()) for user in self.users]

    def serving(self) -> Replica:
        """Return `aif-jax serve` of both."""
        return Replica(self.folder, buckets=self.config.buckets, max_k=self.config.max_k)


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Return all figures."""
    world, calls = World(folder / "models", options), folder / "calls.json"
    calls.write_text(json.dumps(world.packed()), encoding="utf-8")
    callers, seconds = options.callers, options.seconds
    with world.serving() as service:  # idle while the engine in this process has the machine
        process, address = service.process, service.address
        figures = asyncio.run(overheads(world, address))
        before = processor_seconds(process.pid)
        seen = load(address, calls, callers=callers, seconds=seconds)
        # the clients' first calls, one a user and caller, count among the service's
        served = seen.requests + callers * len(world.users)
        figures |= {"http_rps": seen.rps, "http_client_cpu_ms": seen.client_ms}
        figures["http_service_cpu_ms"] = 1e3 * (processor_seconds(process.pid) - before) / served
        alone = asyncio.run(engine_load(world))
        figures |= {"engine_rps": alone.rps, "engine_cpu_ms": alone.client_ms, "http_rps_share": seen.rps / alone.rps}
        figures["http_cpu_share"] = alone.client_ms / figures["http_service_cpu_ms"]
    return figures


def processor_seconds(process: int) -> float:
    """Return processor time that a process has taken."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


async def overheads(world: World, address: str) -> dict[str, Any]:
    """Return medians of one caller over the engine in this process, interleaved."""
    times: dict[str, list[float]] = {"engine": [], "http": []}
    async with engine(world) as in_process:
        with caller(address, [call.encode() for call in world.packed()]) as rank:
            for number in range(-len(world.users), world.options.rounds):  # states are cached from 0 on
                user = number % len(world.users)
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
    models = Models(world.folder, config=world.config, only=NAMES[0])
    await models.start()
    served, given = models.held[0], Candidates.of(world.candidates)

    async def rank(user: int) -> None:
        request = Request(user=user, feature_version=1, context=Context(world.features[user]))
        await served.engine.rank(request, world.options.k, candidates=given)

    try:
        yield rank
    finally:
        await models.close()


async def engine_load(world: World) -> Load:
    """Load of callers of the engine in this process, each of which waits for its answer."""
    users, count = len(world.users), 0
    async with engine(world) as rank:
        for user in range(users):
            await rank(user)
        start, cpu = time.perf_counter(), time.process_time()

        async def run(user: int) -> None:
            nonlocal count
            while time.perf_counter() - start < world.options.seconds:
                await rank(user % users)
                user, count = user + 1, count + 1

        await asyncio.gather(*map(run, range(world.options.callers)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Load(count / seconds, 1e3 * cpu / count, count)


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
