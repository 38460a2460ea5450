"""What a cut loses of what the ranker behind it wants: the question of a pre-ranker.

Claim     Taught by the ranker that it serves, `presets.aif` loses less of the ranker's top 10 than two-tower models that are
          taught alike, because it has the capacity for what the ranker says.
Command   python -m experiments.ranker_recall --data DIR --plan validation --json FILE
          (--plan test: the chosen weight, three seeds; --report-only: tables from the records)
Time      on one core about 70 minutes for the validation plan, twice that for the test plan; what is done is kept in --work
Cascade   retrieval, see `experiments.study.retrieval`: the same candidates for all; a ranker of full attention with a larger
          head, the mean of two seeds that no pre-ranker has; the pre-rankers of `question`, at its sizes, cut the candidates.
          Scores have the popularity correction of serving, the ranker's too.
Inputs    as the data sets have them: MovieLens with its first genre as category, without text; Taobao without made content.
Training  `aif.fit` with its defaults, for rankers and pre-rankers. Taught: one more listwise term, with a weight, on the
          ranker's scores of the event's item and 16 of 64 retrieved candidates (`Teacher(candidates=...)`). The weight is
          chosen for each model on the validation split.
Figures   recall K@C-N: the share of the ranker's best K of C candidates among the N that are kept. survives: whether the
          event's item is kept; hr10, ndcg10: of the cascade, the ranker's order of what is kept; own: of the pre-ranker alone;
          ranker: of the ranker without a cut. agreement: share of pairs in the ranker's order. 95 % over users, pairs on the
          same draws; several seeds are averaged by user.
Measured  in experiments/results/ranker_recall/
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import aif_jax as aif
from aif_jax import checkpoint, metrics, train
from aif_jax.blocks import popularity_offset
from aif_jax.data import item_counts
from aif_jax.metrics import ByUser, Interval
from aif_jax.train import NextItem, losses
from aif_jax.train.distillation import RankedCandidates, Scores, model_scores, rank_retrieved
from experiments import common
from experiments.datasets import movielens, taobao
from experiments.study import datasets, question, records, retrieval
from experiments.study.question import Part, Requests

RESULTS = Path(__file__).resolve().parent / "results" / "ranker_recall"
MODELS = {
    "two_tower": question.BASE,
    "two_tower_head": "two-tower with a head",
    "matching": question.WITH_MATCHING,
    "aif": question.AIF,
    "full_attention": question.FULL,
}
"""Pre-rankers by name, and what `question` calls them."""
COMPARED = ("two_tower", "matching", "aif")
RANKER_HEAD, RANKER_SEEDS = (128, 64), (11, 12)
WEIGHTS = (0.0, 1.0, 4.0, 16.0)
"""Of the ranker's term: 0 is not taught. All are tried on the validation split."""
SIZES = {1000: (20, 50, 100, 200), 3000: (100, 300)}
"""Retrieved candidates, and how many are kept."""
SMOKE_SIZES = {40: (10, 20), 100: (20,)}
TOPS = (10, 50)
POWER = 0.75  # of popularity, in the draws of negatives and so in the correction
AGREEING = 200  # requests whose pairs are compared
LAST = np.float32(-1e9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A pre-ranker of the record."""

    dataset: str
    model: str
    split: str = "validation"
    weight: float = 0.0
    corrected: bool = False  # taught the ranker's order with the popularity correction, which serving adds
    seed: int = 0

    @property
    def id(self) -> str:
        """The name of the record."""
        weight = f"weight={self.weight:g}{', corrected' if self.corrected else ''}"
        return f"{self.dataset}/{self.split}/{self.model}/{weight}/seed {self.seed}"


def plan(name: str, chosen: dict[tuple[str, str], float]) -> list[Trial]:
    """The runs of a plan; `chosen` is the weight by data set and model for the test split."""
    if name == "smoke":
        return [Trial(dataset="smoke", model=model, weight=weight) for model, weight in (("two_tower", 0.0), ("matching", 4.0))]
    both = question.PUBLIC
    if name == "validation":
        tried = [(model, weight) for weight in (0.0, 4.0, 1.0, 16.0) for model in COMPARED]
        more = [("two_tower_head", 4.0), ("full_attention", 0.0)]
        return [Trial(dataset=where, model=model, weight=weight) for where in both for model, weight in (*tried, *more)]
    return [
        Trial(dataset=where, model=model, weight=weight, seed=seed, split="test")
        for seed in question.SEEDS for where in both for model in COMPARED
        for weight in (chosen.get((where, model), 4.0), 0.0)
    ]  # fmt: skip


class World(NamedTuple):
    """A data set with its requests, their candidates, and the ranker's scores."""

    data: datasets.StudyData
    part: Part
    requests: Requests
    counts: np.ndarray  # int64 [N] training events
    found: np.ndarray  # int32 [R, C] candidates in the order of retrieval
    ranker: np.ndarray  # float32 [R, C] scores of the ranker
    teaching: np.ndarray  # int32 [n, 64] candidates of every event of the log
    ranked: RankedCandidates  # the ranker's scores of these


def load(name: str, folder: Path | None) -> datasets.StudyData:
    """A data set as its files have it."""
    if name == "smoke":
        return datasets.load(name)
    if folder is None:
        raise ValueError("ranker_recall: expected --data DIR, the folder of the data sets, got none")
    files = folder / datasets.FOLDERS[name]
    dataset = movielens.read(files, behaviour_fields=("year",)) if name == "movielens" else None
    dataset = taobao.read(files, between=taobao.WINDOW) if dataset is None else dataset
    return datasets.StudyData(name=name, dataset=dataset, split=aif.data.split_by_time(dataset.log))


def config_of(data: datasets.StudyData, model: str) -> aif.Config:
    """The config of a pre-ranker, or of the "ranker"."""
    known = MODELS["full_attention" if model == "ranker" else model]
    config = question.config_of(question.Trial(dataset=data.name, model=known), data)
    return config.replace(head=RANKER_HEAD) if model == "ranker" else config


def fitted(data: datasets.StudyData, part: Part, model: str, *, seed: int, folder: Path, **options: Any) -> aif.Trained:
    """A model trained on the part's events, from `folder` if it was trained before."""
    built = aif.build(config_of(data, model))
    if not folder.exists():
        first = int(data.dataset.log.time[part.held].min())
        config = aif.FitConfig(validation=0.0, test=first, keep_best=None, k=None, seed=seed, repeats=data.repeats)
        if data.name == "smoke":
            config = dataclasses.replace(config, batch_size=64, epochs=1)
        run = aif.fit(built, data.dataset, config, task=NextItem(), **options)
        checkpoint.save(folder, run.trained)
        jax.clear_caches()
    return aif.Trained(built, checkpoint.load(folder).params)


def world_of(data: datasets.StudyData, split: str, work: Path, *, progress: bool) -> World:
    """Trains the ranker and scores what retrieval finds, or reads it from `work`."""
    trial = question.Trial(dataset=data.name, model="", split=split)
    (part,) = question.parts_of(trial, data)
    requests, counts = question.requests_of(trial, part, data), item_counts(data.dataset, part.seen)
    folder = work / f"{data.name}--{split}"
    folder.mkdir(parents=True, exist_ok=True)
    seeds = RANKER_SEEDS[:1] if data.name == "smoke" else RANKER_SEEDS
    rankers = [fitted(data, part, "ranker", seed=seed, folder=folder / f"ranker--{seed}", progress=progress) for seed in seeds]
    scores = mean_of([model_scores(one.model, one.params, data.dataset) for one in rankers])
    first = int(data.dataset.log.time[part.held].min())
    positions = NextItem().positions(data.dataset, min_history=1, since=None, before=first)
    if not (folder / "requests.npz").exists():
        found = retrieval.of_requests(data, part, requests, counts)
        np.savez(folder / "requests.npz", found=found, ranker=scores(requests.positions, found))
    with np.load(folder / "requests.npz") as arrays:
        found, ranker = arrays["found"], arrays["ranker"]
    if not (folder / "teaching.npy").exists():
        np.save(folder / "teaching.npy", retrieval.of_training(data, part, positions, counts))
    teaching = np.load(folder / "teaching.npy")
    name = " ".join(one.version for one in rankers)
    ranked = rank_retrieved(
        scores, data.dataset, positions, teaching, folder=folder / "taught", name=name, repeats=data.repeats, progress=progress
    )
    jax.clear_caches()
    return World(data, part, requests, counts, found, ranker, teaching, ranked)


def mean_of(scores: list[Scores]) -> Scores:
    """The mean of several rankers' scores."""
    return lambda positions, rows: np.mean([one(positions, rows) for one in scores], axis=0, dtype=np.float32)


def run(trial: Trial, world: World, *, results: Path, work: Path, progress: bool) -> dict[str, Any]:
    """Trains a pre-ranker, cuts, and keeps the figures by user."""
    began, offset = time.process_time(), popularity_offset(world.counts, power=POWER, untrained=None)

    def known(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found, scores = world.ranked.at(positions)
        assert (found == rows).all()  # `fit` takes the same candidates as `rank_retrieved` did
        return scores + offset[rows] if trial.corrected else scores

    options: dict[str, Any] = {"progress": progress}
    if trial.weight:
        distill = losses.distill_listwise(corrected=trial.corrected)
        options["teacher"] = train.Teacher(known, trial.weight * distill, candidates=world.teaching)
    folder = work / f"{trial.dataset}--{trial.split}" / records.file_of(trial.id)
    trained = fitted(world.data, world.part, trial.model, seed=trial.seed, folder=folder, **options)
    seconds = time.process_time() - began
    scores = model_scores(trained.model, trained.params, world.data.dataset)(world.requests.positions, world.found)
    found = by_user(world, scores)
    asked = question.Trial(dataset=trial.dataset, model="", split=trial.split)
    ranking = question.evaluate(asked, world.part, trained.model, trained.params, world.data, progress=progress)
    found |= {name: ranking[name] for name in ("gauc", "gauc_trained", "hr100@0", "hr100_trained", "hr10@0")}
    jax.clear_caches()
    record = {"id": trial.id, **dataclasses.asdict(trial), "core_seconds": seconds, "commit": common.machine()["commit"]}
    return records.keep(results, record, found)


def by_user(world: World, scores: np.ndarray) -> dict[str, ByUser]:
    """The figures of scores [R, C] of the candidates, by user."""
    log, at = world.data.dataset.log, world.requests.positions
    target, users = log.item[at], log.user[at]
    made: dict[str, ByUser] = {}
    sizes = SMOKE_SIZES if world.data.name == "smoke" else SIZES
    for size, cuts in sizes.items():
        rows = world.found[:, :size]
        offset = popularity_offset(world.counts, power=POWER, untrained=None)[rows]
        ours, ranker = (np.where(rows > 0, one[:, :size] + offset, LAST) for one in (scores, world.ranker))
        values = of_cuts(ours, ranker, rows == target[:, None], cuts)
        wide, trained = f"@{size}", world.counts[target] > 0
        made |= {name.replace("@", wide): metrics.mean_by_user(each, users) for name, each in values.items()}
        made |= {
            name.replace("@", wide) + " trained": metrics.mean_by_user(each[trained], users[trained])
            for name, each in values.items()
        }
        if size == min(sizes):
            some = np.random.default_rng(1).permutation(len(rows))[:AGREEING]
            pairs = [metrics.order_agreement(ours[[n]], ranker[[n]], where=rows[[n]] > 0).value for n in some]
            made[f"agreement{wide}"] = metrics.mean_by_user(pairs, users[some])
    return made


def of_cuts(ours: np.ndarray, ranker: np.ndarray, hit: np.ndarray, cuts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Figures [R] by name of cutting candidates [R, C] to so many, see the header; `hit` is where the event's item is."""
    place, wanted = rank(ours), rank(ranker)
    each, there, at = np.arange(len(ours)), hit.any(1), hit.argmax(1)

    def ranked(ranks: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best = inside & (ranks < 10)
        return best.astype(float), np.where(best, 1 / np.log2(ranks + 2.0), 0)

    made = {"ranker_hr10@": ranked(wanted[each, at], there)[0], "ranker_ndcg10@": ranked(wanted[each, at], there)[1]}
    made |= {"own_hr10@": ranked(place[each, at], there)[0], "retrieved@": there.astype(float)}
    for cut in cuts:
        kept = place < cut
        for top in TOPS:
            if top <= cut:
                made[f"recall{top}@-{cut}"] = (kept & (wanted < top)).sum(1) / top
        inside = there & kept[each, at]
        above = (kept & (wanted < wanted[each, at][:, None])).sum(1)
        made[f"survives@-{cut}"] = inside.astype(float)
        made[f"hr10@-{cut}"], made[f"ndcg10@-{cut}"] = ranked(above, inside)
    return made


def rank(scores: np.ndarray) -> np.ndarray:
    """Ranks [R, C], 0 the highest score; ties by column, the order of retrieval."""
    ranks = np.empty(scores.shape, np.int64)
    np.put_along_axis(ranks, np.argsort(-scores, axis=1, kind="stable"), np.arange(scores.shape[1])[None], axis=1)
    return ranks


# from the records


def pooled(results: Path, runs: list[dict[str, Any]], metric: str) -> ByUser:
    """A metric by user, averaged over seeds."""
    return question.over_seeds([records.by_user(results, one, metric) for one in runs])


def runs_of(found: dict[str, dict[str, Any]], dataset: str, split: str, model: str, weight: float) -> list[dict[str, Any]]:
    """The records of a model, one a seed."""
    wanted = (dataset, split, model, weight)
    return [r for r in found.values() if (r["dataset"], r["split"], r["model"], r["weight"]) == wanted]


def chosen_weights(results: Path) -> dict[tuple[str, str], float]:
    """The weight by data set and model with the best recall of the ranker's top 10 on the validation split."""
    found = [one for one in records.read(results).values() if one["split"] == "validation" and one["weight"]]
    found = [one for one in found if one["dataset"] in question.PUBLIC]
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for one in found:
        key = (one["dataset"], one["model"])
        best[key] = max(best.get(key, (0.0, 0.0)), (one["figures"]["recall10@1000-100"], one["weight"]))
    return {key: weight for key, (_, weight) in best.items()}


def lost(metric: ByUser) -> ByUser:
    """The share that a recall lacks, by user."""
    return metric._replace(values=1 - metric.values)


def report(results: Path) -> str:
    """Tables by data set and split: shares of the ranker's top 10 lost, share of items kept, the cascade's share, GAUC."""
    found, lines = records.read(results), []
    for dataset, split in dict.fromkeys((r["dataset"], r["split"]) for r in found.values()):
        sizes = SMOKE_SIZES if dataset == "smoke" else SIZES
        cuts = [f"@{size}-{cut}" for size, some in sizes.items() for cut in some]
        shown = [f"recall10{cut}" for cut in cuts]
        lines.append(
            f"\n{dataset}, {split}: % of the ranker's top 10 lost; event's item kept, HR@10 of the cascade over the ranker's"
        )
        lines.append(
            f"{'':32}" + "".join(f"{cut[1:]:>12}" for cut in cuts) + f"{'kept':>9}{'share':>8}{'GAUC':>8}{'own HR@10':>11}"
        )
        for model, weight in dict.fromkeys((r["model"], r["weight"]) for r in found.values() if r["dataset"] == dataset):
            runs = runs_of(found, dataset, split, model, weight)
            if not runs:
                continue
            name = f"{model}, {f'taught, weight {weight:g}' if weight else 'not taught'} ({len(runs)})"
            cells = "".join(f"{100 * lost(pooled(results, runs, metric)).mean:12.2f}" for metric in shown)
            size, cut = next(iter(sizes)), cuts[min(2, len(cuts) - 1)]
            kept, share = (pooled(results, runs, f"{name}{cut}") for name in ("survives", "hr10"))
            of = metrics.paired_interval(share, pooled(results, runs, f"ranker_hr10@{size}"), ratio=True).value
            own = pooled(results, runs, f"own_hr10@{size}").mean
            lines.append(f"{name:32}{cells}{kept.mean:9.3f}{of:8.3f}{pooled(results, runs, 'gauc').mean:8.4f}{own:11.3f}")
    return "\n".join(lines)


def keys(results: Path) -> dict[str, dict[str, Any]]:
    """Figures of the test split by data set, see the issue's names: 1,000 to 100, each model with its chosen weight."""
    found, weights, made = records.read(results), chosen_weights(results), {}
    for dataset in question.PUBLIC:
        runs = {model: runs_of(found, dataset, "test", model, weights.get((dataset, model), 4.0)) for model in COMPARED}
        if not all(runs.values()):
            continue
        losses_of = {model: lost(pooled(results, some, "recall10@1000-100")) for model, some in runs.items()}
        figures: dict[str, Any] = {f"lost10_{model}": 100 * one.mean for model, one in losses_of.items()}
        figures["lost10_aif_high"] = 100 * metrics.user_interval(losses_of["aif"]).high
        for other in COMPARED[:2]:
            ratio = metrics.paired_interval(losses_of["aif"], losses_of[other], ratio=True)
            figures |= {f"lost10_ratio_over_{other}": ratio.value, f"lost10_ratio_over_{other}_high": ratio.high}
        share: Interval = metrics.paired_interval(
            pooled(results, runs["aif"], "hr10@1000-100"), pooled(results, runs["aif"], "ranker_hr10@1000"), ratio=True
        )
        figures |= {"cascade_hr10_share": share.value, "cascade_hr10_share_low": share.low}
        figures["order_holds"] = {
            "full attention": bool(figures["lost10_aif"] < min(figures[f"lost10_{o}"] for o in COMPARED[:2]))
        }
        made[dataset] = figures
    return made


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Does the missing runs of a plan and prints the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--plan", choices=("validation", "test"), default="validation", help="default %(default)s")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the folder that holds the data sets' folders")
    parser.add_argument("--results", metavar="DIR", type=Path, default=RESULTS, help="records (default %(default)s)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("out/ranker_recall"), help="models, scores")
    parser.add_argument("--dataset", nargs="+", help="only these data sets")
    parser.add_argument("--model", nargs="+", help="only these models")
    parser.add_argument("--report-only", action="store_true", help="print tables from the records and stop")
    options = parser.parse_args(arguments)
    name, worlds = "smoke" if options.smoke else options.plan, {}
    for trial in [] if options.report_only else plan(name, chosen_weights(options.results)):
        left_out = any(
            some and value not in some for value, some in ((trial.dataset, options.dataset), (trial.model, options.model))
        )
        if left_out or trial.id in records.read(options.results):
            continue
        if trial.dataset not in worlds:
            worlds = {trial.dataset: world_of(load(trial.dataset, options.data), trial.split, options.work, progress=True)}
        made = run(trial, worlds[trial.dataset], results=options.results, work=options.work, progress=True)
        of = {name: value for name, value in made["figures"].items() if name.startswith("recall10@") and "trained" not in name}
        print(f"{trial.id}: {', '.join(f'{name} {value:.4f}' for name, value in of.items())}", flush=True)
    print(report(options.results))
    common.report({"preset": keys(options.results)}, options.json)


if __name__ == "__main__":
    main()
