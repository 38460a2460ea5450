"""Does it rank better, asked rightly: met items, equal budgets, errors over users.

Claim     Over a two-tower model, and over one with matching statistics, `presets.aif` ranks better on MovieLens and on Taobao.
Command   python -m experiments.study.question --data DIR --plan validation
          (--plan test: the models of the headline; --plan rolling: the same over blocks of the time line, for many users;
          --times: milliseconds of the user function and of the scoring program; --report-only: tables from the records)
Protocol  Met items: MovieLens users never come back to a film (`repeats` is False there): films that the user has rated are
          neither negatives nor candidates. Taobao users do come back: met items stay. Records hold figures of both kinds.
          Splits: "validation" and "test" cut the time line once for all users, "rolling" into blocks, see `rolling`.
          Budget: every model gets the same recipe, optimizer, number of steps and sizes; hyperparameters are chosen on the
          validation split. Additions after training (popularity correction, SVD term) are on all models or on none.
          Errors: 95 % intervals resample users; two models are compared on the same draws. Spreads over seeds stand apart.
Measured  in experiments/results/question/, one record a run and one file with its figures by user
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import aif_jax as aif
from aif_jax import blocks, checkpoint, metrics
from aif_jax.blocks import MatchingStatistics, popularity_offset
from aif_jax.data import BatchKey, Dataset, EventLog, NegativeSampler, SeenPairs, candidates, item_counts
from aif_jax.data.split import sample_positions, time_cuts
from aif_jax.metrics import ByUser
from aif_jax.train import NextItem
from aif_jax.train.evaluate import catalogue_scores, list_scores, rank_of
from aif_jax.types import Params
from experiments import common
from experiments.services import DataWorld, Joint, Model, Program, Runtime, head, of_engine, turn
from experiments.study import datasets, models, records

RESULTS = Path(__file__).resolve().parent.parent / "results" / "question"
WORK = Path("out/question")
EACH = "every behaviour field"
MATCHING = MatchingStatistics((EACH,))
WIDE = dict(long_length=512)
FULLY = (MATCHING, blocks.CrossAttention(dot_product=True), blocks.TargetAttention(dot_product=True), models.DOT)
MODELS: dict[str, dict[str, Any]] = {
    "two-tower": dict(head=aif.heads.LogitSum(), blocks=(models.DOT,)),
    "two-tower with a head": dict(blocks=(models.DOT,)),
    "two-tower with matching statistics": dict(blocks=(MATCHING, models.DOT), **WIDE),
    "aif": dict(blocks=(MATCHING, models.BEA, models.LEARNED, models.DOT), **WIDE),
    "aif without matching statistics": dict(blocks=(models.BEA, models.LEARNED, models.DOT), **WIDE),
    "aif without BEA": dict(blocks=(MATCHING, models.LEARNED, models.DOT), **WIDE),
    "aif without linear memory": dict(blocks=(MATCHING, models.BEA, models.DOT), **WIDE),
    "aif with SIM": dict(blocks=(MATCHING, models.BEA, models.SIM, models.LEARNED, models.DOT), **WIDE),
    "aif with SimTier": dict(blocks=(MATCHING, models.BEA, models.LEARNED, models.WINDOWED, models.DOT), **WIDE),
    "full attention": dict(blocks=FULLY, **WIDE),
}
JUDGED: dict[str, dict[str, Any]] = {
    "two-tower with a head, 512 events": dict(blocks=(models.DOT,), short_length=512, **WIDE),
    "aif with recency": dict(blocks=(MATCHING, models.BEA, models.LEARNED, models.RecentVectors(), models.DOT), **WIDE),
    "aif with similar events": dict(blocks=(MATCHING, models.BEA, models.LEARNED, models.Similar(), models.DOT), **WIDE),
}
"""Models of `ranker_recall` alone."""
BASE, WITH_MATCHING, AIF, FULL = "two-tower", "two-tower with matching statistics", "aif", "full attention"
WITHOUT_MEMORY, WITHOUT_MATCHING = "aif without linear memory", "aif without matching statistics"
COMPARED = (BASE, WITH_MATCHING, AIF)
SEEDED = (AIF, *(name for name in MODELS if name.startswith("aif with")), WITH_MATCHING, BASE)
"""Models that are trained with every seed on the validation split: what a block is worth, of the preset or next to it."""
PUBLIC = ("movielens", "taobao")
TIMED = (BASE, WITH_MATCHING, WITHOUT_MEMORY, AIF, FULL)
METRICS = ("gauc", "gauc_trained", "hr100", "hr100_trained")
TIMES = "times.json"
SEEDS = (0, 1, 2)
EPOCHS = 3
"""Of the test split: the best of 1, 2 and 3 on the validation split, for every model alike (`--plan tuning`)."""
CATALOGUE_REQUESTS = 1000  # requests that rank the whole catalogue, drawn at random
BLOCKS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of all events by time at which the blocks of the rolling split begin; the last block ends with the log."""
LAST = 10
"""Events of a user, the last ones, that the rolling split judges."""
MIN_HISTORY = 5
"""Strictly earlier events that the user of a request has at least."""
REQUESTS = {"validation": 3000, "test": 3000, "rolling": 10_000}
"""How many sampled requests judge a model at most; of the rolling split in each block."""
UNTRAINED = (-100.0, 0.0, 1.0, 2.0, 3.0)
"""Offsets of items without a training event under the popularity correction; each model takes its best one of the validation
split, and keeps it on the test split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What names a run; other hyperparameters are the defaults of `aif.fit`."""

    dataset: str
    model: str
    seed: int = 0
    split: str = "validation"
    epochs: int = 1
    learning_rate: float = 1e-2

    @property
    def id(self) -> str:
        """The name of the record."""
        rate = [] if self.learning_rate == Trial.learning_rate else [f"learning_rate={self.learning_rate:g}"]
        return "/".join([self.dataset, self.split, self.model, f"epochs={self.epochs}", *rate, f"seed {self.seed}"])

    @property
    def file(self) -> str:
        """The id as a file's name."""
        return records.file_of(self.id)


