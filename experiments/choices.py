"""What the engine chose, beside what was left: how XLA orders a program's operations, and the size that 10,000 candidates take.

Claim     XLA's schedule for less memory answers a lone request sooner, with the same bits, and batches of new users slower;
          10,000 candidates take least in one bucket of 10,240.
Command   python -m experiments.choices --json choices.json      (or --smoke; --help lists all)
Time      7 minutes on two cores
Schedules "ours" hands half of more than eight operations that could start to a thread of XLA's pool; with "less_memory" eight
          are never ready; "dots_apart" and "no_ynnpack" make products one by one and without YNNPACK. `PJRT_NPROC=1` in the
          environment leaves one thread in the pool: then compare with a run without.
Calls     `score` and `halves` of `experiments.runtimes`: medians of turns interleaved in one process, each after a call that
          does not count; `calls_a_second` of one and two threads that call at C=1,000. `X_over` is X of an arm over ours.
Engine    `AsyncPreRanker` over the same model. Lone requests of a cached user, critical path, after a wait of 15 ms and back to
          back; requests a second of --callers at once, who wait 2 ms for features and 15 for candidates, new and cached, with
          and without batches: medians of loops in turn.
Padding   C=10,000: critical path of a lone request, cached, back to back, and processor time of a request with eight callers;
          in one bucket of 16,384, in pieces of 2,048, and in one of 10,240. Weights are as initialised, L=512.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax.output import Bar
from aif_jax.serving import compute_inline
from aif_jax.serving.programs import COMPILER_OPTIONS
from experiments import common, services
from experiments.runtimes import Ours, turn
from experiments.services import Asked, Delays, Engine, Model, World

DOTS = "xla_cpu_experimental_ynn_fusion_type"
SCHEDULES: dict[str, dict[str, Any]] = {
    "ours": {},
    "less_memory": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "dots_apart": {DOTS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "no_ynnpack": {DOTS: ""},
}
WAITS = {"after_wait": Delays(), "back_to_back": Delays(0.0, 0.0)}


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the figures."""
    settings = {
        "rounds": (300, 2, "turns of each call"),
        "loops": (6, 1, "loops of each load"),
        "seconds": (1.0, 0.1, "seconds of each loop"),
        "callers": (64, 4, "callers at once"),
    }
    options = common.options(__doc__, arguments, settings)
    world, counts = World(items=300 if options.smoke else 20_000), (60, 120) if options.smoke else (1000, 10_000)
    sizes: dict[str, Any] = dict(short_length=8, long_length=32, width=8) if options.smoke else {}
    made = Model.drawn(world, aif.presets.aif(world.schema, **sizes))
    figures = calls(made, counts, options) | asyncio.run(engines(made, counts[0], options))
    common.report(figures | asyncio.run(padding(made, counts[1], options)), options.json)


@contextlib.contextmanager
def compiling(changes: Mapping[str, Any]) -> Iterator[None]:
    """The engine's programs are compiled with these options of XLA on top of those it has."""
    platform = jax.default_backend()
    before = COMPILER_OPTIONS.get(platform, {})
    COMPILER_OPTIONS[platform] = {**before, **changes}
    try:
        yield
    finally:
        COMPILER_OPTIONS[platform] = before


def calls(made: Model, counts: tuple[int, ...], options: Any) -> dict[str, Any]:
    """Calls without an engine, of every schedule."""
    arms: dict[str, Ours] = {}
    for name, changes in SCHEDULES.items():
        with compiling(changes):
            arms[name] = Ours(made, counts, min(100, counts[0]))
    turns = {}
    for name, arm in arms.items():
        for count, size in zip(counts, ("1000", "10000"), strict=True):
            for what in ("score", "halves"):
                turns[f"{name} {what}_{size}"] = partial(turn, partial(getattr(arm, what), count), 0.0)
    medians = {name: float(np.median(ms)) for name, ms in common.interleaved(turns, options.rounds).items()}
    rates: dict[str, dict[str, float]] = {}
    for number in (1, 2):
        ways = {name: partial(rate, partial(arm.score, counts[0]), number, options.seconds) for name, arm in arms.items()}
        found = common.interleaved(ways, options.loops)
        rates[f"{number} threads"] = {name: float(np.median(each)) for name, each in found.items()}
    by_arm = {name: {key.split()[1]: ms for key, ms in medians.items() if key.startswith(f"{name} ")} for name in arms}
    best = {name: [part for count in counts for part in arm.score(count, 3)] for name, arm in arms.items()}
    halves = [abs(arms["ours"].halves(count, 3)[0] - whole) for count, whole in zip(counts, best["ours"][::2], strict=True)]
    return {
        "call_ms": by_arm,
        "call_over": {name: {what: ms[what] / by_arm["ours"][what] for what in ms} for name, ms in by_arm.items()},
        "calls_a_second": rates,
        "same_bits": {name: all(map(np.array_equal, each, best["ours"])) for name, each in best.items()},
        "halves_difference": float(np.max(halves)),
    }


