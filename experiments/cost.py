"""What a request costs: its time alone, CPU time, and requests a second within a budget, of five models from the same inputs.

Claim     A request costs less machine than the same model run sequentially: of new users, returning users, in sessions.
Command   python -m experiments.cost --json cost.json      (or --smoke; --help lists all)
          (--candidates 1000 10000 --history 512 4096: the figures of each size; --before DIR: of another checkout too)
Time      12 minutes a size on 2 idle CPU cores
Services  `aif`, `matching` and `two_tower` are AsyncPreRanker over these presets. `sequential` is the same model and scores as
          `aif`, `exact` is `presets.full_attention`: user function, item function and interaction start when the candidates
          come. `floor` is the engine's own compiled functions in a plain loop: no event loop, threads, deadlines or batches.
Inputs    the same for every service: encoded features as arrays on the host, as a feature store delivers them, and raw ids of
          the candidates. Each service checks, packs and uploads the features and looks up the ids. Sequential ones keep the
          features of the catalogue on the device.
Users     new: nobody has a state of them; returning_0: no event since their last request, so `aif` has the state in the cache;
          session: five requests in a row with the same features. Services without states cost the same for every kind.
Load      closed loop: each client sends its next request when the last is answered. Feature fetch is a delay of 2 ms, retrieval
          one of 15 ms. Service, kind and concurrency in turn, every other round backwards.
Figures   max_rps is the most requests a second whose p99 is within the bound, and cpu_ms CPU time of the process over requests
          there; p99 is the median over rounds, so that one stall of the machine does not decide; spread is the difference of
          the quartiles. lone_... and critical_... are of one client: the whole request, and from candidates to top-k. Weights
          are as initialised. Programs by themselves: `experiments.runtimes`. empty_engine_...: 16 clients, new users, no
          delays, no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

import aif_jax as aif
from aif_jax.output import track
from aif_jax.serving import ServingConfig, compute_inline
from experiments import common, services
from experiments.services import ENGINES, SESSION, Asked, Delays, Engine, Load, Model, Sequential, World, over_rounds

KINDS = ("new", "returning_0", "session")
HOPELESS = 10  # times the bound: with more clients at once nothing is measured


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run the measurement and print its figures."""
    options = parse(arguments)
    sizes = {f"C={count}, L={length}": (count, length) for count in options.candidates for length in options.history}
    world = World(items=options.items)
    figures = {size: asyncio.run(study(world, *of, options)) for size, of in sizes.items()}
    for size, found in figures.items():
        print(f"\n{size}: CPU ms a request and requests/s, {common.machine()}")
        common.show(found)
    figures |= empty_engines(options)
    common.report(figures, options.json, hidden=sizes)


def parse(arguments: list[str] | None):
    """Return the command line."""
    settings = {
        "items": (20_000, 300, "catalogue size"),
        "candidates": ([1000], [60], "candidates of a request"),
        "history": ([4096], [64], "behaviours of every user"),
        "rounds": (5, 2, "rounds of all loads"),
        "seconds": (0.5, 0.1, "seconds of each closed loop"),
        "concurrency": ([1, 2, 4, 8, 12, 16, 24, 32, 48, 64], [1, 4], "clients at once"),
        "batch_size": (8, 2, "users that the engine computes at once"),
        "threads": (2, None, "threads of the engine, for each of its stages"),
        "p99_bound_ms": (30.0, None, "milliseconds of a whole request, for requests/s"),
    }
    return common.options(__doc__, arguments, settings, before="folder of another checkout, to compare the empty engine with")