class Requests(NamedTuple):
    """Held-out requests with their sampled candidates, the event's item in column 0."""

    positions: np.ndarray  # int64 [R] positions in the event log
    rows: np.ndarray  # int32 [R, 1 + n]
    labels: np.ndarray  # float32 [R, 1 + n]


class Part(NamedTuple):
    """What one model of a run is trained on and judged on: positions in the log, ascending."""

    name: str
    seen: np.ndarray
    held: np.ndarray


class Slice(NamedTuple):
    """What one model of a run, or a peer, is judged on."""

    data: datasets.StudyData
    part: Part
    requests: Requests
    counts: np.ndarray  # [N] training events
    at: np.ndarray  # requests that rank the whole catalogue


def _each(tried: Iterable[str], on: Sequence[str] = PUBLIC, seeds: Sequence[int] = (0,), **given: Any) -> list[Trial]:
    return [Trial(dataset=where, model=model, seed=seed, **given) for seed in seeds for model in tried for where in on]


TUNED: tuple[dict[str, Any], ...] = (dict(epochs=2), dict(epochs=3), dict(epochs=3, learning_rate=5e-3), dict(epochs=5))
PLANS = {
    "validation": list(dict.fromkeys(_each(MODELS) + _each(SEEDED, seeds=SEEDS))),
    "tuning": [trial for options in TUNED for trial in _each(COMPARED, **options)],
    "test": _each((*COMPARED, FULL, WITHOUT_MATCHING), seeds=SEEDS, split="test", epochs=EPOCHS),
    "rolling": _each(COMPARED, seeds=SEEDS, split="rolling", epochs=EPOCHS),
    "smoke": _each(COMPARED, ("smoke",)) + _each((BASE,), ("smoke",), split="rolling"),
}
"""Runs of a plan, by seed, then model, then data set."""


