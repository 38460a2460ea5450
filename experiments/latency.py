"""What a request waits for: the engine and four other ways, and how much load each of them carries.

Claim     With the user function running during retrieval and the item function nearline, the critical path (candidates there ->
          top-k ready) is at most a third of the same model's run sequentially and at most a tenth of exact attention's.
Command   python -m experiments.latency --json latency.json --figures DIR      (or --smoke; --help lists all)
Time      6 minutes on 2 CPU cores with --rounds 60 --seconds 3
Measured  experiments/README.md, with the machine
Services  aif         AsyncPreRanker over `presets.aif`
          sequential  the same model and scores; user function, item function and interaction start when the candidates come
          exact       `presets.full_attention`: attention over both whole histories, float similarities; sequential
          two_tower   AsyncPreRanker over a dot product
          cold        one MLP over concatenated features; sequential
Load      feature fetch is a stated delay of 2 ms, retrieval one of 15 ms, for every service. Users have full histories; each
          request is of a new user, so the state cache does not help.
Method    services interleaved request by request in one process, compilation and warm-up left out. Sequential ones have their
          features on the device before their clock starts. Bare functions run on ready inputs in the main thread, after the
          same wait as a request's. After a wait of 15 ms caches are cold, and every step of every service takes longer; so the
          same is measured back to back too, with state and candidates ready, in turns of eight requests. Weights are as
          initialised.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import aif_jax as aif
from aif_jax.output import track
from aif_jax.serving import DeadlineExceeded, Overloaded, compute_inline
from experiments import common
from experiments.latency_services import Bare, Delays, Engine, Model, Sequential, Served, Service, World
from experiments.timelines import draw

SERVICES = ("aif", "sequential", "exact", "two_tower", "cold")
BARE = ("interaction", "head", "staged", "sequential")
"""Compiled functions on ready inputs: interaction; head; index rows, interaction and top-k; the sequential way."""
TURN, COLD = 8, 2


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the study and prints its figures."""
    options = parse(arguments)
    figures = asyncio.run(study(options))
    common.write_json(options.json, figures)


def parse(arguments: list[str] | None):
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--figures", type=Path, help="folder for the pictures")
    parser.add_argument("--items", type=int, default=20_000, help="catalogue size")
    parser.add_argument("--rounds", type=int, default=80, help="requests of each service at each setting")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load test")
    parser.add_argument("--p99-bound-ms", type=float, default=100.0, help="of the whole request, for requests/s")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--history", type=int, default=512)
    parser.add_argument("--sweep-candidates", type=int, nargs="*", default=[100, 300, 3000, 10_000])
    parser.add_argument("--sweep-history", type=int, nargs="*", default=[128, 2048, 8192])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    options = parser.parse_args(arguments)
    if options.smoke:
        options.items, options.rounds, options.seconds = 300, 4, 0.2
        options.candidates, options.history, options.k = 60, 64, 10
        options.sweep_candidates, options.sweep_history, options.concurrency = [], [], [1, 4]
    else:
        options.k = 300
    return options


async def study(options) -> dict[str, Any]:
    """All measurements."""
    world = World(items=options.items)
    settings = [(options.candidates, options.history)]
    settings += [(c, options.history) for c in options.sweep_candidates]
    settings += [(options.candidates, length) for length in options.sweep_history]
    measured: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    answers: dict[str, Served] = {}
    figures: dict[str, Any] = {}
    for count, length in track(settings, label="settings", unit="settings"):
        models, k = build(world, options, length), min(options.k, count)
        bare = Bare(models["aif"], candidates=count, k=k)
        async with contextlib.AsyncExitStack() as stack:
            services = await start(stack, models, count, k)
            await check_same_scores(services, k)
            measured[count, length], found = await one_by_one(services, bare, options.rounds, k)
            if (count, length) == settings[0]:
                answers = found
                figures |= stages_of(services["aif"])
        if (count, length) == settings[0]:
            figures["back_to_back"] = summary(await back_to_back(models, bare, count, options.rounds, k))
            figures |= await load(models, options)
    figures |= summary(measured[settings[0]])
    figures["critical_ms_by_history"] = by_setting(measured, axis=1, fixed=options.candidates)
    figures["critical_ms_by_candidates"] = by_setting(measured, axis=0, fixed=options.history)
    report(figures, options)
    if options.figures:
        pictures(figures, answers, options)
    return figures


