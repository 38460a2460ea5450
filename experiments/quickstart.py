"""The main job: AIF's story on real interactions, in one table and one picture.

Claim     AIF ranks better than a two-tower model, as well as full attention, and adds little time after retrieval.
Command   python -m experiments.quickstart            (or --smoke, --data DIR, --json FILE; --help lists all)
Time      80 s on two idle cores (138 s of CPU time), two models at a time; `--json` has `seconds_by_part`
Data      MovieLens-100K, fetched; next item: which movie does the user rate next?
Models    `presets.two_tower`, `presets.aif` and `presets.full_attention` (attention over the whole history), trained alike, as
          `fit` trains by default, but one epoch in place of three, to save time; one seed. All get the SVD term
          (`Run.with_svd`) and the popularity correction (`Run.with_popularity_correction`), which are fitted in seconds after
          training; GAUC is without the correction, because its candidates are drawn by popularity.
Protocol  split by time: training on the first 90 % of all events, evaluated once on requests from the last 10 %: GAUC of 100
          candidates, HR@100 of the whole catalogue, each with its 95 % interval over users. Epochs are fixed in advance.
Latency   requests one at a time, the ways in turn, candidates drawn from all items. Feature fetch is a delay of 2 ms, retrieval
          one of 15 ms. AIF and the two-tower model run in `AsyncPreRanker`, whose user function runs during retrieval; the
          sequential ways start when the candidates are there. All begin with encoded features on the host and raw ids, and
          every request is of a new user (`experiments.cost` has returning users and many callers).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics
from aif_jax.output import say, track
from experiments import common
from experiments import services as serving
from experiments.datasets import fetch, movielens
from experiments.datasets.synthetic import synthetic_world
from experiments.services import Asked, DataWorld, Delays, Engine, Model, Sequential, Served

SMOKE: dict[str, Any] = dict(width=16, long_length=64, towers=(32,))
MIN_HISTORY = 5  # earlier events of the user of a held-out request
K = 100
PRESETS = {"two_tower": aif.presets.two_tower, "aif": aif.presets.aif, "full_attention": aif.presets.full_attention}
ORDER = ("full_attention", "aif", "two_tower")  # the longest first
WAYS = {"two_tower": "two_tower", "aif": "aif", "aif_sequential": "aif", "full_attention": "full_attention"}
"""The rows of the table, and the model of each."""
SEQUENTIAL = ("aif_sequential", "full_attention")
FEW_ITEMS = 10_000
NEXT = """Next, with your own files, as docs/tutorial_own_data.md explains:
  aif-jax check --events EVENTS --items ITEMS"""


class Quality(NamedTuple):
    """How well a model ranks held-out requests."""

    gauc: metrics.ByUser
    hit_rate: metrics.ByUser
    auc: float
    log_loss: float

    def figures(self) -> dict[str, float]:
        """The figures by name, with the bounds of their intervals."""
        gauc, rate = metrics.user_interval(self.gauc), metrics.user_interval(self.hit_rate)
        return {
            "gauc": gauc.value, "gauc_low": gauc.low, "gauc_high": gauc.high,
            "hr100": rate.value, "hr100_low": rate.low, "hr100_high": rate.high,
            "auc": self.auc, "log_loss": self.log_loss,
        }  # fmt: skip


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the job and prints its figures."""
    options, parts = parse(arguments), common.Parts()
    with parts("data"):
        data = load(options)
    print(f"data: {data}")
    with parts("models"):
        trained = train_all(data, options)
    quality = {name: of_model for name, (_, of_model, _) in trained.items()}
    with parts("index"):
        world = DataWorld(data)
        models = {name: Model.trained(world, whole, data, seed=options.seed) for name, (whole, *_) in trained.items()}
    served = asyncio.run(serve(models, options, parts))
    figures = {way: quality[model].figures() | latency(served[way]) for way, model in WAYS.items()}
    difference = same_scores(served["aif"], served["aif_sequential"])
    report(figures, quality, difference, data, options)
    with parts("picture"):
        picture(served, figures, options)
    print("\n" + str(parts))
    common.write_json(
        options.json,
        {
            "models": figures,
            "max_abs_staged_minus_joint": difference,
            "retrieval_ms": options.retrieval_ms,
            "dataset": data.name,
            "n_users": len(data.users) - 1,
            "n_items": len(data.items) - 1,
            "n_events": len(data.log),
            "seconds": parts.total.wall,
            "seconds_by_model": {name: seconds for name, (*_, seconds) in trained.items()},
            "seconds_by_part": {name: spent.wall for name, spent in parts.spent.items()},
            "cpu_seconds_by_part": {name: spent.cpu for name, spent in parts.spent.items()},
        },
    )
    if options.out is not None:
        print(f"the run of the AIF model is in {options.out}")
    print(NEXT)