def config_of(trial: Trial, data: datasets.StudyData) -> aif.Config:
    """Return the config of a run's model on its data set."""
    fields = dict((MODELS | JUDGED)[trial.model])
    schema, smoke = data.dataset.schema, trial.dataset == "smoke"
    made: list[Any] = []
    for block in fields.pop("blocks"):
        if block == MATCHING:
            block = MatchingStatistics(schema.behaviour_fields)
        made += [dataclasses.replace(block, field=field) for field in data.sim_fields] if block == models.SIM else [block]
    if smoke:
        fields |= {name: models.SMOKE["long_length"] for name in ("short_length", "long_length") if name in fields}
    return aif.Config(schema=schema, blocks=tuple(made), **(models.SIZES | (models.SMOKE if smoke else {}) | fields))


def fitted(
    config: aif.Config, data: datasets.StudyData, part: Part, *, folder: Path, recipe: dict[str, Any], **options: Any
) -> aif.Trained:
    """Return a model trained on the part's events by `aif.fit`, from `folder` if it was trained before; `recipe`: settings."""
    built = aif.build(config)
    if not folder.exists():
        user, item, time = (of[part.seen] for of in (data.dataset.log.user, data.dataset.log.item, data.dataset.log.time))
        settings = aif.FitConfig(validation=0.0, test=int(time.max()) + 1, keep_best=None, k=None, **recipe)
        if data.name == "smoke":  # 32 steps in each run, which share their programs
            settings = dataclasses.replace(settings, batch_size=64, epochs=1, since=int(np.sort(time)[-32 * 65]))
        start = built.init(jax.random.key(settings.seed), data.dataset.catalogue, seed=settings.seed)
        start = models.with_clusters(start, config, user, item)
        run = aif.fit(built, data.dataset, settings, task=NextItem(), start=start, **options)
        checkpoint.save(folder, run.trained)
        jax.clear_caches()
    return aif.Trained(built, checkpoint.load(folder).params)


def trained(trial: Trial, part: Part, data: datasets.StudyData, *, work: Path) -> aif.Trained:
    """Return the model of a run, from `work` if it was trained before."""
    folder = work / (trial.file + (f"--{part.name.replace(' ', '_')}" if part.name else ""))
    recipe = {name: getattr(trial, name) for name in ("seed", "epochs", "learning_rate")}
    return fitted(config_of(trial, data), data, part, folder=folder, recipe=recipe)


def parts_of(trial: Trial, data: datasets.StudyData) -> list[Part]:
    """Return what the models of a run are trained and judged on: one for all, or one for each block of the rolling split."""
    parts = data.split
    if trial.split == "rolling":
        return rolling(data.dataset.log, blocks=(0.5, 0.8) if trial.dataset == "smoke" else BLOCKS)
    if trial.split == "validation":
        return [Part("", parts.train, parts.validation)]
    return [Part("", np.sort(np.concatenate([parts.train, parts.validation])), parts.test)]


def rolling(log: EventLog, *, blocks: tuple[float, ...] = BLOCKS, last: int = LAST) -> list[Part]:
    """Return the time line in blocks, each judged by another model: many users, and nothing of the future trained on.

    The blocks begin at these shares of all events by time; events before the first judge nobody. The model of a block is
    trained on all users' events that are strictly earlier, and so are its counts of popularity. A user's requests are among
    their last `last` events, in the one block that holds the very last: so users are independent, each is in one model's
    figures, and figures are averaged over users as if one model had made them. Blocks without a request are left out.
    """
    moments = [*(time_cuts(log.time, validation=0.0, test=1 - share)[2] for share in blocks), int(log.time.max()) + 1]
    ends, found = log.offsets[log.user + 1], []
    judged = np.arange(len(log)) >= ends - last
    for share, start, end in zip(blocks, moments, moments[1:], strict=False):
        final = log.time[ends - 1]
        held = np.flatnonzero(judged & (log.time >= start) & (final >= start) & (final < end))
        held = np.intersect1d(held, sample_positions(log, min_history=MIN_HISTORY))
        if len(held):
            found.append(Part(f"from {share:g}", np.flatnonzero(log.time < start), held))
    return found