async def study(world: World, candidates: int, length: int, options) -> dict[str, Any]:
    """Return all measurements of one size, interleaved."""
    k = min(300, candidates)
    models = services.models(world, length, smoke=options.smoke)
    floor = Floor(models["aif"], candidates, k)
    threads = {"user_threads": options.threads, "score_threads": options.threads}
    config = {"batch_size": options.batch_size, "max_pending": 256, **threads}
    ways: dict[str, Any] = {name: Engine(models[name], candidates, k, config) for name in ENGINES}
    ways |= {name: Sequential(models[of], candidates, k) for name, of in services.SEQUENTIAL.items()}
    async with contextlib.AsyncExitStack() as stack:
        for service in ways.values():
            await stack.enter_async_context(service)
        await check_same_answers(ways["aif"], ways["sequential"], floor)
        loads: dict[tuple[str, str, int], list[Load]] = defaultdict(list)
        floors: dict[str, list[Load]] = defaultdict(list)
        gaps: dict[str, list[float]] = defaultdict(list)
        cells = []
        for name, kind in [(way, kind) for way in ways for kind in _kinds(way)]:
            for n in options.concurrency:
                cells.append((name, kind, n))
                warm = await services.closed_loop(ways[name], kind, n, 0.0)
                if max(warm.total_ms) > HOPELESS * options.p99_bound_ms:
                    break
        with track(total=options.rounds * len(cells), label="closed loops", unit="loops") as bar:
            for turn in range(options.rounds):
                for name, kind, n in cells if turn % 2 == 0 else reversed(cells):
                    loads[name, kind, n].append(await services.closed_loop(ways[name], kind, n, options.seconds))
                    bar.update()
                for kind in KINDS:
                    floors[kind].append(floor.loop(kind, options.seconds))
                for wait, gap in (await overhead(ways["aif"], floor)).items():
                    gaps[wait].append(gap)
    return summary(loads, floors, gaps, options) | {"start_s": await start(models["aif"], candidates, k, smoke=options.smoke)}


async def start(made: Model, candidates: int, k: int, *, smoke: bool = False) -> float:
    """Return seconds until an engine with the default buckets (or one) is ready, with compiled programs on disk."""
    with tempfile.TemporaryDirectory() as folder:
        before, buckets = jax.config.jax_compilation_cache_dir, ServingConfig().buckets[: 1 if smoke else None]
        keep_in(folder)
        for _ in range(2):  # the first one fills the folder
            jax.clear_caches()
            service, began = Engine(made, candidates, k, {"buckets": buckets}), time.perf_counter()
            async with service:
                seconds = time.perf_counter() - began
        keep_in(before)
    return seconds


