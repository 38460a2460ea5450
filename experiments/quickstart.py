"""The main job: what a pre-ranker keeps of what the ranker behind it wants, and what it costs, in one table and one picture.

Claim     Taught by the ranker that it serves, AIF keeps more of the ranker's top 10 than a two-tower model taught alike, and
          answers sooner than the ranker would for all candidates.
Command   python -m experiments.quickstart            (or --smoke, --data DIR, --json FILE; --help lists all)
Time      `--json` has `seconds_by_part`, of wall clock and CPU
Data      MovieLens-100K, fetched; films with their first genre as category, without text
Cascade   PureSVD finds 1,000 films that the user has not rated, a pre-ranker keeps 20, the ranker orders these. Ranker: full
          attention with a head of (128, 64). Pre-rankers: `presets.two_tower`, `presets.aif`. Why 20: of 1,682 films, a cut to
          100 as in docs/results.md loses nothing with either. This was chosen on validation users (`--split validation`).
Recipe    of all three models: one epoch over the newest SAMPLES training events, the last LENGTH events of a history (two-tower
          has its preset's 32), one seed. Both pre-rankers are taught: one more listwise term of weight 16 on the ranker's
          scores of 40 retrieved films a sample. All scores have the popularity correction of serving.
Protocol  split by time: training before the last 10 % of all events, one evaluation on requests from these, of users with as
          many unseen films as retrieval finds; brackets: 95 % over users
Cost      the pre-rankers in `AsyncPreRanker`, the ranker for all candidates as one function that starts when these arrive;
          every request is of a new user. Milliseconds after retrieval: requests one at a time, the ways in turn; feature fetch
          is a delay of 2 ms, retrieval one of 15 ms. CPU and requests a second: all requests by CALLERS callers at once,
          without delays, in ROUNDS parts, the ways in turn. Ranker recall is of these answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics, train
from aif_jax.data import item_counts
from aif_jax.output import track
from aif_jax.train.distillation import RankedCandidates, model_scores, rank_retrieved
from experiments import common, services, tables
from experiments.datasets import fetch, movielens
from experiments.datasets.synthetic import synthetic_world
from experiments.services import Asked, DataWorld, Delays, Engine, Model, Sequential, Served
from experiments.study import question, rankers, retrieval
from experiments.study.datasets import StudyData
from experiments.study.question import Requests

SAMPLES = 20_000  # training events, the newest
LENGTH = 512  # events of a history that the ranker and AIF read
TOP = 10  # what the ranker wants: its best ones
CALLERS, ROUNDS = 8, 4
SMOKE: dict[str, Any] = dict(width=8, towers=(16,), long_length=32, sequence=False)
MODELS: dict[str, tuple[Callable[..., aif.Config], dict[str, Any]]] = {
    "two_tower": (aif.presets.two_tower, {}),
    "aif": (aif.presets.aif, {"long_length": LENGTH}),
    "ranker": (aif.presets.full_attention, {"long_length": LENGTH, "head": rankers.HEAD}),
}
NAMES = {"two_tower": "two-tower", "aif": "AIF", "ranker": "the ranker itself"}
PRERANKERS = ("aif", "two_tower")  # the longest first
NEXT = """Next, with your own files, as docs/tutorial_own_data.md explains:
  aif-jax check --events EVENTS --items ITEMS"""


class Spent(NamedTuple):
    """Seconds of a part of the script."""

    wall: float = 0.0
    cpu: float = 0.0  # of all threads


class Parts(dict[str, Spent]):
    """Where the time of the script goes: `with parts("train"): ...`; a part that comes again is added up."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the body."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        before = self.get(name, Spent())
        self[name] = Spent(before.wall + time.perf_counter() - wall, before.cpu + time.process_time() - cpu)


