"""The main job: what a pre-ranker keeps of what the ranker behind it wants, and what it costs, in one table and one picture.

Claim     Taught by the ranker that it serves, AIF keeps more of the ranker's top 10 than a two-tower model taught alike, and
          answers sooner and with less CPU than the ranker would for all candidates.
Command   python -m experiments.quickstart            (or --smoke, --data DIR, --json FILE; --help lists all)
Time      `--json` has `seconds_by_part`, of wall clock and CPU
Data      MovieLens-100K, fetched; films with their first genre as category, without text
Cascade   as in `experiments.ranker_recall`: PureSVD finds 1,000 films that the user has not rated, a pre-ranker keeps 100, the
          ranker orders these. Ranker: full attention with a head of (128, 64). Pre-rankers: `presets.two_tower`, `presets.aif`,
          both taught: one more listwise term of weight 16 on the ranker's scores of 40 retrieved films a sample.
          To save time all are trained for one epoch, not three, on the newer half of the training events, read 128 events of a
          history, not 512, and have one seed.
Protocol  split by time: training before the last 10 % of all events, one evaluation on requests from these; brackets: 95 %
          over users. All scores have the popularity correction of serving.
Cost      the pre-rankers in `AsyncPreRanker`, the ranker for all candidates as one function that starts when these arrive.
          Feature fetch is a delay of 2 ms, retrieval one of 15 ms. Every request is of a new user. Milliseconds after retrieval
          and CPU are of requests one at a time, the ways in turn; requests a second of closed loops, 99 % within 30 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics, train
from aif_jax.data import item_counts
from aif_jax.output import track
from aif_jax.train.distillation import RankedCandidates, Scores, model_scores, rank_retrieved
from experiments import common, ranker_recall, services, tables
from experiments.datasets import fetch, movielens
from experiments.datasets.synthetic import synthetic_world
from experiments.services import Asked, DataWorld, Delays, Engine, Model, Sequential, Served
from experiments.study import question, rankers, retrieval
from experiments.study.datasets import StudyData
from experiments.study.question import Requests

LENGTH = 128  # events of a history that the ranker and AIF read
SMOKE: dict[str, Any] = dict(width=16, towers=(32,))
NAMES = {"two_tower": "two-tower", "aif": "AIF", "ranker": "the ranker itself"}
PRERANKERS = ("aif", "two_tower")  # the longest first
TOP, WIDE = ranker_recall.TOPS
CALLERS = (4, 8, 16, 32, 48)
NEXT = """Next, with your own files, as docs/tutorial_own_data.md explains:
  aif-jax check --events EVENTS --items ITEMS"""


class World(NamedTuple):
    """Requests, what retrieval finds for them, and for every training event."""

    data: Dataset
    positions: np.ndarray  # int64 [R] requests
    found: np.ndarray  # int32 [R, C] catalogue rows, 0 for none
    samples: np.ndarray  # int64 [n] training events
    teaching: np.ndarray  # int32 [events of the log, 64]
    since: int  # seconds: training samples are from here on,
    first: int  # and before this, the first moment of the requests
    repeats: bool
    keep: int  # candidates after the cut


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run the job and print its figures."""
    options, parts = parse(arguments), common.Parts()
    with parts("data and retrieval"):
        world = retrieved(load(options), options)
    print(f"data: {world.data}")
    with parts("ranker"):
        ranker = fit("ranker", world, options)
        scores = model_scores(ranker.model, ranker.params, world.data)
        with tempfile.TemporaryDirectory() as folder:
            given: dict[str, Any] = {"repeats": world.repeats, "progress": not options.quiet}
            ranked = rank_retrieved(scores, world.data, world.samples, world.teaching, folder=Path(folder), name="", **given)
    with parts("pre-rankers"):
        trained = teach(world, ranked, options)
    trained = {name: (trained | {"ranker": ranker})[name] for name in NAMES}
    with parts("evaluation"):
        whole = {name: run.with_popularity_correction(world.data) for name, run in trained.items()}
        quality = evaluate(world, {name: model_scores(run.model, run.params, world.data) for name, run in whole.items()})
    with parts("index"):
        catalogue = DataWorld(world.data)
        models = {name: Model.trained(catalogue, run, world.data, seed=options.seed) for name, run in whole.items()}
    measured, loads = asyncio.run(serve(models, options, parts))
    figures = {name: quality[name] | latency(measured[name]) | loads[name] for name in NAMES}
    report(figures, world, options)
    with parts("picture"):
        picture(measured, options.figure)
    print("\n" + str(parts))
    common.write_json(
        options.json,
        {
            "models": figures,
            "candidates": world.found.shape[1],
            "kept": world.keep,
            "requests": len(world.positions),
            "dataset": world.data.name,
            "seconds": parts.total.wall,
            "seconds_by_part": {name: spent.wall for name, spent in parts.spent.items()},
            "cpu_seconds_by_part": {name: spent.cpu for name, spent in parts.spent.items()},
        },
    )
    if options.out is not None:
        print(f"the run of the AIF model is in {options.out}")
    print(NEXT)