def parse(arguments: list[str] | None):
    """The command line."""
    settings = {
        "epochs": (1, None, "passes over the training samples"),
        "batch_size": (256, None, "samples a step"),
        "requests": (300, 200, "held-out requests that are evaluated"),
        "served": (100, 10, "requests answered in each way"),
        "candidates": (1000, None, "candidates that retrieval finds"),
        "retrieval_ms": (15.0, None, "how long retrieval takes"),
        "seed": (0, None, "seed of parameters, order and negatives"),
        "figure": (Path("quickstart_timelines.png"), None, "the picture"),
    }
    paths = {
        "data": "a folder with MovieLens files of any release, in place of a fetched one",
        "cache": "where fetched data is kept (default: the user's cache)",
        "out": "keep the run of the AIF model there: checkpoints and logs",
    }
    return common.options(__doc__, arguments, settings, **paths)


def load(options) -> Dataset:
    """The synthetic world, a MovieLens folder, or a fetched release; with content from titles, genres and tags."""
    if options.smoke:
        return synthetic_world(options.seed, users=100, items=400, topics=20, categories=20, events_per_user=120).dataset
    if options.data is not None:
        return movielens.read(options.data, content="text")
    fetched = fetch.fetch_movielens(cache_dir=options.cache)
    print(f"{fetch.NAME} from {'the cache, first from ' if fetched.cached else ''}{fetched.source}: {fetched.path}")
    if fetched.reason:
        print(f"  ({fetched.reason})")
    return movielens.read(fetched.path, content="text")


def train_all(data: Dataset, options) -> dict[str, tuple[aif.Run, Quality, dict[str, float]]]:
    """Each model as it is served, its quality and its seconds by part; two at a time, since compiling keeps one core busy."""
    with ThreadPoolExecutor(2, thread_name_prefix="train") as pool:
        jobs = {name: pool.submit(copy_context().run, train, name, data, options) for name in ORDER}
        return {name: jobs[name].result() for name in PRESETS}


def train(name: str, data: Dataset, options) -> tuple[aif.Run, Quality, dict[str, float]]:
    """A model as it is served, its quality, and its seconds by part. Only AIF's training shows its progress."""
    parts = common.Parts()
    with parts("train"):
        trained = aif.fit(
            aif.build(PRESETS[name](data.schema, **(SMOKE if options.smoke else {}))),
            data,
            aif.FitConfig(
                epochs=options.epochs, batch_size=options.batch_size, seed=options.seed, validation=0.0, keep_best=None
            ),
            out=options.out if name == "aif" else None,
            task=aif.train.NextItem(),
            progress=name == "aif" and not options.quiet,
        )
    with parts("additions"):
        sampled = trained.with_svd(data)
        whole = sampled.with_popularity_correction(data)
    with parts("evaluate"):
        given: dict[str, Any] = dict(requests=options.requests, min_history=MIN_HISTORY, progress=False)
        lists, catalogue = sampled.evaluate(data, k=None, **given), whole.evaluate(data, k=K, **given)
        quality = Quality(lists.by_user["gauc"], catalogue.by_user[f"hr@{K}"], lists.auc, lists.log_loss)
    if not options.quiet:
        say(f"{name.replace('_', ' ')}: trained and evaluated, GAUC {quality.gauc.mean:.3f}, {parts.total.wall:.0f} s")
    return whole, quality, {part: spent.wall for part, spent in parts.spent.items()}


class Measured(NamedTuple):
    """One answered request."""

    answer: Served
    cpu_ms: float  # of all threads of the process