def requests_of(trial: Trial, part: Part, data: datasets.StudyData) -> Requests:
    """Return the held-out requests and 99 sampled negatives of each, met items among them; the same for every model and seed.

    Negatives are drawn by training popularity ** 0.75.
    """
    kept = np.intersect1d(part.held, sample_positions(data.dataset.log, min_history=MIN_HISTORY))
    if not len(kept):
        raise ValueError(f"{trial.id}: expected an event with {MIN_HISTORY} earlier events of its user, got none")
    count = 64 if trial.dataset == "smoke" else REQUESTS[trial.split]
    at = np.sort(np.random.default_rng(0).permutation(kept)[:count])
    sampler = NegativeSampler(item_counts(data.dataset, part.seen))
    whole = dataclasses.replace(data.dataset, repeats=True)  # callers mask met items
    source = candidates.sampled_negatives(whole, sampler=sampler, negatives=99)
    rows, labels, _ = source(at, BatchKey(0, 0, 0))
    return Requests(at, rows, labels)


def slice_of(trial: Trial, part: Part, data: datasets.StudyData) -> Slice:
    """Return what a model of a run is judged on."""
    requests = requests_of(trial, part, data)
    return Slice(data, part, requests, item_counts(data.dataset, part.seen), catalogue_requests(requests))


def catalogue_requests(requests: Requests) -> np.ndarray:
    """Return the requests that rank the whole catalogue: positions, ascending."""
    return np.sort(np.random.default_rng(2).permutation(requests.positions)[:CATALOGUE_REQUESTS])


def sampled_metrics(scores: np.ndarray, on: Slice) -> dict[str, ByUser]:
    """Return GAUC by user, see `evaluate`, of scores [R, 1 + n] of sampled candidates."""
    data, requests, log = on.data, on.requests, on.data.dataset.log
    met = met_items(on)
    trained = on.counts[requests.rows[:, :1]] > 0
    where = {
        "gauc_all": np.ones_like(met),
        "gauc_unmet": ~met,
        "gauc_met": met | (requests.labels == 1),
        "gauc_trained": trained & (True if data.repeats else ~met),
    }
    users = log.user[requests.positions][:, None]
    found = {name: metrics.gauc_by_user(scores, requests.labels, users, where=kept) for name, kept in where.items()}
    return found | {"gauc": found["gauc_all" if data.repeats else "gauc_unmet"]}


def met_items(on: Slice) -> np.ndarray:
    """Return which sampled candidates [R, 1 + n] the user has met before."""
    pairs = SeenPairs(on.data.dataset, on.requests.positions)
    return pairs.contains(np.arange(len(on.requests.rows))[:, None], on.requests.rows)


def evaluate(trial: Trial, part: Part, model: aif.PreRanker, params: Params, data: datasets.StudyData) -> dict[str, ByUser]:
    """Return metrics by user: `gauc` of the data's kind of candidates, and of both kinds; `met` against met items; hit rates.

    `gauc_trained` and `hr100_trained` are of the requests whose item has a training event, as every sampled negative has: a
    model cannot tell it by being new. Their catalogue is that of such items.
    """
    dataset, on = data.dataset, slice_of(trial, part, data)
    scores = list_scores(model, params, dataset, on.requests.positions, on.requests.rows)
    offsets = [popularity_offset(on.counts, untrained=untrained) for untrained in UNTRAINED]
    every = catalogue_scores(model, params, dataset, on.at)
    return sampled_metrics(scores, on) | catalogue_metrics(every, on, offsets)


