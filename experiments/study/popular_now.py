"""Do item statistics as of the sample's time rank better? And do negatives drawn by popularity so far?

Claim     On MovieLens item statistics raise GAUC of all three models, HR@100 of the two-tower model alone; negatives so far
          raise GAUC of the two-tower model, and not of the preset. On the Taobao head neither brings anything that holds.
Command   python -m experiments.study.popular_now --data DIR, then --report
Protocol  That of `question`, validation split, one epoch, seed 0. "decayed" gives every model the item statistics of
          HALF_LIVES, as of each sample, of events strictly earlier; in the catalogue as of the first of CHUNK requests by time.
          Held-out events count from the moment on at which they have happened, as a nearline job has them.
          Negatives of training are drawn by the counts of all training events ("training", the protocol) or by those before the
          sample ("so far").
          Three GAUCs: that of the protocol; "trained", of requests for items with a training event, as the protocol draws no
          others as negatives, so that "no event yet" alone tells a positive; "so far", against items drawn by popularity
          before the request, of items that had an event. HR@100 with the popularity correction by training counts, and
          ("now") by the counts before the request.
Measured  in experiments/results/question/popular_now/, one record a run and one file with its figures by user.
"""

from __future__ import annotations

import dataclasses
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics
from aif_jax.blocks.item_offset import popularity_offset
from aif_jax.data.candidates import CandidateLists, CandidateSource, SampleKey, SeenPairs, item_counts
from aif_jax.data.events import ItemStatistics
from aif_jax.metrics import ByUser
from aif_jax.schema import statistic_names
from aif_jax.train.evaluate import catalogue_scores, list_scores, rank_of
from aif_jax.types import Params
from experiments import common
from experiments.study import datasets, question, records
from experiments.study.question import Trial

RESULTS = question.RESULTS / "popular_now"
HOUR, DAY = 3600, 86400
HALF_LIVES = (6 * HOUR, 7 * DAY, 180 * DAY)
CHUNK = 8  # requests that are ranked with one refresh of the item rows
NONE, DECAYED = "none", "decayed"
TRAINING, SO_FAR = "training", "so far"
SPAWN = 9  # stream of random numbers: negatives drawn so far


def with_statistics(dataset: Dataset) -> Dataset:
    """The data set whose items have the statistics."""
    catalogue, more = dataset.catalogue, len(statistic_names(HALF_LIVES))
    floats = dataset.schema.item_floats + more
    schema = dataclasses.replace(dataset.schema, item_floats=floats, item_statistics=HALF_LIVES, encoding="")
    places = np.concatenate([catalogue.floats, np.zeros((len(catalogue), more), np.float32)], 1)
    catalogue = dataclasses.replace(catalogue, schema=schema, floats=places)
    return dataclasses.replace(dataset, schema=schema, catalogue=catalogue, encoder=None)


def counts_at(dataset: Dataset) -> ItemStatistics:
    """How often items occur before a moment."""
    log = dataset.log
    return ItemStatistics(log.item, log.time, items=len(dataset.catalogue), half_lives=(DAY,))


def drawn_so_far(dataset: Dataset, *, negatives: int, repeats: bool, tries: int = 8) -> CandidateSource:
    """The event's item and negatives drawn by count ** 0.75 of the events before the sample.

    Events before the sample are drawn at random and kept with probability count ** -0.25 of their item; 0 takes the place of
    a negative where too few of them are kept.
    """
    log, statistics = dataset.log, counts_at(dataset)
    order = np.argsort(log.time, kind="stable")
    ordered, items = log.time[order], log.item[order]

    def lists(positions: np.ndarray, draw: SampleKey) -> CandidateLists:
        rng = np.random.default_rng(np.random.SeedSequence(draw.seed, spawn_key=(SPAWN, draw.epoch, draw.step)))
        times, target = log.time[positions], log.item[positions]
        end = np.searchsorted(ordered, times)
        tried = items[(rng.random((len(positions), tries * negatives)) * end[:, None]).astype(np.int64)]
        count = statistics.counts(tried, times[:, None])
        good = rng.random(tried.shape) < np.maximum(count, 1) ** -0.25
        good &= (tried != target[:, None]) & (tried > 0)
        if not repeats:
            good &= ~SeenPairs(dataset, positions).contains(np.arange(len(positions))[:, None], tried)
        first = np.argsort(~good, axis=1, kind="stable")[:, :negatives]
        chosen = np.where(np.take_along_axis(good, first, 1), np.take_along_axis(tried, first, 1), 0)
        rows = np.concatenate([target[:, None], chosen], 1).astype(np.int32)
        return CandidateLists(rows, np.eye(1, rows.shape[1], dtype=np.float32).repeat(len(rows), 0))

    return CandidateSource(lists, {"kind": "drawn so far", "negatives": negatives})