def parse(arguments: list[str] | None):
    """Return the command line."""
    settings = {
        "epochs": (1, None, "passes over the training samples"),
        "requests": (500, 40, "held-out requests that are evaluated"),
        "served": (60, 6, "requests answered one at a time in each way"),
        "seconds": (0.5, 0.1, "seconds of each closed loop"),
        "candidates": (1000, 40, "candidates that retrieval finds"),
        "retrieval_ms": (15.0, None, "how long retrieval takes"),
        "seed": (0, None, "seed of parameters, order and negatives"),
        "figure": (Path("quickstart.png"), None, "the picture"),
    }
    paths = {
        "data": "a folder with MovieLens files of any release, in place of a fetched one",
        "cache": "where fetched data is kept (default: the user's cache)",
        "out": "keep the run of the AIF model there: checkpoints and logs",
    }
    return common.options(__doc__, arguments, settings, **paths)


def load(options) -> Dataset:
    """Return the synthetic world, a MovieLens folder, or a fetched release."""
    if options.smoke:
        return synthetic_world(options.seed, users=60, items=200, topics=10, categories=10, events_per_user=60).dataset
    if options.data is not None:
        return movielens.read(options.data, behaviour_fields=("year",))
    fetched = fetch.fetch_movielens(cache_dir=options.cache)
    print(f"{fetch.NAME} from {'the cache, first from ' if fetched.cached else ''}{fetched.source}: {fetched.path}")
    if fetched.reason:
        print(f"  ({fetched.reason})")
    return movielens.read(fetched.path, behaviour_fields=("year",))