def catalogue_metrics(
    scored: Iterable[tuple[np.ndarray, np.ndarray]], on: Slice, offsets: Sequence[np.ndarray]
) -> dict[str, ByUser]:
    """Return hit rates by user, see `evaluate`, of the requests that rank the catalogue.

    `scored` is as `catalogue_scores` yields it: indices into `on.at`, and scores [b, N] with -inf for what is no candidate. Of
    `offsets` [N], one for each of UNTRAINED, each is added to the scores.
    """
    log, counts = on.data.dataset.log, on.counts
    target = log.item[on.at]
    ranks = np.zeros((1 + len(UNTRAINED), len(on.at)), np.int64)
    for rows, every in scored:
        of_trained = np.where(counts > 0, every + offsets[0], -np.inf)
        for place, scores in enumerate((*(every + offset for offset in offsets), of_trained)):
            ranks[place, rows] = rank_of(scores, target[rows])
    owners, trained, found = log.user[on.at], counts[target] > 0, {}
    for untrained, rank in zip(UNTRAINED, ranks, strict=False):
        for k in (10, 100):
            found[f"hr{k}@{untrained:g}"] = metrics.mean_by_user((rank < k).astype(float), owners)
    hits = (ranks[-1, trained] < 100).astype(float)
    return found | {"hr100_trained": metrics.mean_by_user(hits, owners[trained])}


def run(trial: Trial, data: datasets.StudyData, *, results: Path, work: Path) -> dict[str, Any]:
    """Train, evaluate, keep the model in `work` and the figures in `results`."""
    parts, seconds = parts_of(trial, data), 0.0
    judged, about = [], []
    for part in parts:
        began = time.process_time()
        made = trained(trial, part, data, work=work)
        seconds += time.process_time() - began
        judged.append(evaluate(trial, part, made.model, made.params, data))
        users = len(judged[-1]["gauc_all"].users)
        about.append({"name": part.name, "trained": len(part.seen), "held": len(part.held), "users": users})
    found = {name: joined([one[name] for one in judged]) for name in judged[0]}
    more: dict[str, Any] = {"blocks": about} if trial.split == "rolling" else {}
    met = float(np.mean([met_share(slice_of(trial, part, data)) for part in parts]))
    return keep(results, trial, found, met_items=met, core_seconds=seconds, commit=common.machine()["commit"], **more)


def keep(results: Path, trial: Trial, found: dict[str, ByUser], **more: Any) -> dict[str, Any]:
    """Write the record of a run, and its metrics by user into a file next to it."""
    record = {"id": trial.id, **dataclasses.asdict(trial), "users": len(found["gauc"].users), **more}
    return records.keep(results, record, found)


def met_share(on: Slice) -> float:
    """Return share of the sampled negatives that the user has met before."""
    return float(met_items(on)[:, 1:].mean())


def joined(parts: list[ByUser]) -> ByUser:
    """Return a metric of all parts of a run, whose users differ."""
    users, values, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(users, kind="stable")
    return ByUser(users[order], values[order], weights[order])


