"""What a second depth for the hardest tenth of the candidates is worth: a stronger model rescores the best of a lighter one.

Claim     Full attention on the preset's best tenth ranks as full attention on all candidates does, for a part of its time.
Command   python -m experiments.study.depth --data DIR --work DIR, with the models of `question`'s --plan test; then --times
Protocol  That of `question`, test split: the same requests, candidates, met items, models, and offsets of popularity. After HAP
          (arXiv 2603.03770), reconstructed from its abstract: light models score all candidates, stronger ones the hard ones.
          Here the hard ones are the tenth that the first model scores highest: of the catalogue for HR@k, of the sampled
          candidates for GAUC. HAP's sampling and losses by kind of sample are not reconstructed: each model is trained alone.
          The rescored candidates exchange their places among themselves, so that the best tenth stays ahead of the others: by
          the second model's scores, or ("mean") by the mean of both models' scores, each standardised over them. The control
          rescores as many candidates drawn at random. Intervals are 95 % over users, of means over seeds; differences paired.
Measured  in experiments/results/question/depth/, one record a data set, and times.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import checkpoint, metrics
from aif_jax.blocks.item_offset import popularity_offset
from aif_jax.data.candidates import SeenPairs, item_counts
from aif_jax.metrics import ByUser
from aif_jax.train.evaluate import catalogue_scores, rank_of
from experiments import common
from experiments.study import critical, datasets, question, records
from experiments.study.critical import Way
from experiments.study.question import AIF, BASE, FULL, Trial

RESULTS = question.RESULTS / "depth"
MODELS = (BASE, AIF, FULL)
CASCADES = ((AIF, FULL), (BASE, AIF))  # which model scores all candidates, and which one rescores some
BEST, MEAN, RANDOM = "the best tenth", "the best tenth, mean", "a random tenth"
SHARE = 10  # one candidate in so many is rescored


def rescored(first: np.ndarray, second: np.ndarray, where: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The first model's scores [N]; a tenth of the candidates for which `where` is true exchange their places."""
    kept = np.flatnonzero(where)
    count = -(-len(kept) // SHARE)
    at = rng.choice(kept, count, replace=False) if kind == RANDOM else kept[np.argsort(-first[kept])[:count]]
    order = second[at]
    if kind == MEAN:
        order = sum((one - one.mean()) / max(one.std(), 1e-9) for one in (first[at], second[at]))
    made = first.copy()
    made[at[np.argsort(-order)]] = -np.sort(-first[at])
    return made


def ways(scores: dict[str, np.ndarray], where: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Scores [R, N] of each model alone and of each cascade, by name."""
    yield from scores.items()
    for first, second in CASCADES:
        for kind in (BEST, MEAN, RANDOM):
            rng, each = np.random.default_rng(0), zip(scores[first], scores[second], where, strict=True)
            yield f"{first}, then {second} on {kind}", np.stack([rescored(*one, kind, rng) for one in each])


def evaluate(data: datasets.StudyData, seed: int, *, kept: Path, work: Path) -> dict[str, dict[str, ByUser]]:
    """Metrics by user of each model and cascade: `gauc`, `hr10`, `hr100`."""
    log, found, sampled, every = data.dataset.log, records.read(kept), {}, {}
    trials = {name: Trial(dataset=data.name, model=name, seed=seed, split="test", epochs=question.EPOCHS) for name in MODELS}
    (part,) = question.parts_of(trials[AIF], data)
    requests, counts = question.requests_of(trials[AIF], part, data), item_counts(data.dataset, part.seen)
    at = question.catalogue_requests(requests)
    for name, trial in trials.items():
        if not (work / trial.file).exists() or trial.id not in found:
            raise FileNotFoundError(f"{trial.id}: expected a model in {work}, a record in {kept}; run question's --plan test")
        model, params, _ = question.trained(trial, part, data, work=work, progress=False)
        sampled[name] = question.sampled_scores(model, params, data, requests, progress=False)
        offset = popularity_offset(counts, untrained=question.chosen(found, found[trial.id]))
        every[name] = np.empty((len(at), len(counts)), np.float32)
        for rows, scores in catalogue_scores(model, params, data.dataset, at, batch_size=4):
            every[name][rows] = scores + offset
    met = SeenPairs(log, requests.positions).contains(np.arange(len(requests.rows))[:, None], requests.rows)
    where, users, made = ~met | data.repeats, log.user[requests.positions][:, None], {}
    for name, scores in ways(sampled, where):
        made[name] = {"gauc": metrics.gauc_by_user(scores, requests.labels, users, where=where)}
    for name, scores in ways(every, np.isfinite(every[AIF])):
        ranks = rank_of(scores, log.item[at])
        made[name] |= {f"hr{k}": metrics.mean_by_user(ranks < k, log.user[at]) for k in (10, 100)}
    return made


def record_of(name: str, seeds: list[int], made: list[dict[str, dict[str, ByUser]]]) -> dict[str, Any]:
    """The figures of each way, their paired differences to each model alone, and their means by seed."""
    pooled = {way: {key: question.over_seeds([one[way][key] for one in made]) for key in made[0][way]} for way in made[0]}
    ours: dict[str, dict[str, Any]] = {way: {"figures": metrics.user_intervals(one)} for way, one in pooled.items()}
    for way, one in pooled.items():
        gaps = {model: metrics.paired_intervals(one, pooled[model]) for model in MODELS if model != way}
        ours[way] |= {"differences": gaps, "seeds": {key: [of[way][key].mean for of in made] for key in one}}
    return {"id": f"{name}, seeds {seeds}", "dataset": name, "users": len(pooled[AIF]["gauc"].users), "ways": ours}


def after(first: Way, second: Way) -> Way:
    """The way in which the second model scores what the first one found best."""

    def both(one: Callable[..., Any], other: Callable[..., Any]) -> Callable[[int, np.ndarray], Any]:
        return lambda i, found: other(i, found[np.asarray(one(i, found)[1])])

    return Way(*map(both, first, second))


def measure_times(data: datasets.StudyData, work: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds p50 of one request, C=10,000 or the whole catalogue, ways in turn, as `question.measure_times` does."""
    positions, rows = critical.longest(data.dataset, 10_000)
    tenth = len(rows[0]) // SHARE

    def way(model: str, k: int = min(100, tenth), make: Callable[..., Way] = critical.staged) -> Way:
        trial = Trial(dataset=data.name, model=model, split="test", epochs=question.EPOCHS)
        return make(question.config_of(trial, data), data.dataset, positions, k, checkpoint.load(work / trial.file).params)

    full, ready = way(FULL, make=critical.sequential), way(FULL)
    timed = {
        BASE: way(BASE), AIF: way(AIF), FULL: full, f"{FULL}, user state ready": ready,
        f"{BASE}, then {AIF}": after(way(BASE, tenth), way(AIF)), f"{AIF}, then {FULL}": after(way(AIF, tenth), full),
        f"{AIF}, then {FULL}, user state ready": after(way(AIF, tenth), ready),
    }  # fmt: skip
    scores = {name: partial(critical.time_one, one.critical, rows, time.perf_counter) for name, one in timed.items()}
    spent = {name: partial(critical.time_one, one.whole, rows, time.process_time) for name, one in timed.items()}
    ms, cpu = (common.interleaved(once, 3 + rounds) for once in (scores, spent))
    return {name: {"score": np.median(ms[name][3:]), "cpu": np.median(cpu[name][3:])} for name in timed}


def report(record: dict[str, Any]) -> str:
    """Each way with its interval over users and its paired differences, in points."""
    lines = [f"{record['id']}, {record['users']} users"]
    for way, one in record["ways"].items():
        for name, figures in (("", one["figures"]), *one["differences"].items()):
            cells = (f"{key} {100 * x:.2f} [{100 * low:.2f}, {100 * high:.2f}]" for key, (x, low, high) in figures.items())
            lines.append(f"  {f'  against {name}' if name else way}: {', '.join(cells)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Judges the ways on each data set, or times them."""
    parser = records.parser(__doc__, results=RESULTS, work=Path("out/question"))
    parser.add_argument("--dataset", nargs="+", default=["movielens", "taobao"], help="data sets (default %(default)s)")
    parser.add_argument("--seed", nargs="+", type=int, default=list(question.SEEDS), help="seeds (default %(default)s)")
    parser.add_argument("--kept", metavar="DIR", type=Path, default=question.RESULTS, help="question's records (%(default)s)")
    parser.add_argument("--times", action="store_true", help="measure times only, of the first data set, on a quiet machine")
    parser.add_argument("--rounds", type=int, default=150, help="requests of every way (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="print what the records say and stop")
    options = parser.parse_args(arguments)
    if options.times:
        made = measure_times(datasets.load(options.dataset[0], options.data), options.work, options.rounds)
        return common.write_json(options.results / question.TIMES, records.rounded({"rounds": options.rounds, "ways": made}))
    for name in () if options.report else options.dataset:
        data = datasets.load(name, options.data)
        found = [evaluate(data, seed, kept=options.kept, work=options.work) for seed in options.seed]
        records.append(options.results, record_of(name, options.seed, found) | {"commit": common.machine()["commit"]})
    print("\n".join(map(report, records.read(options.results).values())))


if __name__ == "__main__":
    main()