def keep_in(folder: str | None) -> None:
    """Name the folder of compiled programs, which JAX reads once."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)


async def empty_engine(seconds: float) -> tuple[float, float]:
    """Return requests a second and CPU seconds a request of an engine whose compiled functions give one answer to all."""
    world, answers = World(items=300), dict[Any, Any]()
    made = Model.drawn(world, aif.presets.two_tower(world.schema, short_length=8, width=8))

    def known(call):
        return lambda *given: answers.get(call) or answers.setdefault(call, call(*given))

    async with Engine(made, 8, 8, {"budget": 1.0}) as service:
        version, rank = service.engine._current, service.rank
        version.user, programs = known(version.user), version.compiled.programs
        programs |= {bucket: known(call) for bucket, call in programs.items()}
        service.rank = lambda asked: rank(asked._replace(delays=Delays(0.0, 0.0)))
        _, load = [await services.closed_loop(service, "new", 16, of) for of in (0.0, seconds)]
    return load.requests / load.seconds, load.cpu_seconds / load.requests


def empty_engines(options) -> dict[str, float]:
    """Return figures of the empty engine; with another checkout, of both in turn, each in its process."""
    here, found = os.path.dirname(os.path.dirname(file := os.path.abspath(__file__))), defaultdict(list)
    code = f"import asyncio, runpy; print(*asyncio.run(runpy.run_path({file!r})['empty_engine']({options.seconds})))"
    words = ["env", "JAX_CPU_ENABLE_ASYNC_DISPATCH=false", sys.executable, "-c", code]  # as compute_inline
    for folder in (here, options.before) * options.rounds if options.before else (here,):
        found[folder].append(subprocess.check_output(words, cwd=folder, text=True).split())
    (rate, cpu), *others = [np.median(np.float64(figures), axis=0) for figures in found.values()]
    return {"empty_engine_requests_per_second": rate} | ({"empty_engine_over_before": cpu / others[0][1]} if others else {})


class Floor(services.Compiled):
    """The engine's own compiled functions in a plain loop in one thread."""

    def __init__(self, made: Model, candidates: int, k: int):
        self._count, self._size, self._turn = candidates, -(-candidates // 128) * 128, 0
        super().__init__(made, [self._size], k)
        self._state = self.user(0)

    def rank(self, number: int, state: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and logits [k] of a state's best candidates."""
        ids = self.made.candidates(number, self._count)
        rows, _ = self.made.index.lookup(ids)
        best = self.best(rows, state, size=self._size)
        return ids[best.positions], best.logits

    def loop(self, kind: str, seconds: float) -> Load:
        """Return requests of one kind one after another."""
        critical: list[float] = []
        cpu, start = time.process_time(), time.perf_counter()
        while not critical or time.perf_counter() - start < seconds:
            self._turn += 1
            if kind not in ("returning_0", "session") or (kind == "session" and self._turn % SESSION == 0):
                self._state = self.user(self._turn)
            there = time.perf_counter()
            self.rank(self._turn, self._state)
            critical.append((time.perf_counter() - there) * 1e3)
        spent = time.perf_counter() - start
        return Load(len(critical), spent, time.process_time() - cpu, critical, critical)


async def check_same_answers(engine: Engine, sequential: Sequential, floor: Floor) -> None:
    """Check that all three compute the same scores, so that only cost is compared."""
    for number in range(3):
        staged = (await engine.rank(Asked(number, ("check", number)))).logits
        joint = (await sequential.rank(Asked(number, None))).logits
        _, alone = floor.rank(number, floor.user(number))
        np.testing.assert_allclose(staged, joint, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(staged, alone, rtol=1e-5, atol=1e-6)


async def overhead(engine: Engine, floor: Floor, *, requests: int = 16) -> dict[str, float]:
    """Return the median critical path of lone requests less that of the floor, in ms, after a wait and back to back."""
    found = {}
    for wait, delays in (("after_wait", Delays()), ("back_to_back", Delays(0.0, 0.0))):
        times: dict[str, list[float]] = {"engine": [], "floor": []}
        for number in range(requests):
            times["engine"].append((await engine.rank(Asked(number, ("returning", 0), delays))).critical_ms)
        state = floor.user(0)
        for number in range(requests):
            await Delays.wait(delays.retrieval)
            there = time.perf_counter()
            floor.rank(number, state)
            times["floor"].append((time.perf_counter() - there) * 1e3)
        found[wait] = float(np.median(times["engine"][2:]) - np.median(times["floor"][2:]))
    return found


def summary(loads: dict, floors: dict, gaps: dict, options) -> dict[str, Any]:
    """Return every figure."""
    made: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, kind in dict.fromkeys((name, kind) for name, kind, _ in loads):
        rows = [over_rounds(loads[name, kind, n], n) for n in options.concurrency if (name, kind, n) in loads]
        within = [row for row in rows if row["p99_ms"] <= options.p99_bound_ms]
        best = max(within or rows[:1], key=lambda row: row["rps"])
        figures = {"cpu_ms": best["cpu_ms"], "cpu_spread_ms": best["cpu_spread_ms"], "max_rps": best["rps"] if within else 0.0}
        figures |= {f"lone_{name}": rows[0][name] for name in ("p50_ms", "p99_ms")}
        figures |= {name: rows[0][name] for name in ("critical_p50_ms", "critical_p99_ms")} | {"closed_loops": rows}
        for figure, value in figures.items():
            for shared in KINDS if len(_kinds(name)) == 1 else (kind,):
                made[figure][name][shared] = value
    cpu, rps = made["cpu_ms"], made["max_rps"]
    floor = {kind: over_rounds(found, 1)["cpu_ms"] for kind, found in floors.items()}

    def over(above: dict[str, float], below: dict[str, float]) -> dict[str, float]:
        return {kind: above[kind] / max(below[kind], 1e-9) for kind in KINDS}

    return {
        **made,
        "floor_cpu_ms": floor,
        "engine_over_floor": over(cpu["aif"], floor),
        "cpu_ratio_sequential_over_aif": over(cpu["sequential"], cpu["aif"]),
        "rps_ratio_aif_over_sequential": over(rps["aif"], rps["sequential"]),
        "overhead_p50_ms": {wait: float(np.median(values)) for wait, values in gaps.items()},
    }


def _kinds(name: str) -> tuple[str, ...]:
    return KINDS if name in ENGINES else KINDS[:1]


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