async def serve(models: dict[str, Model], options, parts: common.Parts) -> dict[str, list[Measured]]:
    """Answers the same requests in every way, in turn."""
    delays = Delays(min(0.002, options.retrieval_ms / 1e3), options.retrieval_ms / 1e3)
    count = min(options.candidates, models["aif"].world.items)
    config = {"max_pending": 256, "user_threads": 2, "score_threads": 2}
    made = {way: (models[of], count, min(K, count)) for way, of in WAYS.items()}
    services = {way: Sequential(*its) if way in SEQUENTIAL else Engine(*its, config) for way, its in made.items()}
    measured: dict[str, list[Measured]] = {way: [] for way in services}
    async with contextlib.AsyncExitStack() as stack:
        with parts("start engines"):
            started = [services[way].__aenter__() for way in services]
            await asyncio.gather(*started)
            for service in services.values():
                stack.push_async_exit(service)
                await service.rank(Asked(0, "first"))
        with parts("requests"):
            for number in track(range(options.served), label="requests in four ways", unit="requests"):
                for way in list(services) if number % 2 == 0 else reversed(services):
                    cpu = time.process_time()
                    answer = await services[way].rank(Asked(number, number, delays))  # a new user
                    measured[way].append(Measured(answer, 1e3 * (time.process_time() - cpu)))
    return measured


def latency(measured: list[Measured]) -> dict[str, float]:
    """Milliseconds of some requests, p50 and p99: end to end and after retrieval; and the median of their CPU time."""
    total, critical = ([getattr(each.answer, name) for each in measured] for name in ("total_ms", "critical_ms"))
    named = {"total_ms": total, "after_retrieval_ms": critical}
    figures = {f"{name}_p{p}": float(np.percentile(values, p)) for name, values in named.items() for p in (50, 99)}
    return figures | {"cpu_ms": float(np.median([each.cpu_ms for each in measured]))}


def same_scores(one: list[Measured], other: list[Measured]) -> float:
    """The largest difference between the scores of items that two ways answered the same requests with."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        _, left, right = np.intersect1d(a.answer.ids, b.answer.ids, return_indices=True)
        largest = max(largest, float(np.abs(a.answer.logits[left] - b.answer.logits[right]).max()))
    return largest


def report(figures: dict[str, Any], quality: dict[str, Quality], difference: float, data: Dataset, options) -> None:
    """Prints the table, and what it says."""
    rows = []
    for way, found in figures.items():
        bounds = f"{found['gauc']:.3f} ({found['gauc_low']:.3f} to {found['gauc_high']:.3f})"
        rate = f"{found['hr100']:.3f} ± {(found['hr100_high'] - found['hr100_low']) / 2:.3f}"
        pairs = [f"{found[f'{name}_p50']:.1f} / {found[f'{name}_p99']:.1f}" for name in ("total_ms", "after_retrieval_ms")]
        rows.append([way.replace("_", " "), bounds, rate, *pairs, f"{found['cpu_ms']:.1f}"])
    header = ["", "GAUC (95 % of users)", "HR@100", "answer, ms p50 / p99", "after retrieval, ms", "CPU, ms a request"]
    print("\n" + common.table(rows, header))
    print(
        f"\n{options.served} requests each way, one at a time, {min(options.candidates, len(data.items) - 1):,} candidates; "
        f"retrieval takes {options.retrieval_ms:g} ms. Run sequentially, AIF's scores differ by at most {difference:.1e}."
    )
    for name in ("two_tower", "full_attention"):
        gauc = metrics.paired_interval(quality["aif"].gauc, quality[name].gauc)
        rate = metrics.paired_interval(quality["aif"].hit_rate, quality[name].hit_rate)
        print(
            f"AIF minus {name.replace('_', ' ')}, same requests: GAUC {gauc.value:+.3f} ({gauc.low:+.3f} to {gauc.high:+.3f}), "
            f"HR@100 {rate.value:+.3f} ({rate.low:+.3f} to {rate.high:+.3f})"
        )
    if len(data.items) < FEW_ITEMS:
        print(
            f"HR@100 hardly separates models in a catalogue of {len(data.items) - 1:,} items: docs/results.md has it for "
            "larger catalogues."
        )


PEOPLE = {
    "two_tower": "Two-tower", "aif": "AIF", "aif_sequential": "AIF, sequentially", "full_attention": "Full attention",
}  # fmt: skip
"""Names of the ways in the picture."""


def picture(served: dict[str, list[Measured]], figures: dict[str, dict[str, float]], options) -> None:
    """Draws the timeline of a typical request of each way."""
    drawn = {}
    for way, measured in served.items():
        order = sorted(measured, key=lambda each: each.answer.total_ms)
        found, typical = figures[way], order[len(order) // 2].answer
        times = f"answer after {found['total_ms_p50']:.1f} ms, {found['after_retrieval_ms_p50']:.1f} ms of it after retrieval"
        drawn[f"{PEOPLE.get(way, way)}: {times} (medians)"] = typical.timeline
    serving.draw(drawn, options.figure)


if __name__ == "__main__":
    main()