def build(world: World, options, length: int) -> dict[str, Model]:
    """The four models; `aif` is served in two ways."""
    presets, sizes = aif.presets, dict(short_length=8, width=8) if options.smoke else {}
    config = presets.aif(world.schema, long_length=length, **sizes)
    others = {"exact": presets.full_attention, "two_tower": presets.two_tower, "cold": presets.cold}
    made = {"aif": config, **{name: preset(world.schema, long_length=length, **sizes) for name, preset in others.items()}}
    return {name: Model.drawn(world, config) for name, config in made.items()}


async def start(
    stack: contextlib.AsyncExitStack, models: dict[str, Model], count: int, k: int, *, ready: bool = False
) -> dict[str, Any]:
    """All services, compiled and warm; `ready` ones have user state and candidates already."""
    delays = Delays(0.0, 0.0) if ready else Delays()
    services: dict[str, Any] = {
        "aif": Engine(models["aif"], candidates=count, delays=delays, ready=ready),
        "sequential": Sequential(models["aif"], candidates=count, k=k, delays=delays),
        "exact": Sequential(models["exact"], candidates=count, k=k, delays=delays),
        "two_tower": Engine(models["two_tower"], candidates=count, delays=delays, ready=ready),
        "cold": Sequential(models["cold"], candidates=count, k=k, delays=delays),
    }
    for service in services.values():
        await stack.enter_async_context(service)
    return services


async def check_same_scores(services: dict[str, Service], k: int) -> None:
    """The claim is about time alone: engine and sequential service must agree."""
    for number in range(3):
        staged, sequential = [await services[name].rank(number, k) for name in ("aif", "sequential")]
        np.testing.assert_allclose(staged.logits, sequential.logits, rtol=1e-3, atol=1e-4)


async def one_by_one(
    services: dict[str, Service], bare: Bare, rounds: int, k: int
) -> tuple[dict[str, np.ndarray], dict[str, Served]]:
    """Milliseconds of the critical path of every service, one request at a time, in turn; and one answer of each."""
    alone = {name: getattr(bare, name) for name in BARE}
    names = (*services, "total_aif", "total_sequential", *(f"bare_{name}" for name in BARE))
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Served] = {}
    for number in range(-3, rounds):
        for name, service in services.items():
            answer = await service.rank(number, k)
            if number >= 0:
                times[name].append(answer.critical_ms)
                found[name] = answer
                if name in ("aif", "sequential"):
                    times[f"total_{name}"].append(answer.total_ms)
        for name, function in alone.items():
            await asyncio.sleep(Delays().retrieval)  # as a request waits
            milliseconds = function()
            if number >= 0:
                times[f"bare_{name}"].append(milliseconds)
    return {name: np.asarray(values) for name, values in times.items()}, found


async def back_to_back(models: dict[str, Model], bare: Bare, count: int, rounds: int, k: int) -> dict[str, np.ndarray]:
    """Milliseconds of the critical path where one request follows the other at once, `TURN` of a service in a row.

    User state and candidates are ready. The first `COLD` requests of a turn do not count: the caches hold data of the service
    before.
    """
    times: dict[str, list[float]] = {name: [] for name in (*SERVICES, *(f"bare_{name}" for name in BARE))}
    async with contextlib.AsyncExitStack() as stack:
        services = await start(stack, models, count, k, ready=True)
        for number in range(bare.users):  # fills the state caches
            for name in ("aif", "two_tower"):
                await services[name].rank(number, k)
        for turn in range(0, rounds, TURN):
            for name in times:
                function, service = getattr(bare, name.removeprefix("bare_"), None), services.get(name)
                for number in range(turn - COLD, turn + TURN):
                    milliseconds = (
                        function() if service is None and function else (await services[name].rank(number, k)).critical_ms
                    )
                    if number >= turn:
                        times[name].append(milliseconds)
    return {name: np.asarray(values) for name, values in times.items()}


def stages_of(service: Engine) -> dict[str, Any]:
    """Time by stage and transfers of one request, from the engine's own counters."""
    snapshot = service.engine.metrics()
    counters, requests = snapshot["counters"], snapshot["counters"]["requests"]
    return {
        "stage_p50_ms": {name: stage["p50"] * 1e3 for name, stage in snapshot["stages"].items()},
        "transfers_per_request": {
            name.removeprefix("transfers_"): counters[name] / requests for name in counters if name.startswith("transfers_")
        },
    }