def over_seeds(parts: list[ByUser]) -> ByUser:
    """Return the mean over trainings of each user's metric: users are the same in all."""
    return ByUser(parts[0].users, np.mean([part.values for part in parts], 0), parts[0].weights)


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Do the missing runs of a plan."""
    parser = common.parser(__doc__, data=True, results=RESULTS, work=WORK)
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=["validation"], help="default %(default)s")
    parser.add_argument("--model", nargs="+", help="only these models, of --times too")
    parser.add_argument("--times", action="store_true", help="measure times, on a quiet machine")
    parser.add_argument("--rounds", type=int, default=200, help="requests of every model of --times (default %(default)s)")
    parser.add_argument("--report-only", action="store_true", help="print tables from the records and stop")
    options = parser.parse_args(arguments)
    if options.times:
        rounds = 5 if options.smoke else options.rounds
        data = datasets.load("smoke" if options.smoke else "movielens", options.data)
        made = measure_times(data, options.work, rounds=rounds, smoke=options.smoke, tried=options.model or TIMED)
        common.write_json(options.results / TIMES, records.rounded({"rounds": rounds, "models": made}))
        return
    loaded: dict[str, datasets.StudyData] = {}
    plans = [] if options.report_only else ["smoke"] if options.smoke else options.plan
    for trial in (trial for name in plans for trial in PLANS[name]):
        if (options.model and trial.model not in options.model) or trial.id in records.read(options.results):
            continue
        if trial.dataset not in loaded:
            loaded[trial.dataset] = datasets.load(trial.dataset, options.data)
        made = run(trial, loaded[trial.dataset], results=options.results, work=options.work)
        figures = ", ".join(f"{name} {made['figures'][name]:.4f}" for name in ("gauc", "gauc_trained", "hr100_trained"))
        print(f"{trial.id}: {figures}; {made['core_seconds']:.0f} s of CPU in training", flush=True)
        jax.clear_caches()
    if options.report_only:
        print(report(options.results))
    common.write_json(options.json, {"preset": keys(options.results)})


def chosen(found: dict[str, dict[str, Any]], record: dict[str, Any]) -> float:
    """Return the offset of untrained items with the best HR@100 on the validation split.

    A record of the validation split has its own; others take that of the validation record of their model, data set and
    epochs, or of the first one of other epochs.
    """
    wanted = (record["dataset"], record["model"], "validation")
    same = [r for r in found.values() if (r["dataset"], r["model"], r["split"]) == wanted]
    same.sort(key=lambda r: (r["epochs"], r["learning_rate"]) != (record["epochs"], record["learning_rate"]))  # stable
    figures = (record if record["split"] == "validation" or not same else same[0])["figures"]
    return max(UNTRAINED, key=lambda untrained: figures[f"hr100@{untrained:g}"])


def keys(results: Path) -> dict[str, dict[str, float]]:
    """Return what `presets.aif` is judged by, by data set: the test split, every seed there is, additions on no model.

    `gauc_points` and `hr100_ratio` are over the two-tower model, `..._over_matching` over the one with matching statistics,
    each with `_low` and `_high`; `..._trained_...` are of requests whose item has a training event. `met_items` is the share
    of the sampled negatives that the user has met.
    """
    found, made = records.read(results), {}
    for dataset in PUBLIC:
        runs = {name: runs_of(found, dataset, name) for name in (AIF, BASE, WITH_MATCHING)}
        if not all(runs.values()):
            continue
        figures: dict[str, float] = {}
        for other, more in ((BASE, ""), (WITH_MATCHING, "_over_matching")):
            for metric in METRICS:
                if not known(found, runs[AIF] + runs[other], metric):
                    continue
                ours, theirs = (pooled(results, found, runs[name], metric) for name in (AIF, other))
                gap = metrics.paired_interval(ours, theirs, ratio=metric.startswith("hr"))
                key, scale = (metric + "_ratio", 1.0) if metric.startswith("hr") else (metric + "_points", 100.0)
                for end, value in zip(("", "_low", "_high"), gap, strict=True):
                    figures[f"{key}{more}{end}"] = scale * value
        figures["met_items"] = runs[AIF][0]["met_items"]
        made[dataset] = figures
    return made


def runs_of(found: dict[str, dict[str, Any]], dataset: str, model: str, *, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """Return the records of a model's test runs, one a seed."""
    wanted = (dataset, model, "test", epochs)
    return [r for r in found.values() if (r["dataset"], r["model"], r["split"], r["epochs"]) == wanted]


def of_test(results: Path, found: dict[str, dict[str, Any]], dataset: str, model: str, metric: str) -> ByUser:
    """Return a metric of METRICS of the test split by user, averaged over the seeds of a model."""
    return pooled(results, found, runs_of(found, dataset, model), metric)


def pooled(results: Path, found: dict[str, dict[str, Any]], runs: list[dict[str, Any]], metric: str) -> ByUser:
    """Return a metric of METRICS by user, averaged over seeds."""
    return over_seeds([records.by_user(results, run, named(metric, found, runs[0])) for run in runs])


def known(found: dict[str, dict[str, Any]], runs: list[dict[str, Any]], metric: str) -> bool:
    """Return whether all records have a metric of METRICS."""
    return all(named(metric, found, run) in run["figures"] for run in runs)


def named(metric: str, found: dict[str, dict[str, Any]], run: dict[str, Any]) -> str:
    """Return what a record calls a metric of METRICS: hit rates are those under the model's own offset of untrained items."""
    return f"{metric}@{chosen(found, run):g}" if metric == "hr100" else metric


