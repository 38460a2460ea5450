"""Public benchmarks, one command each: two-tower, two-tower with matching statistics and AIF beside the published figures.

Claim     none: whoever has the files gets the table. The full files of Yambda, RecFlow and KuaiRand were never read here; their
          readers and this job are tested on small files of the same layout.
Command   python -m experiments.benchmarks NAME --data DIR       (NAME --smoke makes small files; --json FILE; --help lists all)
Names     yambda     Yambda-50M, listens of half a track and more (arXiv 2505.22238). Trained on what is before the test day and
                     its gap of 30 minutes; each user of the test day is ranked once, by the history before it; all items with
                     a listen in training are candidates, met ones too. NDCG@10 and Recall@10 over the user's distinct items of
                     the day, those without a training listen among them, mean over users. Artists are an attribute here; the
                     published models have ids alone.
          recflow    RecFlow, streaming (arXiv 2410.20868, 2503.09492): trained on all days before the last, judged on it.
                     Recall@50 of what was effectively viewed, and of what the ranker ranked, among the logged candidates of a
                     request, mean over requests. The published cascade chooses in two stages: not the same question.
          movielens  any release; split by time; GAUC of 100 candidates and HR@100 of the catalogue
          taobao     UserBehavior.csv, the same
          kuairand   impressions of any version as events, the same
Models    untuned, the same epochs, optimizer and samples, one seed; for the catalogue all have the popularity correction
          (`Run.with_popularity_correction`), as negatives are drawn by popularity
Cost      time and memory grow with the samples trained on, `--days`: on two cores about 1 ms of wall time a sample of two-tower
          and 2 ms of AIF with 512 events (the batch and lengths of `fit`), so Yambda's last 7 days, about 700,000 listens, take
          a quarter and half an hour an epoch; ranking 4,600 users over 630,000 items about as long. Extrapolated, not measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics, train
from aif_jax.data.candidates import SampleKey
from aif_jax.data.negatives import counts_before
from aif_jax.metrics import ByUser
from aif_jax.train.evaluate import best_rows, catalogue_scores, list_scores
from aif_jax.train.losses import pointwise_bce
from aif_jax.train.tasks import Goal, Goals
from experiments import common
from experiments.datasets import kuairand, movielens, taobao, yambda
from experiments.datasets.cascade import synthetic_cascade
from experiments.datasets.recflow import lines_of, recflow
from experiments.datasets.recflow import write as write_recflow
from experiments.datasets.synthetic import SMALL as SMALL_WORLD
from experiments.datasets.synthetic import synthetic_world

PRESETS = {
    "two-tower": aif.presets.two_tower,
    "two-tower with matching statistics": aif.presets.two_tower_matching,
    "aif": aif.presets.aif,
}
SMALL: dict[str, Any] = dict(width=8, towers=(16,), short_length=16, long_length=32)
DAY = 86_400


class Benchmark(NamedTuple):
    """What a benchmark trains and judges."""

    data: Dataset
    settings: dict[str, Any]  # fields of `FitConfig`
    judge: Callable[[aif.Run], dict[str, ByUser]]
    published: dict[str, dict[str, float]] = {}
    given: dict[str, Any] = {"task": train.NextItem()}  # arguments of `fit`


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Train every model and print its figures, with 95 % intervals over users, beside the published ones."""
    parser = common.parser(__doc__)
    parser.add_argument("name", choices=sorted(READERS))
    parser.add_argument("--model", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="only these (default all)")
    parser.add_argument("--days", type=float, help="train on the last days before the test slice alone (default all)")
    settings = {
        "epochs": (3, None, "passes over the training samples"),
        "requests": (3000, None, "judged at most, drawn at random"),
    }
    options = common.options(parser, arguments, settings, data="the folder with the data set's files")
    if (options.data is None) != options.smoke:
        options.error("expected --data DIR or --smoke, one of them")
    with tempfile.TemporaryDirectory() as made:
        benchmark = READERS[options.name](small_files(options.name, Path(made)) if options.smoke else options.data, options)
    print(f"data: {benchmark.data}", flush=True)
    judged = {name: benchmark.judge(trained(name, benchmark, options)) for name in options.model}
    figures = {name: {key: metrics.user_interval(part) for key, part in found.items()} for name, found in judged.items()}
    first, rows = options.model[0], []
    for name, found in figures.items():
        for key, one in found.items():
            gap = metrics.paired_interval(judged[name][key], judged[first][key])
            paired = "" if name == first else f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
            rows.append([name, key, f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]", paired])
    rows += [[f"{name}, published", key, f"{value:.4f}", ""] for name, known in benchmark.published.items()
             for key, value in known.items()]  # fmt: skip
    print("\n" + common.table(rows, ["model", "figure", "value [95 %]", f"minus {first}"]))
    made = {name: {key: one._asdict() for key, one in found.items()} for name, found in figures.items()}
    common.write_json(options.json, {"models": made, "published": benchmark.published})


def trained(name: str, benchmark: Benchmark, options) -> aif.Run:
    """Return a model of the last epoch."""
    small = {key: value for key, value in SMALL.items() if key != "long_length" or name != "two-tower"}
    config = PRESETS[name](benchmark.data.schema, **(small if options.smoke else {}))
    batch = 32 if options.smoke else 256
    settings = aif.FitConfig(epochs=options.epochs, batch_size=batch, validation=0.0, keep_best=None, **benchmark.settings)
    return aif.fit(aif.build(config), benchmark.data, settings, **benchmark.given)


def since(options, test: int) -> dict[str, Any]:
    """Return the field of `FitConfig` that trains on the last days alone."""
    return {} if options.days is None else {"since": np.datetime64(round(test - options.days * DAY), "s")}


# the data sets


def of_yambda(folder: Path, options) -> Benchmark:
    """Return each user of the test day is ranked once."""
    data, test = yambda.read(folder)
    published = {"ItemKNN": {"ndcg@10": 0.078}, "SASRec": {"ndcg@10": 0.075}}
    settings = since(options, test) | {"test": np.datetime64(test, "s")}
    return Benchmark(data, settings, lambda run: once_a_user(run, data, test, k=10, requests=options.requests), published)


def of_recflow(folder: Path, options) -> Benchmark:
    """Return the last day is judged."""
    data = recflow(folder)
    log, cascade = data.log, data.cascade
    assert cascade is not None
    last = int(log.time[cascade.positions].max())
    test = last - last % DAY
    task = train.Cascaded(exposed=8, ranked=8, pre_ranked=8, retrieved=8)
    loss = Goals(Goal(pointwise_bce, "effective_view"))
    settings = since(options, test) | {"test": np.datetime64(test, "s"), "k": None}
    positions = task.positions(data, min_history=1, since=test, before=None)
    k, published = 10 if options.smoke else 50, {"LCRON, two stages": {"recall@50 effective_view": 0.1429}}
    given = {"task": task, "loss": loss}
    return Benchmark(data, settings, lambda run: recall(run, data, positions[: options.requests], k=k), published, given)


def by_time(data: Dataset, options) -> Benchmark:
    """Return the last tenth of the samples is judged: GAUC of sampled candidates, HR@100 of the catalogue."""

    def judge(run: aif.Run) -> dict[str, ByUser]:
        given: dict[str, Any] = dict(requests=options.requests, min_history=5)
        sampled = run.evaluate(data, k=None, **given).by_user
        whole = run.with_popularity_correction(data).evaluate(data, k=min(100, len(data.items) - 2), **given).by_user
        return {"gauc": sampled["gauc"]} | {name: part for name, part in whole.items() if name.startswith("hr@")}

    return Benchmark(data, since(options, int(np.quantile(data.log.time, 0.9))), judge)


READERS: dict[str, Callable[[Path, Any], Benchmark]] = {
    "yambda": of_yambda,
    "recflow": of_recflow,
    "movielens": lambda folder, options: by_time(movielens.read(folder), options),
    "taobao": lambda folder, options: by_time(taobao.read(folder), options),
    "kuairand": lambda folder, options: by_time(kuairand.read(folder), options),
}


def small_files(name: str, folder: Path) -> Path:
    """Return files of a small synthetic world in the layout of a data set."""
    world = synthetic_world(0, **SMALL_WORLD)
    log, category = world.dataset.log, world.dataset.catalogue.ids["category"]
    if name == "recflow":
        table = lines_of(synthetic_cascade(world, requests=160, candidates=60, ranked=20))
        day = table["request_timestamp"] // (1000 * DAY)
        for one in np.unique(day):
            write_recflow(folder, f"{one:08d}", {key: np.asarray(values)[day == one] for key, values in table.items()})
    elif name == "yambda":
        listens = {"uid": log.user, "item_id": log.item, "timestamp": log.time - log.time.max() + yambda.TEST + DAY,
                   "is_organic": log.item % 2, "played_ratio_pct": 40 + 10 * (log.item % 7)}  # fmt: skip
        items = np.arange(1, len(category))
        yambda.write(folder, listens, {"item_id": items, "artist_id": category[1:]})
    elif name == "movielens":
        lines = [f"{u},{i},{1 + i % 5},{t}" for u, i, t in zip(log.user, log.item, log.time, strict=True)]
        (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *lines]) + "\n", encoding="utf-8")
        movies = [f"{i},Film {i} (2000),Drama" for i in range(1, len(category))]
        (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n", encoding="utf-8")
    elif name == "taobao":
        lines = [f"{u},{i},{category[i]},pv,{t}" for u, i, t in zip(log.user, log.item, log.time, strict=True)]
        (folder / "UserBehavior.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        raise SystemExit(f"--smoke: expected yambda, recflow, movielens or taobao, got {name}; its reader has its own tests")
    return folder


# the figures


def once_a_user(run: aif.Run, data: Dataset, test: int, *, k: int, requests: int) -> dict[str, ByUser]:
    """Return NDCG@k and Recall@k of the distinct items of each user from `test` on, ranked by the history before it.

    NDCG takes the first min(k, number of the user's items) places as the best possible.
    """
    run, log = run.with_popularity_correction(data), data.log
    later = np.flatnonzero(log.time >= test)
    users, first = np.unique(log.user[later], return_index=True)
    if len(users) > requests:
        drawn = np.sort(np.random.default_rng(0).choice(len(users), requests, replace=False))
        users, first = users[drawn], first[drawn]
    unknown = np.where(counts_before(data, test) > 0, 0.0, -np.inf)
    gains, found = 1 / np.log2(np.arange(k) + 2), np.zeros((2, len(users)))
    for rows, scores in catalogue_scores(run.model, run.params, data, later[first], repeats=True):
        for row, best in zip(rows, best_rows(scores + unknown, k), strict=True):
            wanted = np.unique(log.item[later[log.user[later] == users[row]]])
            hit = np.isin(best, wanted)
            found[:, row] = hit @ gains / gains[: len(wanted)].sum(), hit.sum() / len(wanted)
    return {name: metrics.mean_by_user(values, users) for name, values in zip((f"ndcg@{k}", f"recall@{k}"), found, strict=True)}


def recall(run: aif.Run, data: Dataset, positions: np.ndarray, *, k: int) -> dict[str, ByUser]:
    """Return Recall@k among the logged candidates of requests: of effective views, and of what the ranker ranked."""
    lists = run.settings.task.source(data, before=0, held_out=True)(positions, SampleKey(0, 0, 0))
    scores = list_scores(run.model, run.params, data, positions, lists)
    scores = np.where(lists.rows > 0, scores, -np.inf)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    labels: Any = lists.labels
    made = {}
    for name, wanted in (("effective_view", labels["effective_view"] == 1), ("ranked", ~np.isnan(labels["ranker"]))):
        asked = wanted.any(1)
        hit = np.take_along_axis(wanted, top, 1).sum(1)[asked] / wanted.sum(1)[asked]
        made[f"recall@{k} {name}"] = metrics.mean_by_user(hit, data.log.user[positions[asked]])
    return made


if __name__ == "__main__":
    main()