def rate(program: Any, threads: int, seconds: float, _: int) -> float:
    """Calls a second of threads that call one after another."""
    start, counts = time.perf_counter(), [0] * threads

    def run(number: int) -> None:
        while time.perf_counter() - start < seconds:
            program(number + counts[number])
            counts[number] += 1

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


async def engines(made: Model, count: int, options: Any) -> dict[str, Any]:
    """Lone requests and loads of the engine, of its schedule and that for less memory."""
    figures: dict[str, Any] = {"engine_ms": {}, "rps": {}, "rps_over": {}}
    for batch in (1, 8):
        ways: dict[str, Engine] = {}
        async with contextlib.AsyncExitStack() as stack:
            for name in ("ours", "less_memory"):
                with compiling(SCHEDULES[name]):
                    config = {"batch_size": batch, "max_pending": 256}
                    ways[name] = await stack.enter_async_context(Engine(made, count, min(100, count), config))
            if batch == 1:
                figures["engine_ms"] = await lone(ways, options.rounds)
            for kind in ("new", "returning_0"):
                key, found = f"{kind}, batches of {batch}", await loads(ways, kind, options.callers, options)
                figures["rps"][key] = {n: float(np.median([x.requests / x.seconds for x in each])) for n, each in found.items()}
                figures["rps_over"][key] = figures["rps"][key]["less_memory"] / figures["rps"][key]["ours"]
    return figures


async def lone(ways: Mapping[str, Engine], rounds: int) -> dict[str, dict[str, float]]:
    """Median critical path of lone requests of a cached user, by wait and way, in ms."""
    found: dict[str, dict[str, float]] = {}
    for wait, delays in WAITS.items():
        times: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(rounds):
            for name in list(ways) if i % 2 else reversed(ways):
                for key in (("returning", 0),) * (1 if wait == "after_wait" else 2):  # back to back: the second counts
                    answer = await ways[name].rank(Asked(i, key, delays))
                times[name].append(answer.critical_ms)
        found[wait] = {name: float(np.median(each)) for name, each in times.items()}
    return found


async def loads(ways: Mapping[str, Engine], kind: str, callers: int, options: Any) -> dict[str, list[services.Load]]:
    """Closed loops of every way, in turn."""
    found: dict[str, list[services.Load]] = {name: [] for name in ways}
    with Bar(options.loops * len(ways), label=f"{kind}, {callers} callers", unit="loops") as bar:
        for i in range(options.loops):
            for name in list(ways) if i % 2 else reversed(ways):
                found[name].append(await services.closed_loop(ways[name], kind, callers, options.seconds))
                bar.update()
    return found


async def padding(made: Model, count: int, options: Any) -> dict[str, Any]:
    """A lone request of many candidates, and the processor time of one of eight callers, by buckets."""
    buckets = {"16384": (16_384,), "pieces of 2048": (2048,), "10240": (10_240,)}
    ways: dict[str, Engine] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name, sizes in buckets.items():
            ways[name] = await stack.enter_async_context(Engine(made, count, min(100, count), {"buckets": sizes}))
        times = await lone(ways, options.rounds)
        found = await loads(ways, "returning_0", 8, options)
    cpu = {name: float(np.median([1e3 * load.cpu_seconds / load.requests for load in each])) for name, each in found.items()}
    return {"padded_ms": times["back_to_back"], "padded_after_wait_ms": times["after_wait"], "padded_cpu_ms": cpu}


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