def retrieved(data: Dataset, options) -> World:
    """Return requests of the test split and training events, each with its candidates."""
    study = StudyData(name="smoke" if options.smoke else "movielens", dataset=data, split=aif.data.split_by_time(data.log))
    trial = question.Trial(dataset=study.name, model="", split="test")
    (part,) = question.parts_of(trial, study)
    every, counts = question.requests_of(trial, part, study), item_counts(data, part.seen)
    some = np.sort(np.random.default_rng(1).permutation(len(every.positions))[: options.requests])
    requests = Requests(*(each[some] for each in every))
    found = retrieval.of_requests(study, part, requests, counts)[:, : options.candidates]
    since, first = int(np.median(data.log.time[part.seen])), int(data.log.time[part.held].min())
    samples = train.NextItem().positions(data, min_history=1, since=since, before=first)
    teaching = retrieval.of_training(study, part, samples, counts)
    return World(
        data, requests.positions, found, samples, teaching, since, first, study.repeats, max(TOP, found.shape[1] // 10)
    )


def fit(name: str, world: World, options, teacher: train.Teacher | None = None) -> aif.Run:
    """Train a model on the events from `since` on that are before the requests."""
    data, changes = world.data, SMOKE if options.smoke else {}
    if name == "two_tower":
        config = aif.presets.two_tower(data.schema, **changes)
    elif name == "aif":
        config = aif.presets.aif(data.schema, long_length=LENGTH, **changes)
    else:
        config = aif.presets.full_attention(data.schema, long_length=LENGTH, head=rankers.HEAD, **changes)
    span: dict[str, Any] = {"since": world.since, "validation": 0.0, "test": world.first}
    settings = aif.FitConfig(epochs=options.epochs, seed=options.seed, keep_best=None, k=None, **span)
    out, shown = options.out if name == "aif" else None, name != "two_tower" and not options.quiet
    given: dict[str, Any] = {"out": out, "teacher": teacher, "progress": shown}
    return aif.fit(aif.build(config), data, settings, task=train.NextItem(), **given)


def teach(world: World, ranked: RankedCandidates, options) -> dict[str, aif.Run]:
    """Return the pre-rankers, taught; two at a time, since compiling keeps one core busy."""

    def known(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found, scores = ranked.at(positions)
        assert (found == rows).all()  # `fit` takes the same candidates as `rank_retrieved` did
        return scores

    teacher = train.Teacher(known, candidates=world.teaching)
    with ThreadPoolExecutor(2, thread_name_prefix="train") as pool:
        jobs = {name: pool.submit(copy_context().run, fit, name, world, options, teacher) for name in PRERANKERS}
        return {name: job.result() for name, job in jobs.items()}


def evaluate(world: World, scores: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """Return ranker recall of the cut and the cascade's share of HR@10, with their intervals."""
    target, users = world.data.log.item[world.positions], world.data.log.user[world.positions]
    every = {
        name: np.where(world.found > 0, of(world.positions, world.found), ranker_recall.LAST) for name, of in scores.items()
    }
    made = {}
    for name, ours in every.items():
        values = ranker_recall.of_cuts(ours, every["ranker"], world.found == target[:, None], (world.keep,))
        by_user = {key: metrics.mean_by_user(value, users) for key, value in values.items()}
        tops = (TOP, WIDE if WIDE <= world.keep else TOP)
        recall, wide = (metrics.user_interval(by_user[f"recall{top}@-{world.keep}"]) for top in tops)
        share = metrics.paired_interval(by_user[f"hr10@-{world.keep}"], by_user["ranker_hr10@"], ratio=True)
        made[name] = {
            f"{key}{end}": value
            for key, interval in (("recall", recall), ("wide", wide), ("share", share))
            for end, value in zip(ranker_recall.ENDS, interval, strict=True)
        }
    return made


class Measured(NamedTuple):
    """One answered request."""

    answer: Served
    cpu_ms: float  # of all threads of the process


async def serve(
    models: dict[str, Model], options, parts: common.Parts
) -> tuple[dict[str, list[Measured]], dict[str, dict[str, float]]]:
    """Answer the same requests in every way, in turn, then as many as it can."""
    delays = Delays(min(0.002, options.retrieval_ms / 1e3), options.retrieval_ms / 1e3)
    count = min(options.candidates, models["aif"].world.items)
    config = {"max_pending": 256, "user_threads": 2, "score_threads": 2}
    made = {name: (model, count, max(TOP, count // 10)) for name, model in models.items()}
    ways = {name: Sequential(*its) if name == "ranker" else Engine(*its, config) for name, its in made.items()}
    measured: dict[str, list[Measured]] = {way: [] for way in ways}
    loads: dict[str, dict[str, float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        with parts("start engines"):
            await asyncio.gather(*(way.__aenter__() for way in ways.values()))
            for way in ways.values():
                stack.push_async_exit(way)
                await way.rank(Asked(0, "first"))
        with parts("requests"):
            for number in track(range(options.served), label="requests in three ways", unit="requests"):
                for name in list(ways) if number % 2 == 0 else reversed(ways):
                    cpu = time.process_time()
                    answer = await ways[name].rank(Asked(number, number, delays))  # a new user
                    measured[name].append(Measured(answer, 1e3 * (time.process_time() - cpu)))
            for name, way in ways.items():
                rows = []
                for callers in CALLERS[:1] if options.smoke else CALLERS:
                    load = await services.closed_loop(way, "new", callers, options.seconds)
                    rows.append(services.over_rounds([load], callers))
                best = tables.within(rows)
                loads[name] = {"rps": best["rps"] if best else 0.0}
    return measured, loads


def latency(measured: list[Measured]) -> dict[str, float]:
    """Return milliseconds after retrieval of some requests, p50 and p99, and the median of their CPU time."""
    critical = [each.answer.critical_ms for each in measured]
    figures = {f"after_retrieval_ms_p{p}": float(np.percentile(critical, p)) for p in (50, 99)}
    return figures | {"cpu_ms": float(np.median([each.cpu_ms for each in measured]))}


def report(figures: dict[str, Any], world: World, options) -> None:
    """Print the table, and what it says."""
    rows = []
    for name, of in figures.items():
        recall, wide, share = (
            tables.spread(metrics.Interval(*(of[f"{key}{end}"] for end in ranker_recall.ENDS)), digits, scale=scale)
            for key, digits, scale in (("recall", 1, 100), ("wide", 1, 100), ("share", 2, 1))
        )
        after = f"{of['after_retrieval_ms_p50']:.1f} / {of['after_retrieval_ms_p99']:.1f}"
        rows.append(
            [NAMES[name], recall, wide, share, after, f"{of['cpu_ms']:.1f}", f"{of['rps']:,.0f}" if of["rps"] else "none"]
        )
    header = [
        "",
        f"ranker recall@{TOP}, %",
        f"@{WIDE}, %",
        "cascade's share",
        "after retrieval, ms p50 / p99",
        "CPU, ms",
        "requests a second",
    ]
    print("\n" + common.table(rows, header))
    within = f"{tables.BOUND:g} ms, {options.retrieval_ms:g} of them retrieval, on {common.threads()} cores"
    requests, candidates = world.found.shape
    print(
        f"\n{requests:,} held-out requests; {candidates:,} retrieved candidates are cut to {world.keep}.\n"
        f"Ranker recall@{TOP}: what the cut keeps of the ranker's best {TOP}. Cascade's share: HR@{TOP} of the ranker\n"
        f"after the cut, over the ranker on all. Requests a second: the most of which 99 % are answered within {within}.\n"
        "One epoch over half of the data, 128 events, one seed; docs/results.md has three epochs, 512 events and other data."
    )


def picture(measured: dict[str, list[Measured]], path: Path) -> None:
    """Draw what a typical request of each way waits for after its candidates have arrived."""
    drawn = {}
    for name, requests in measured.items():
        typical = sorted(requests, key=lambda each: each.answer.critical_ms)[len(requests) // 2].answer
        drawn[f"{NAMES[name]}: {typical.critical_ms:.1f} ms"] = typical.timeline
    services.draw(drawn, path)


if __name__ == "__main__":
    main()
