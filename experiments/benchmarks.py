"""Public benchmarks, one command each: two-tower, two-tower with matching statistics and AIF beside the published figures.

Claim     none: whoever has the files gets the table. The full files of RecFlow and KuaiRand were never read here; their readers
          and this job are tested on small files of the same layout.
Command   python -m experiments.benchmarks NAME --data DIR       (or NAME --smoke; --json FILE; --help lists all)
Names     recflow    RecFlow, streaming (arXiv 2410.20868, 2503.09492): trained on all days before the last, judged on it.
                     Recall@50 of what was effectively viewed, and of what the ranker ranked, among the logged candidates of a
                     request, mean over requests. The published cascade chooses in two stages: not the same question.
          movielens  any release; split by time; GAUC of 100 candidates and HR@100 of the catalogue
          taobao     UserBehavior.csv, the same
          kuairand   impressions of any version as events, the same
Models    untuned, the same epochs, optimizer and samples, one seed; for the catalogue with the popularity correction
Time      grows with the samples, `--days`: on two cores about 1 ms a sample of two-tower and 2 ms of AIF; not measured
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics, train
from aif_jax.data.order import BatchKey
from aif_jax.metrics import ByUser
from aif_jax.train.evaluate import list_scores
from aif_jax.train.losses import pointwise_bce
from experiments import common
from experiments.datasets import kuairand, movielens, taobao
from experiments.datasets.cascade import synthetic_cascade
from experiments.datasets.recflow import recflow
from experiments.datasets.synthetic import SMALL as SMALL_WORLD
from experiments.datasets.synthetic import synthetic_world
from experiments.study.models import SMOKE
from experiments.tables import spread

MATCHING = "two-tower with matching statistics"
PRESETS = {"two-tower": aif.presets.two_tower, MATCHING: aif.presets.two_tower_matching, "aif": aif.presets.aif}
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
    settings = {"epochs": (3, None, "passes over the samples"), "requests": (3000, None, "judged at most, drawn at random")}
    options = common.options(parser, arguments, settings, data="the folder with the data set's files")
    if (options.data is None) != options.smoke:
        options.error("expected --data DIR or --smoke, one of them")
    benchmark = benchmark_of(options)
    print(f"data: {benchmark.data}", flush=True)
    judged = {name: benchmark.judge(trained(name, benchmark, options)) for name in options.model}
    first, made, rows = judged[options.model[0]], {}, []
    for name, found in judged.items():
        made[name] = {key: metrics.user_interval(part)._asdict() for key, part in found.items()}
        for key, part in found.items():
            paired = "" if found is first else spread(metrics.paired_interval(part, first[key]), 4, sign="+")
            rows.append([name, key, spread(metrics.user_interval(part), 4), paired])
    for name, known in benchmark.published.items():
        rows += [[f"{name}, published", key, f"{value:.4f}", ""] for key, value in known.items()]
    print("\n" + common.table(rows, ["model", "figure", "value [95 %]", f"minus {options.model[0]}"]))
    common.write_json(options.json, {"models": made, "published": benchmark.published})


def trained(name: str, benchmark: Benchmark, options) -> aif.Run:
    """Return a model of the last epoch."""
    small = {key: value for key, value in SMOKE.items() if key not in ("long_length", "head") or name != "two-tower"}
    config = PRESETS[name](benchmark.data.schema, **(small if options.smoke else {}))
    batch = 32 if options.smoke else 256
    settings = aif.FitConfig(epochs=options.epochs, batch_size=batch, validation=0.0, keep_best=None, **benchmark.settings)
    return aif.fit(aif.build(config), benchmark.data, settings, **benchmark.given)


def since(options, test: int) -> dict[str, Any]:
    """Return the field of `FitConfig` that trains on the last days alone."""
    return {} if options.days is None else {"since": np.datetime64(round(test - options.days * DAY), "s")}


# the data sets


def benchmark_of(options) -> Benchmark:
    """Return a benchmark by name; of a small synthetic world in a smoke run."""
    judge = of_recflow if options.name == "recflow" else by_time
    if not options.smoke:
        return judge(READERS[options.name](options.data), options)
    world = synthetic_world(0, **SMALL_WORLD)
    if judge is by_time:
        return judge(world.dataset, options)
    data = synthetic_cascade(world, requests=160, candidates=60, ranked=20)
    assert data.cascade is not None
    labels = data.cascade.labels | {"effective_view": data.cascade.labels["click"]}
    return judge(dataclasses.replace(data, cascade=dataclasses.replace(data.cascade, labels=labels)), options)


def of_recflow(data: Dataset, options) -> Benchmark:
    """Return the last day is judged."""
    log, cascade = data.log, data.cascade
    assert cascade is not None
    last = int(log.time[cascade.positions].max())
    test = last - last % DAY
    task = train.Cascaded(exposed=8, ranked=8, pre_ranked=8, retrieved=8)
    loss = pointwise_bce.of("effective_view")
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


READERS: dict[str, Callable[[Path], Dataset]] = {
    "recflow": recflow, "movielens": movielens.read, "taobao": taobao.read, "kuairand": kuairand.read,
}  # fmt: skip


# the figures


def recall(run: aif.Run, data: Dataset, positions: np.ndarray, *, k: int) -> dict[str, ByUser]:
    """Return Recall@k among the logged candidates of requests: of effective views, and of what the ranker ranked."""
    lists = run.settings.task.source(data, before=0, held_out=True)(positions, BatchKey(0, 0, 0))
    scores = list_scores(run.model, run.params, data, positions, lists.rows)
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