async def load(models: dict[str, Model], options) -> dict[str, Any]:
    """Closed loop over concurrency for both ways, then open loop up to twice the maximum for the engine."""
    count, k, delays = options.candidates, min(options.k, options.candidates), Delays()
    figures: dict[str, Any] = {}
    ways = {
        "aif": lambda: Engine(models["aif"], candidates=count, delays=delays),
        "aif_batched": lambda: Engine(models["aif"], candidates=count, delays=delays, config={"batch_size": 4}),
        "sequential": lambda: Sequential(models["aif"], candidates=count, k=k, delays=delays),
    }
    for name, make in ways.items():
        async with make() as service:
            closed = [await closed_loop(service, n, k, options.seconds) for n in options.concurrency]
        figures[f"closed_loop_{name}"] = closed
        within = [row["rps"] for row in closed if row["p99_ms"] <= options.p99_bound_ms]
        figures[f"max_rps_{name}"] = max(within, default=0.0)
    sustainable = max((row["rps"] for row in figures["closed_loop_aif"]), default=1.0)
    sustainable = figures["max_rps_aif"] or sustainable
    budget = options.p99_bound_ms / 1e3
    bounded = {"max_pending": pending(sustainable, budget)}
    async with Engine(models["aif"], candidates=count, delays=delays, config=bounded) as service:
        figures["open_loop_aif"] = [
            await open_loop(service, share * sustainable, k, options.seconds, budget)
            for share in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
        ]
    best = max(row["goodput"] for row in figures["open_loop_aif"])
    figures["goodput_at_twice_over_max"] = figures["open_loop_aif"][-1]["goodput"] / max(best, 1e-9)
    return figures


def pending(rate: float, budget: float) -> int:
    """Requests that may be under way: as many as can be answered in half the budget (Little's law)."""
    return max(2, int(rate * budget / 2))


async def closed_loop(service: Service, concurrency: int, k: int, seconds: float) -> dict[str, float]:
    """`concurrency` clients, each of which sends its next request when one is answered."""
    total: list[float] = []
    critical: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            answer = await service.rank(number, k)
            total.append(answer.total_ms)
            critical.append(answer.critical_ms)
            number += concurrency

    start = time.perf_counter()
    await asyncio.gather(*[client(n) for n in range(concurrency)])
    return {
        "concurrency": concurrency,
        "rps": len(total) / (time.perf_counter() - start),
        "p50_ms": float(np.quantile(total, 0.5)),
        "p99_ms": float(np.quantile(total, 0.99)),
        "critical_p50_ms": float(np.quantile(critical, 0.5)),
    }


