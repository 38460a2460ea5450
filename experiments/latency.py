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
          features on the device before their clock starts, and look up the ids of the candidates as the engine does. Bare
          functions run on ready inputs in the main thread, after the same wait as a request's. After a wait of 15 ms caches
          are cold, and every step of every service takes longer; so the same is measured back to back too, with state and
          candidates ready, in turns of eight requests. Weights are as initialised.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.output import track
from aif_jax.serving import DeadlineExceeded, Overloaded, compute_inline
from experiments import common, drawn, services
from experiments.services import Asked, Delays, Engine, Model, Sequential, Served, World, draw

SERVICES = ("aif", "sequential", "exact", "two_tower", "cold")
BARE = ("interaction", "head", "staged", "sequential")
"""Compiled functions on ready inputs: interaction; head; index rows, interaction and top-k; the sequential way."""
TURN, COLD, WARM = 8, 2, 3
NEW = {"cache_bytes": 0}
"""Every request is of a new user."""


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the study and prints its figures."""
    settings = {
        "items": (20_000, 300, "catalogue size"),
        "rounds": (80, 4, "requests of each service at each setting"),
        "seconds": (4.0, 0.2, "seconds of each load"),
        "p99_bound_ms": (100.0, None, "milliseconds of the whole request, for requests/s"),
        "candidates": (1000, 60, "C"),
        "history": (512, 64, "L"),
        "k": (300, 10, "best candidates that are answered"),
        "sweep_candidates": ([100, 300, 3000, 10_000], [], "further C"),
        "sweep_history": ([128, 2048, 8192], [], "further L"),
        "concurrency": ([1, 2, 4, 8, 16, 32, 64], [1, 4], "clients at once"),
    }
    options = common.options(__doc__, arguments, settings, figures="folder for the pictures")
    figures, answers = asyncio.run(study(options))
    print(f"C={options.candidates}, L={options.history}, {common.machine()}")
    if options.figures:
        pictures(figures, answers, options)
    common.report(figures, options.json)


async def study(options) -> tuple[dict[str, Any], dict[str, Served]]:
    """All measurements, and an answer of each service."""
    world = World(items=options.items)
    settings = [(options.candidates, options.history)]
    settings += [(c, options.history) for c in options.sweep_candidates]
    settings += [(options.candidates, length) for length in options.sweep_history]
    measured: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    answers: dict[str, Served] = {}
    figures: dict[str, Any] = {}
    for count, length in track(settings, label="settings", unit="settings"):
        models, k = services.models(world, length, smoke=options.smoke), min(options.k, count)
        bare = Bare(models["aif"], candidates=count, k=k)
        ways = services.services(models, count, k, NEW, uploaded=True)
        async with services.started(ways):
            for number in range(3):  # the claim is about time alone
                staged, sequential = [await ways[name].rank(new(number)) for name in ("aif", "sequential")]
                np.testing.assert_allclose(staged.logits, sequential.logits, rtol=1e-3, atol=1e-4)
            measured[count, length], found = await one_by_one(ways, bare, options.rounds)
            if (count, length) == settings[0]:
                answers = found
                figures |= stages_of(ways["aif"])
        if (count, length) == settings[0]:
            figures["back_to_back"] = summary(await back_to_back(models, bare, count, options.rounds, k))
            figures |= await load(models, options)
    figures |= summary(measured[settings[0]])
    figures["critical_ms_by_history"] = by_setting(measured, axis=1, fixed=options.candidates)
    figures["critical_ms_by_candidates"] = by_setting(measured, axis=0, fixed=options.history)
    return figures, answers


def new(number: int, **more: Any) -> Asked:
    """A request of a new user."""
    return Asked(number, object(), **more)


class Bare:
    """Compiled functions alone, called from the main thread on ready inputs: what no service can be faster than."""

    def __init__(self, made: Model, *, candidates: int, k: int):
        model, params, self.users = made.model, made.params, made.world.users
        features = jax.device_put(made.user(0))
        state = jax.block_until_ready(jax.jit(model.user)(params, features))
        rows = jnp.asarray(made.world.candidates(0, candidates), jnp.int32)
        table, decode = made.index.copy_table(), made.index.decode
        ready = jax.block_until_ready(jax.jit(decode)(table, rows))

        def staged(params: Any, state: Any, table: Any, rows: jax.Array) -> jax.Array:
            return services.best(model.interaction(params, state, decode(table, rows)), k)

        catalogue = jax.device_put(made.world.features)
        self.staged = self._timed(staged, params, state, table, rows)
        self.sequential = self._timed(services.sequential_answer(model, k), params, features, catalogue, rows)
        self.interaction = self._timed(model.interaction, params, state, ready)
        head, inputs = drawn.head_alone(made.config, candidates)
        self.head = self._timed(head, params["head"], inputs)

    @staticmethod
    def _timed(function: Any, *arguments: Any) -> Any:
        once = services.compiled(function, *arguments)
        return lambda: common.milliseconds(once)


async def one_by_one(ways: dict[str, Any], bare: Bare, rounds: int) -> tuple[dict[str, np.ndarray], dict[str, Served]]:
    """Milliseconds of the critical path of every service, one request at a time, in turn; and one answer of each."""
    names = (*ways, *(f"total_{name}" for name in ways), *(f"bare_{name}" for name in BARE))
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Served] = {}
    for number in range(-WARM, rounds):
        for name, service in ways.items():
            found[name] = await service.rank(new(number))
            times[name].append(found[name].critical_ms)
            times[f"total_{name}"].append(found[name].total_ms)
        for name in BARE:
            await asyncio.sleep(Delays().retrieval)  # as a request waits
            times[f"bare_{name}"].append(getattr(bare, name)())
    return {name: np.asarray(values[WARM:]) for name, values in times.items()}, found


async def back_to_back(models: dict[str, Model], bare: Bare, count: int, rounds: int, k: int) -> dict[str, np.ndarray]:
    """Milliseconds of the critical path where one request follows the other at once, `TURN` of a service in a row.

    User state and candidates are ready. The first `COLD` requests of a turn do not count: the caches hold data of the service
    before.
    """
    times: dict[str, list[float]] = {name: [] for name in (*SERVICES, *(f"bare_{name}" for name in BARE))}
    ways = services.services(models, count, k, uploaded=True)

    async def once(name: str, number: int) -> float:
        if name not in ways:
            return getattr(bare, name.removeprefix("bare_"))()
        return (await ways[name].rank(Asked(number, number % bare.users, Delays(0.0, 0.0)))).critical_ms

    async with services.started(ways):
        for number in range(bare.users):  # fills the state caches
            for name in ("aif", "two_tower"):
                await once(name, number)
        for turn in range(0, rounds, TURN):
            for name, values in times.items():
                values += [await once(name, number) for number in range(turn - COLD, turn + TURN)][COLD:]
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
    count, k, figures = options.candidates, min(options.k, options.candidates), {}
    ways = {
        "aif": lambda: Engine(models["aif"], count, k, NEW),
        "aif_batched": lambda: Engine(models["aif"], count, k, NEW | {"batch_size": 4}),
        "sequential": lambda: Sequential(models["aif"], count, k, uploaded=True),
    }
    for name, make in ways.items():
        async with make() as service:
            loads = {n: await services.closed_loop(service, "new", n, options.seconds) for n in options.concurrency}
        closed = [services.over_rounds([found], n) for n, found in loads.items()]
        figures[f"closed_loop_{name}"] = closed
        within = [row["rps"] for row in closed if row["p99_ms"] <= options.p99_bound_ms]
        figures[f"max_rps_{name}"] = max(within, default=0.0)
    sustainable = max((row["rps"] for row in figures["closed_loop_aif"]), default=1.0)
    sustainable = figures["max_rps_aif"] or sustainable
    budget = options.p99_bound_ms / 1e3
    # as many at once as can be answered in half the budget (Little's law)
    async with Engine(models["aif"], count, k, NEW | {"max_pending": max(2, int(sustainable * budget / 2))}) as service:
        figures["open_loop_aif"] = [
            await open_loop(service, share * sustainable, options.seconds, budget) for share in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
        ]
    best = max(row["goodput"] for row in figures["open_loop_aif"])
    figures["goodput_at_twice_over_max"] = figures["open_loop_aif"][-1]["goodput"] / max(best, 1e-9)
    return figures


async def open_loop(service: Engine, rate: float, seconds: float, budget: float) -> dict[str, float]:
    """Poisson arrivals at a rate; goodput counts what was answered in full within the budget."""
    outcome: Counter[str] = Counter()
    total: list[float] = []

    async def request(number: int) -> None:
        try:
            answer = await service.rank(new(number, budget=budget))
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


def pictures(figures: dict[str, Any], answers: dict[str, Served], options) -> None:
    """Latency against history length, latency against load, one request's timeline."""
    draw({name: answers[name].timeline for name in ("aif", "sequential", "exact")}, options.figures / "timeline.png")
    with common.picture(options.figures / "latency_by_history.png", size=(6, 4), dpi=130) as (_, axis):
        history = figures["critical_ms_by_history"]
        for name in SERVICES:
            axis.loglog(list(history), [times[name] for times in history.values()], marker="o", label=name)
        axis.set(xlabel="behaviours in the long history", ylabel="critical path, p50 ms", title=f"C={options.candidates}")
        axis.legend()
    with common.picture(options.figures / "latency_by_load.png", size=(6, 4), dpi=130) as (_, axis):
        for name in ("aif", "aif_batched", "sequential"):
            rows = figures[f"closed_loop_{name}"]
            axis.plot([row["rps"] for row in rows], [row["p99_ms"] for row in rows], marker="o", label=name)
        axis.axhline(options.p99_bound_ms, color="0.7", linestyle="--")
        axis.set(xlabel="requests a second", ylabel="whole request, p99 ms", yscale="log")
        axis.legend()


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