def measure_times(
    data: datasets.StudyData, work: Path, *, rounds: int, smoke: bool, tried: Sequence[str] = TIMED
) -> dict[str, dict[str, Any]]:
    """Return milliseconds of one request of the longest histories, models in turn: `score` is gather, interaction and top-100.

    `whole` is user function and `score`, as if all started when the candidates are there, and `cpu` its processor time. Full
    attention has no part to prepare: its `score` is the whole model. `head` is the head's MLP on ready inputs.
    """
    sizes = ((64, 32),) if smoke else ((1000, 512), (1000, 2048), (10_000, 512))
    timed: dict[str, Callable[[int], float]] = {}
    times: dict[str, dict[str, Any]] = {}
    for model, (count, length) in product(tried, sizes):
        if model == BASE and length == 2048:
            continue
        trial = Trial(dataset=data.name, model=model, split="test", epochs=EPOCHS)
        config, folder, k = config_of(trial, data), work / trial.file, min(100, count)
        config = config if model == BASE else config.replace(long_length=length)
        world = DataWorld(data.dataset, *longest(data.dataset, count))
        if folder.exists():
            served = Model.of(world, aif.Trained(aif.build(config), checkpoint.load(folder).params))
        else:
            served = Model.drawn(world, config)
        split = model != FULL
        runtime = of_engine(served, (count,), k) if split else Runtime(served, served.words, Joint(served, k).best)
        programs: dict[str, Program] = {what: partial(getattr(runtime, what), count) for what in ("score", "whole")}
        if config.head != aif.heads.LogitSum():
            programs["head"] = head(served, count, k)
        name = f"{model}, C={count}, L={length}"
        times[name] = {"trained": folder.exists()}
        timed |= {f"{name}/{what}": partial(turn, program) for what, program in programs.items()}
        timed[f"{name}/cpu"] = partial(turn, programs["whole"], clock=time.process_time)
    common.interleaved(timed, 3)  # warms up
    for key, ms in common.interleaved(timed, rounds).items():
        name, _, what = key.rpartition("/")
        times[name][what] = {"p50": float(np.median(ms)), "p99": float(np.percentile(ms, 99))}
    return times


def longest(dataset: Dataset, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 16 requests of the longest histories: positions in the log, and random candidates of each, int32 [16, C]."""
    log, every = dataset.log, np.arange(len(dataset.log))
    positions = np.argsort(log.offsets[log.user] - log.history_end(every), kind="stable")[: 64 * 16 : 64]
    rng, items = np.random.default_rng(0), len(dataset.catalogue) - 1
    return positions, np.stack([1 + rng.choice(items, candidates, replace=False).astype(np.int32) for _ in positions])


def read_times(results: Path) -> dict[str, Any]:
    """Return what `--times` wrote, {} where it did not."""
    path = results / TIMES
    return json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}


def report(results: Path) -> str:
    """Return each model with its interval over users and its paired difference to the two baselines, by data set and split."""
    lines, found = [], records.read(results)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in found.values():
        key = (record["dataset"], record["split"], f"epochs={record['epochs']}", f"{record['learning_rate']:g}")
        groups.setdefault((*key, record["model"]), []).append(record)
    of = cache(lambda key, metric: pooled(results, found, groups[key], metric))
    for key, runs in sorted(groups.items()):
        lines.append(f"{', '.join(key[:-1])}: {key[-1]} ({len(runs)} seeds)")
        for metric in METRICS:
            if not known(found, runs, metric):
                continue
            ours, name = of(key, metric), named(metric, found, runs[0])
            spread = np.std([record["figures"][name] for record in runs], ddof=1) if len(runs) > 1 else float("nan")
            inside = metrics.user_interval(ours)
            lines.append(f"  {name} {inside.value:.4f} [{inside.low:.4f}, {inside.high:.4f}] seeds ±{spread:.4f}")
            for other in (BASE, WITH_MATCHING):
                theirs = groups.get((*key[:-1], other), [])
                if theirs and key[-1] != other and known(found, theirs, metric):
                    gap = metrics.paired_interval(ours, of((*key[:-1], other), metric), ratio=metric.startswith("hr"))
                    lines.append(f"     against {other}: {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