async def open_loop(service: Service, rate: float, k: int, seconds: float, budget: float) -> dict[str, float]:
    """Poisson arrivals at a rate; goodput counts what was answered in full within the budget."""
    outcome: Counter[str] = Counter()
    total: list[float] = []

    async def request(number: int) -> None:
        try:
            answer = await service.rank(number, k, budget=budget)
            outcome["degraded" if answer.degraded else "good"] += 1
            total.append(answer.total_ms)
        except Overloaded:
            outcome["refused"] += 1
        except DeadlineExceeded:
            outcome["late"] += 1

    gaps = np.random.default_rng(1).exponential(1 / rate, max(1, int(rate * seconds)))
    arrivals = time.perf_counter() + np.cumsum(gaps)
    start, running = time.perf_counter(), []
    for number, at in enumerate(arrivals):
        if (wait := at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        running.append(asyncio.create_task(request(number)))
    await asyncio.gather(*running)
    spent = time.perf_counter() - start
    return {
        "offered_rps": rate,
        "goodput": outcome["good"] / spent,
        "p50_ms": float(np.quantile(total, 0.5)) if total else 0.0,
        "p99_ms": float(np.quantile(total, 0.99)) if total else 0.0,
        **{name: outcome[name] / len(running) for name in ("degraded", "refused", "late")},
    }


def summary(base: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures that the claim is about."""
    p50 = {name: float(np.quantile(values, 0.5)) for name, values in base.items()}
    p99 = {name: float(np.quantile(values, 0.99)) for name, values in base.items()}
    return {
        "critical_p50_ms": {name: p50[name] for name in SERVICES},
        "critical_p99_ms": {name: p99[name] for name in SERVICES},
        "total_p50_ms": {name: p50[f"total_{name}"] for name in ("aif", "sequential") if f"total_{name}" in p50},
        "total_p99_ms": {name: p99[f"total_{name}"] for name in ("aif", "sequential") if f"total_{name}" in p99},
        "critical_ratio_sequential_over_aif": p50["sequential"] / p50["aif"],
        "critical_ratio_exact_over_aif": p50["exact"] / p50["aif"],
        "critical_ratio_aif_over_two_tower": p50["aif"] / p50["two_tower"],
        "critical_ratio_aif_over_head_mlp": p50["aif"] / p50["bare_head"],
        "compute_ratio_sequential_over_aif": p50["bare_sequential"] / p50["bare_staged"],
        **{f"bare_{name}_ms": p50[f"bare_{name}"] for name in BARE},
        "engine_overhead_ms": p50["aif"] - p50["bare_interaction"],
    }


def by_setting(measured: dict, *, axis: int, fixed: int) -> dict[int, dict[str, float]]:
    """p50 of the critical path of every service along one axis of the settings."""
    kept = {key[axis]: times for key, times in measured.items() if key[1 - axis] == fixed}
    return {at: {name: float(np.quantile(kept[at][name], 0.5)) for name in SERVICES} for at in sorted(kept)}


def report(figures: dict[str, Any], options) -> None:
    """Prints everything that the JSON file holds, ratios first."""
    print(f"\nC={options.candidates}, L={options.history}, {common.machine()}\n")
    shown = ("critical_ratio", "compute_ratio", "engine", "bare", "max_rps", "goodput")
    hot = figures["back_to_back"]
    rows = [[name, value, hot.get(name, "")] for name, value in figures.items() if name.startswith(shown)]
    print(common.table(rows, ["figure", "after a wait", "back to back"]))
    rows = [[n, *[f[key][n] for f in (figures, hot) for key in ("critical_p50_ms", "critical_p99_ms")]] for n in SERVICES]
    print("\n" + common.table(rows, ["critical path", "p50 ms", "p99 ms", "back to back p50", "p99"]))
    for title, key in (("history", "critical_ms_by_history"), ("candidates", "critical_ms_by_candidates")):
        rows = [[at, *[times[name] for name in SERVICES]] for at, times in figures[key].items()]
        print("\n" + common.table(rows, [title, *SERVICES]))
    for key in ("closed_loop_aif", "closed_loop_aif_batched", "closed_loop_sequential", "open_loop_aif"):
        print(f"\n{key}\n" + common.table([list(row.values()) for row in figures[key]], list(figures[key][0])))
    print("\n" + common.table(list(figures["stage_p50_ms"].items()), ["stage of aif", "p50 ms"]))
    print("\n" + common.table(list(figures["transfers_per_request"].items()), ["transfers", "a request"]))
    print("\n" + common.table([[n, figures["total_p50_ms"][n], figures["total_p99_ms"][n]] for n in figures["total_p50_ms"]],
                              ["whole request", "p50 ms", "p99 ms"]))  # fmt: skip


def pictures(figures: dict[str, Any], answers: dict[str, Served], options) -> None:
    """Latency against history length, latency against load, one request's timeline."""
    from matplotlib.figure import Figure

    options.figures.mkdir(parents=True, exist_ok=True)
    draw({name: answers[name].timeline for name in ("aif", "sequential", "exact")}, options.figures / "timeline.png")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    history = figures["critical_ms_by_history"]
    for name in SERVICES:
        axis.loglog(list(history), [times[name] for times in history.values()], marker="o", label=name)
    axis.set(xlabel="behaviours in the long history", ylabel="critical path, p50 ms", title=f"C={options.candidates}")
    axis.legend()
    figure.savefig(options.figures / "latency_by_history.png", dpi=130)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name in ("aif", "aif_batched", "sequential"):
        rows = figures[f"closed_loop_{name}"]
        axis.plot([row["rps"] for row in rows], [row["p99_ms"] for row in rows], marker="o", label=name)
    axis.axhline(options.p99_bound_ms, color="0.7", linestyle="--")
    axis.set(xlabel="requests a second", ylabel="whole request, p99 ms", yscale="log")
    axis.legend()
    figure.savefig(options.figures / "latency_by_load.png", dpi=130)


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