class World(NamedTuple):
    """Requests, what retrieval finds for them, and for every training event."""

    data: Dataset
    positions: np.ndarray  # int64 [R] requests
    found: np.ndarray  # int32 [R, C] catalogue rows
    samples: np.ndarray  # int64 [n] training events
    teaching: np.ndarray  # int32 [events of the log, 64]
    span: dict[str, Any]  # of the samples, as `FitConfig` takes it


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run the job and print its figures."""
    options, parts, began = parse(arguments), Parts(), time.perf_counter()
    with parts("data and retrieval"):
        world = retrieved(load(options), options)
    print(f"data: {world.data}")
    with parts("ranker"):
        ranker = fit("ranker", world, options)
        scores = model_scores(ranker.model, ranker.params, world.data)
        with tempfile.TemporaryDirectory() as folder:
            ranked = rank_retrieved(scores, world.data, world.samples, world.teaching, folder=Path(folder), name="")
    with parts("pre-rankers"):
        trained = teach(world, ranked, options) | {"ranker": ranker}
    with parts("index"):
        requests = DataWorld(world.data, world.positions, world.found)
        whole = {name: trained[name].with_popularity_correction(world.data) for name in NAMES}
        models = {name: Model.of(requests, run.trained) for name, run in whole.items()}
    answered = asyncio.run(serve(models, options, parts))
    figures = evaluate(world, answered, options.keep)
    report(figures, world, options)
    with parts("picture"):
        picture(answered, figures, options)
    seconds = time.perf_counter() - began
    print(f"\n{seconds:.0f} s; by part: {', '.join(f'{name} {spent.wall:.0f}' for name, spent in parts.items())}")
    common.write_json(
        options.json,
        {
            **figures,
            "candidates": world.found.shape[1],
            "kept": options.keep,
            "requests": len(world.positions),
            "dataset": world.data.name,
            "split": options.split,
            "seconds": seconds,
            "seconds_by_part": {name: spent.wall for name, spent in parts.items()},
            "cpu_seconds_by_part": {name: spent.cpu for name, spent in parts.items()},
        },
    )
    if options.out is not None:
        print(f"the run of the AIF model is in {options.out}")
    print(NEXT)


def parse(arguments: list[str] | None):
    """Return the command line."""
    settings = {
        "epochs": (1, None, "passes over the training samples"),
        "requests": (600, 40, "held-out requests that are evaluated"),
        "served": (60, 6, "requests answered one at a time in each way"),
        "candidates": (1000, 40, "candidates that retrieval finds"),
        "keep": (20, 10, "candidates that a pre-ranker keeps", TOP),
        "retrieval_ms": (15.0, None, "how long retrieval takes"),
        "seed": (0, None, "seed of parameters, order and negatives"),
        "figure": (Path("quickstart.png"), None, "the picture"),
    }
    paths = {
        "data": "a folder with MovieLens files of any release, in place of a fetched one",
        "cache": "where fetched data is kept (default: the user's cache)",
        "out": "keep the run of the AIF model there: checkpoints and logs",
    }
    parser = common.parser(__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="the requests (default: %(default)s)")
    return common.options(parser, arguments, settings, **paths)


def load(options) -> Dataset:
    """Return the synthetic world, a MovieLens folder, or a fetched release."""
    if options.smoke:
        return synthetic_world(options.seed, users=60, items=200, topics=10, categories=10, events_per_user=30).dataset
    if options.data is not None:
        return movielens.read(options.data, behaviour_fields=("year",))
    fetched = fetch.fetch_movielens(cache_dir=options.cache)
    print(f"{fetch.NAME} from {'the cache, first from ' if fetched.cached else ''}{fetched.source}: {fetched.path}")
    if fetched.reason:
        print(f"  ({fetched.reason})")
    return movielens.read(fetched.path, behaviour_fields=("year",))


def retrieved(data: Dataset, options) -> World:
    """Return requests of the split and training events before them, each with its candidates."""
    study = StudyData(name="smoke" if options.smoke else "movielens", dataset=data, split=aif.data.split_by_time(data.log))
    trial = question.Trial(dataset=study.name, model="", split=options.split)
    (part,) = question.parts_of(trial, study)
    every, counts = question.requests_of(trial, part, study), item_counts(data, part.seen)
    some = np.sort(np.random.default_rng(1).permutation(len(every.positions))[: options.requests])
    requests = Requests(*(each[some] for each in every))
    found = retrieval.of_requests(study, part, requests, counts)[:, : options.candidates]
    whole = (found > 0).all(1)
    since, first = np.sort(data.log.time[part.seen])[-SAMPLES:][0], data.log.time[part.held].min()
    samples = train.NextItem().positions(data, min_history=1, since=int(since), before=int(first))
    teaching = retrieval.of_training(study, part, samples, counts)
    span = {"since": int(since), "validation": 0.0, "test": int(first)}
    return World(data, requests.positions[whole], found[whole], samples, teaching, span)


def fit(name: str, world: World, options, teacher: train.Teacher | None = None) -> aif.Run:
    """Train a model on the samples."""
    preset, changes = MODELS[name]
    config = preset(world.data.schema, **changes | (SMOKE if options.smoke else {}))
    settings = aif.FitConfig(epochs=options.epochs, seed=options.seed, keep_best=None, k=None, **world.span)
    out, shown = options.out if name == "aif" else None, name != "two_tower" and not options.quiet
    return aif.fit(aif.build(config), world.data, settings, task=train.NextItem(), out=out, teacher=teacher, progress=shown)


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


class Answered(NamedTuple):
    """What one way answered."""

    every: list[Served]  # all requests, by several callers,
    spent: Spent  # which took so long
    lone: list[Served]  # requests one at a time


async def serve(models: dict[str, Model], options, parts: Parts) -> dict[str, Answered]:
    """Answer some requests one at a time, then all by several callers, in every way."""
    delays = Delays(min(0.002, options.retrieval_ms / 1e3), options.retrieval_ms / 1e3)
    count, config = options.candidates, {"max_pending": 256, "user_threads": 2, "score_threads": 2}
    ways: dict[str, Any] = {
        name: Sequential(model, count, count) if name == "ranker" else Engine(model, count, options.keep, config)
        for name, model in models.items()
    }
    every, lone = ({name: [] for name in ways} for _ in range(2))
    numbers, loads = np.arange(models["aif"].world.users), Parts()
    async with contextlib.AsyncExitStack() as stack:
        with parts("start engines"):
            await asyncio.gather(*(stack.enter_async_context(way) for way in ways.values()))
            for way in ways.values():
                await way.rank(Asked(0, "first"))
        with parts("requests one at a time"):
            for number in track(range(options.served), label="requests in three ways", unit="requests"):
                for name in list(ways) if number % 2 == 0 else reversed(ways):
                    lone[name].append(await ways[name].rank(Asked(number, number, delays)))  # a new user
        with parts("requests at once"):
            for some in np.array_split(numbers, ROUNDS):
                for name, way in ways.items():
                    with loads(name):
                        every[name] += await at_once(way, some.tolist())
    return {name: Answered(every[name], loads[name], lone[name]) for name in ways}


async def at_once(way: Any, numbers: Iterable[int]) -> list[Served]:
    """Return the answers to requests of new users; each of CALLERS callers sends the next one when it has its answer."""
    answers, left = {}, iter(numbers)

    async def caller() -> None:
        for number in left:
            answers[number] = await way.rank(Asked(number, ("at once", number), Delays(0.0, 0.0)))

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return [answers[number] for number in sorted(answers)]


def evaluate(world: World, answered: dict[str, Answered], keep: int) -> dict[str, Any]:
    """Return figures of each model: ranker recall of the cut, the share of HR@10 kept, cost; and AIF's gain in recall."""
    users, items = world.data.log.user[world.positions], world.data.items.raw[world.data.log.item[world.positions] - 1]
    orders, figures = [each.ids for each in answered["ranker"].every], {}  # the ranker's order of all candidates
    recall: dict[str, metrics.ByUser] = {}
    for name, (every, spent, lone) in answered.items():
        best = [order[np.isin(order, each.ids[:keep])][:TOP] for order, each in zip(orders, every, strict=True)]
        values = [
            (np.isin(order[:TOP], ours).mean(), item in ours, item in order[:TOP])
            for order, ours, item in zip(orders, best, items, strict=True)
        ]
        recall[name], hits, whole = (metrics.mean_by_user(each, users) for each in np.array(values, float).T)
        waited = [each.critical_ms for each in lone]
        figures[name] = {
            "recall": metrics.user_interval(recall[name]),
            "share": metrics.paired_interval(hits, whole, ratio=True),
            **{f"after_retrieval_ms_p{p}": float(np.percentile(waited, p)) for p in (50, 90)},
            "cpu_ms": 1e3 * spent.cpu / len(every),
            "rps": len(every) / spent.wall,
        }
    return {"models": figures, "recall_gain": metrics.paired_interval(recall["aif"], recall["two_tower"])}