def evaluate(
    trial: Trial, model: aif.PreRanker, params: Params, data: datasets.StudyData, *, progress: bool
) -> dict[str, ByUser]:
    """Metrics by user: the three GAUCs, and HR@100 by offset of items without an event, with both popularity corrections."""
    dataset, log = data.dataset, data.dataset.log
    part = question.parts_of(trial, data)[0]
    requests = question.requests_of(trial, part, data)
    at, users = requests.positions, log.user[requests.positions][:, None]
    counts, statistics = item_counts(dataset, part.seen), counts_at(dataset)
    scores = question.sampled_scores(model, params, data, requests, progress=progress)
    sampled = question.sampled_metrics(scores, requests, data, counts)
    lists = drawn_so_far(dataset, negatives=99, repeats=data.repeats)(at, SampleKey(0, 0, 0))
    so_far = list_scores(model, params, dataset, at, lists, progress=progress)
    happened = (statistics.counts(log.item[at], log.time[at]) > 0)[:, None]
    found = {name: sampled[name] for name in ("gauc", "gauc_trained")}
    found["gauc_so_far"] = metrics.gauc_by_user(so_far, lists.labels, users, where=(lists.rows > 0) & happened)
    at = question.catalogue_requests(requests)
    names = [(kind, untrained) for kind in ("hr100", "hr100_now") for untrained in question.UNTRAINED]
    hits = {name: np.zeros(len(at)) for name in names}
    every = np.arange(len(counts))
    given: dict[str, Any] = dict(repeats=data.repeats, batch_size=CHUNK, progress=progress)
    for rows, of_items in catalogue_scores(model, params, dataset, at, **given):
        now = statistics.counts(every, log.time[at[rows]].min())
        for kind, untrained in names:
            offset = popularity_offset(now if kind == "hr100_now" else counts, untrained=untrained)
            hits[kind, untrained][rows] = rank_of(of_items + offset, log.item[at[rows]]) < 100
    for (kind, untrained), values in hits.items():
        found[f"{kind}@{untrained:g}"] = metrics.mean_by_user(values, log.user[at])
    return found


def run(
    trial: Trial, plain: datasets.StudyData, kind: str, negatives: str, *, results: Path, work: Path, progress: bool
) -> dict[str, Any]:
    """Trains, evaluates, keeps the model in `work` and the figures in `results`."""
    began, name = time.perf_counter(), identity(trial, kind, negatives)
    data = plain if kind == NONE else dataclasses.replace(plain, dataset=with_statistics(plain.dataset))
    part, source = question.parts_of(trial, data)[0], None
    if negatives == SO_FAR:
        source = drawn_so_far(data.dataset, negatives=question.NEGATIVES, repeats=data.repeats)
    file = records.file_of(name)
    model, params, said = question.trained(trial, part, data, work=work, file=file, source=source, progress=progress)
    found = evaluate(trial, model, params, data, progress=progress)
    record = {"id": name, "dataset": trial.dataset, "model": trial.model, "statistics": kind, "negatives": negatives, **said,
              "seconds": time.perf_counter() - began, "commit": common.machine()["commit"]}  # fmt: skip
    return records.keep(results, record, found)


def identity(trial: Trial, kind: str, negatives: str) -> str:
    """The name of a record."""
    return f"{trial.id}/statistics {kind}/negatives {negatives}"


def report(results: Path) -> str:
    """Each run against that of the same model without statistics and with the protocol's negatives, paired over users."""
    lines, found = [], records.read(results)
    usual = {(r["dataset"], r["model"]): r for r in found.values() if (r["statistics"], r["negatives"]) == (NONE, TRAINING)}

    def best(record: dict[str, Any], kind: str) -> str:
        names = [f"{kind}@{untrained:g}" for untrained in question.UNTRAINED]
        return max(names, key=lambda name: record["figures"][name])

    for record in found.values():
        base = usual.get((record["dataset"], record["model"]))
        if base is None or base is record:
            continue
        lines.append(
            f"{record['dataset']}, {record['model']}: statistics {record['statistics']}, negatives {record['negatives']}"
        )
        for name in ("gauc", "gauc_trained", "gauc_so_far"):
            gap = metrics.paired_interval(*(records.by_user(results, one, name) for one in (record, base)))
            values = f"{base['figures'][name]:.4f} -> {record['figures'][name]:.4f}"
            lines.append(f"  {name} {values}, {100 * gap.value:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}] points")
        for kind in ("hr100", "hr100_now"):
            ours, theirs = (records.by_user(results, one, best(one, kind)) for one in (record, base))
            gap = metrics.paired_interval(ours, theirs, ratio=True)
            shown = f"{gap.value:.2f} times [{gap.low:.2f}, {gap.high:.2f}]"
            lines.append(f"  {kind} {theirs.mean:.3f} -> {ours.mean:.3f}, {shown}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Does the missing runs."""
    parser = records.parser(__doc__, results=RESULTS, work=Path("out/popular_now"))
    parser.add_argument("--dataset", nargs="+", default=["movielens", "taobao"])
    parser.add_argument("--model", nargs="+", default=[question.BASE, question.WITH_MATCHING, question.AIF])
    parser.add_argument("--statistics", nargs="+", default=[NONE, DECAYED], choices=[NONE, DECAYED])
    parser.add_argument("--negatives", nargs="+", default=[TRAINING], choices=[TRAINING, SO_FAR])
    parser.add_argument("--report", action="store_true", help="print what the records say and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if options.report:
        print(report(options.results))
        return
    given = {"results": options.results, "work": options.work, "progress": not options.quiet}
    for name in options.dataset:
        plain = datasets.load(name, options.data)
        for negatives, model, kind in product(options.negatives, options.model, options.statistics):
            trial = Trial(dataset=name, model=model)
            if identity(trial, kind, negatives) in records.read(options.results):
                continue
            made = run(trial, plain, kind, negatives, **given)
            print(made["id"], json.dumps(records.rounded(made["figures"])), flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    main()
