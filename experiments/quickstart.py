"""The main job: train AIF on real interactions, index the catalogue, answer requests in the staged way.

Claim     AIF ranks better than a two-tower model, and its critical path is shorter than with the same model run sequentially.
Command   python -m experiments.quickstart            (or --smoke, --data DIR, --json FILE; --help lists all)
Data      MovieLens-100K, fetched; next item: which movie does the user rate next?
Models    `presets.aif` and `presets.two_tower`, trained alike: the same samples, epochs and optimizer, untuned. Both get the
          factors of co-engagement (`Run.with_factors`) and an offset of each item (`Run.for_catalogue`), which are fitted in
          seconds after training; the offset is left out where candidates are drawn by popularity (log-loss, AUC, GAUC).
Protocol  split by time: training on the first 80 % of all events; the next 10 % choose the best epoch; figures are of requests
          from the last 10 %, evaluated once. Under load: closed loops of 64 callers, as in `experiments.cost`, over the trained
          models; candidates are drawn from all items.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax.data.dataset import Dataset
from experiments import common, cost
from experiments.datasets import fetch, movielens
from experiments.datasets.synthetic import synthetic_world
from experiments.latency_services import DataWorld, Model
from experiments.staged import Answer, Server, draw_answers

SMOKE: dict[str, Any] = dict(width=16, long_length=64, towers=(32,))
MIN_HISTORY = 5  # earlier events of the user of a held-out request
QUALITY = {"log_loss": "log-loss", "auc": "AUC", "gauc": "GAUC", "hr100": "HR@100"}


class Quality(NamedTuple):
    """What a model is judged by."""

    log_loss: float
    auc: float
    gauc: float
    hr100: float


def main(arguments: list[str] | None = None) -> None:
    """Runs the job and prints its figures."""
    options = parse(arguments)
    began = time.perf_counter()
    data = load(options)
    print(f"data: {data}")

    runs: dict[str, aif.Run] = {}
    figures: dict[str, Quality] = {}
    for preset in (aif.presets.two_tower, aif.presets.aif):
        name = preset.__name__
        trained = aif.fit(
            aif.build(preset(data.schema, **(SMOKE if options.smoke else {}))),
            data,
            out=options.out if name == "aif" else None,
            epochs=options.epochs,
            batch_size=options.batch_size,
            requests=options.requests,
            seed=options.seed,
        )
        factored = trained.with_factors(data)
        runs[name] = factored.for_catalogue(data)
        figures[f"{name}, as trained"] = evaluate(trained, trained.for_catalogue(data), data, options)
        figures[name] = evaluate(factored, runs[name], data, options)
    print("\n" + common.table([[name, *found] for name, found in figures.items()], ["model", *QUALITY.values()]) + "\n")
    if options.out is not None:
        print(f"the run of the AIF model is in {options.out}")

    times, cpu, difference, typical, overlap = serve(runs["aif"], runs["two_tower"], data, options)
    staged, sequential = float(np.median(times["staged"])), float(np.median(times["sequential"]))
    print(f"{len(times['staged'])} requests each way, interleaved, {options.candidates} candidates at most:")
    print(f"  critical path, median: staged {staged:.2f} ms, sequential {sequential:.2f} ms, ratio {sequential / staged:.2f}")
    print(f"  critical path, p99:    staged {np.percentile(times['staged'], 99):.2f} ms, "
          f"sequential {np.percentile(times['sequential'], 99):.2f} ms")  # fmt: skip
    print("  CPU a request, mean:   " + ", ".join(f"{way} {np.mean(spent):.2f} ms" for way, spent in cpu.items()))
    print(f"  largest difference between staged and joint scores: {difference:.2e}")
    print(f"  top items the same both ways: {overlap:.1%}")
    draw_answers(typical, options.figure)
    print(f"timelines drawn in {options.figure}")
    loaded = asyncio.run(under_load(runs, data, options))
    rows = [[name, *values] for name, values in loaded.items()]
    print("\n" + common.table(rows, ["under load", "CPU ms a request", "requests/s"]) + "\n")

    seconds = time.perf_counter() - began
    print(f"done in {seconds:.0f} s")
    common.write_json(
        options.json,
        figures["aif"]._asdict()
        | {f"two_tower_{key}": value for key, value in figures["two_tower"]._asdict().items()}
        | {f"{key}_as_trained": value for key, value in figures["aif, as trained"]._asdict().items()}
        | {f"two_tower_{key}_as_trained": value for key, value in figures["two_tower, as trained"]._asdict().items()}
        | {
            "max_abs_staged_minus_joint": difference,
            "critical_path_ms_staged": staged,
            "critical_path_ms_sequential": sequential,
            "cpu_ms_staged": float(np.mean(cpu["staged"])),
            "cpu_ms_sequential": float(np.mean(cpu["sequential"])),
            "cpu_ms_under_load": {name: spent for name, (spent, _) in loaded.items()},
            "requests_per_s_under_load": {name: rate for name, (_, rate) in loaded.items()},
            "dataset": data.name,
            "n_users": len(data.users) - 1,
            "n_items": len(data.items) - 1,
            "n_events": len(data.log),
            "seconds": seconds,
        },
    )


def evaluate(sampled: aif.Run, whole: aif.Run, data: Dataset, options) -> Quality:
    """Figures of held-out requests: of a run on sampled candidates, and of the same with its offset on the whole catalogue."""
    given: dict[str, Any] = dict(requests=options.requests, min_history=MIN_HISTORY)
    found = sampled.evaluate(data, k=None, **given)
    return Quality(found.log_loss, found.auc, found.gauc, whole.evaluate(data, **given).hit_rate)


def parse(arguments: list[str] | None):
    """The command line; unset sizes depend on --smoke."""
    parser = common.parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="DIR", type=Path, help="a folder with MovieLens files of any release")
    source.add_argument("--dataset", default="ml-100k", choices=sorted(fetch.RELEASES), help="the release to fetch")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="where fetched data is kept (default: the user's cache)")
    parser.add_argument("--epochs", type=int, help="passes over the training samples (default 3; smoke 1)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a step (default %(default)s)")
    parser.add_argument("--requests", type=int, help="held-out requests (default 2000; smoke 200)")
    parser.add_argument("--served", type=int, help="requests answered in each way (default 300; smoke 30)")
    parser.add_argument("--candidates", type=int, default=1000, help="that retrieval finds (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep the run of the AIF model there: checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, order and negatives (default %(default)s)")
    parser.add_argument(
        "--figure", metavar="PNG", type=Path, default=Path("quickstart_timelines.png"), help="default %(default)s"
    )
    options = parser.parse_args(arguments)
    for name, usual, smoke in (("epochs", 3, 1), ("requests", 2000, 200), ("served", 300, 30)):
        if getattr(options, name) is None:
            setattr(options, name, smoke if options.smoke else usual)
    for name in ("epochs", "batch_size", "requests", "served", "candidates"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    return options


def load(options) -> Dataset:
    """The synthetic world, a MovieLens folder, or a fetched release; with content from titles, genres and tags."""
    if options.smoke:
        return synthetic_world(options.seed, users=100, items=400, topics=20, categories=20, events_per_user=120).dataset
    if options.data is not None:
        return movielens.read(options.data, content="text")
    fetched = fetch.fetch_movielens(options.dataset, cache_dir=options.cache)
    print(f"{options.dataset} from {'the cache, first from ' if fetched.cached else ''}{fetched.source}: {fetched.path}")
    if fetched.reason:
        print(f"  ({fetched.reason})")
    return movielens.read(fetched.path, content="text")


def serve(run: aif.Run, retrieval: aif.Run, data: Dataset, options):
    """Answers requests both ways in turn.

    Returns:
      Critical-path and CPU milliseconds of each way, the largest |staged - joint|, the answers of a typical request, and the
      share of top items that both ways agree on.
    """
    server = Server(run, retrieval, data, candidates=options.candidates, k=100)
    ways = {"staged": server.staged, "sequential": server.sequential}
    latest = np.argsort(data.log.time, kind="stable")[-max(1, len(data.log) // 10) :]
    positions = np.random.default_rng(options.seed).choice(latest, options.served)
    for way in ways.values():  # compiles
        way(int(positions[0]))
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}  # of all threads
    bar = tqdm(total=options.served, desc="requests, staged and sequential", unit="request")

    def answered(name: str):
        def answer(i: int) -> float:
            spent = time.process_time()
            answers[name].append(ways[name](int(positions[i])))
            cpu[name].append(1e3 * (time.process_time() - spent))
            bar.update(0.5)
            return answers[name][-1].critical_ms

        return answer

    times = common.interleaved({name: answered(name) for name in ways}, options.served)
    bar.close()
    checked = [(int(at), answer) for at, answer in zip(positions, answers["staged"], strict=True)][:50]
    difference = max(float(np.abs(server.joint(at, answer.items) - answer.scores).max()) for at, answer in checked)
    pairs = zip(answers["staged"], answers["sequential"], strict=True)
    overlap = float(np.mean([len(np.intersect1d(a.items, b.items)) / len(a.items) for a, b in pairs]))
    typical = {name: answers[name][int(np.argsort(times[name])[options.served // 2])] for name in ways}
    server.close()
    return times, cpu, difference, typical, overlap


async def under_load(runs: dict[str, aif.Run], data: Dataset, options) -> dict[str, tuple[float, float]]:
    """CPU milliseconds a request and requests a second of callers who wait for nothing but the answer, median over rounds."""
    world = DataWorld(data)
    count = min(options.candidates, world.items)
    sizes = SimpleNamespace(candidates=count, batch_size=2 if options.smoke else 8, threads=2)
    callers, rounds, seconds = (4, 1, 0.05) if options.smoke else (64, 7, 0.5)
    made = {name: Model.trained(world, run, data) for name, run in runs.items()}
    k = min(100, count)
    services: dict[str, Any] = {name: cost.Engine(model, sizes, k) for name, model in made.items()}
    services["aif, sequential"] = cost.Sequential(made["aif"], sizes, k)
    kinds = {"new users": "new", "cached states": "returning_0"}
    found: dict[str, list[cost.Load]] = {}
    async with contextlib.AsyncExitStack() as stack:
        for service in services.values():
            await stack.enter_async_context(service)
        for turn in tqdm(range(rounds + 1), desc="closed loops"):
            for name, service in services.items():
                for label, kind in kinds.items() if isinstance(service, cost.Engine) else [("new users", "new")]:
                    measured = await cost.closed_loop(service, kind, callers, seconds)
                    found.setdefault(f"{name}, {label}", []).extend([measured] if turn else [])  # the first one warms up
    return {
        name: (
            float(np.median([1e3 * each.cpu_seconds / each.requests for each in loads])),
            float(np.median([each.requests / each.seconds for each in loads])),
        )
        for name, loads in found.items()
    }


if __name__ == "__main__":
    main()