def report(figures: dict[str, Any], world: World, options) -> None:
    """Print the table, and what it says."""
    rows = []
    for name, of in figures["models"].items():
        kept = tables.spread(of["recall"], 1, scale=100), tables.spread(of["share"], 2)
        waited = f"{of['after_retrieval_ms_p50']:.1f} / {of['after_retrieval_ms_p90']:.1f}"
        rows.append([NAMES[name], *kept, waited, f"{of['cpu_ms']:.1f}", f"{of['rps']:,.0f}"])
    header = ["", f"ranker recall@{TOP}, %", f"HR@{TOP} kept", "after retrieval, ms p50 / p90", "CPU, ms", "requests a second"]
    print("\n" + common.table(rows, header))
    gain, items, keep = tables.spread(figures["recall_gain"], 1, scale=100), len(world.data.items) - 1, options.keep
    print(
        f"\n{len(world.found):,} {options.split} requests; {options.candidates:,} retrieved candidates are cut to {keep}.\n"
        f"Of {items:,} items, a cut to 100 as in docs/results.md loses almost nothing with either model.\n"
        f"AIF keeps {gain} points more of the ranker's top {TOP} than two-tower. Brackets: 95 % over users.\n"
        f"Ranker recall@{TOP}: what the cut keeps of the ranker's best {TOP}. HR@{TOP} kept: HR@{TOP} of the ranker after\n"
        "the cut, over the ranker on all. After retrieval: one request at a time. CPU of a request, requests a second:\n"
        f"{CALLERS} callers, {common.threads()} cores, without a bound on latency, which experiments.cost has.\n"
        f"One epoch, {SAMPLES:,} samples, {LENGTH} events, one seed; docs/results.md has more of each."
    )


def picture(answered: dict[str, Answered], figures: dict[str, Any], options) -> None:
    """Draw what a typical request of each way waits for after its candidates have arrived."""
    drawn = {}
    for name, of in answered.items():
        kept = f"{100 * figures['models'][name]['recall'].value:.1f} %" if name in PRERANKERS else "all"
        typical = sorted(of.lone, key=lambda each: each.critical_ms)[len(of.lone) // 2]
        drawn[f"{NAMES[name]}\nkeeps {kept}"] = typical.timeline
    title = f"{options.candidates:,} candidates to {options.keep}: the wait, and what is kept of the ranker's top {TOP}"
    services.draw(drawn, options.figure, title=title)


if __name__ == "__main__":
    main()
