"""What a cut loses of what the ranker behind it wants: the question of a pre-ranker.

Claim     Taught by the ranker that it serves, `presets.aif` loses less of the ranker's top 10 than two-tower models that are
          taught alike, because it has the capacity for what the ranker says.
Command   python -m experiments.ranker_recall --data DIR --plan validation --json FILE
          (--plan test: the chosen weight, three seeds; --ranker trees or sequence; --report-only: tables from the records)
Time      on one core 3 to 9 minutes a run, longest where MovieLens is taught; what is done is kept in --work
Cascade   retrieval, a ranker (see `retrieval` and `rankers` in `experiments.study`), and the pre-rankers of `question` at its
          sizes, which cut the candidates. All scores have the popularity correction of serving.
Inputs    as the data sets have them: MovieLens with its first genre as category, without text; Taobao without made content
Training  `aif.fit` with its defaults. Taught: one more listwise term, with a weight, on the ranker's scores of the event's item
          and some of 64 retrieved candidates (`Teacher(candidates=...)`). Weight and number of candidates are chosen on the
          validation split with the ranker of full attention, alike for all models and rankers; see TRIED to TEMPERATURES.
Figures   recall K@C-N: the share of the ranker's best K of C candidates among the N that are kept. survives: whether the
          event's item is kept; hr10, ndcg10: of the cascade, the ranker's order of what is kept; own: of the pre-ranker alone;
          ranker: of the ranker without a cut. agreement: share of pairs in the ranker's order, of AGREEING requests. 95 %
          over users, pairs on the same draws; several seeds are averaged by user.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import aif_jax as aif
from aif_jax import metrics, train
from aif_jax.data import item_counts
from aif_jax.metrics import ByUser, Interval
from aif_jax.output import track
from aif_jax.train import NextItem
from aif_jax.train.distillation import RankedCandidates, Scores, model_scores, rank_retrieved
from experiments import common
from experiments.datasets import movielens, taobao
from experiments.study import datasets, question, rankers, records, retrieval, teaching
from experiments.study.question import Part, Requests

RESULTS = Path(__file__).resolve().parent / "results" / "ranker_recall"
MODELS = {
    "two_tower": question.BASE,
    "matching": question.WITH_MATCHING,
    "aif": question.AIF,
    "two_tower_512": "two-tower with a head, 512 events",
    "aif_no_bea": "aif without BEA",
    "aif_no_linear": "aif without linear memory",
    "aif_no_matching": "aif without matching statistics",
    "aif_recency": "aif with recency",
    "aif_similar": "aif with similar events",
    "aif_sim": "aif with SIM",
    "full_attention": question.FULL,
}
"""Pre-rankers by name, and what `question` calls them."""
COMPARED = ("two_tower", "matching", "aif")
WITH_STATISTICS = tuple(f"{model}_statistics" for model in COMPARED)
"""COMPARED with item statistics as of each request among their inputs, before the ranker that reads such counts itself."""
MODELS |= {f"{model}_statistics": MODELS[model] for model in COMPARED}
JUDGED = ("two_tower_512", "aif_no_bea", "aif_no_linear", "aif_no_matching", "aif_recency", "aif_similar")
"""What a block is worth, and longer histories: on the validation split alone, next to `aif`, taught as usual."""
ONCE = ("aif_sim", "full_attention")
"""The same with one seed, as they take longest. SimTier reads a content embedding, which these data do not have."""


RATE = aif.FitConfig().learning_rate


class Taught(NamedTuple):
    """How a model is trained: how the ranker teaches it, and the learning rate."""

    weight: float = 0.0  # of its term: 0 is not taught
    candidates: int = 16  # of 64 retrieved ones, in each batch
    learning_rate: float = RATE
    temperature: float = 1.0  # of the listwise term
    loss: str = "listwise"  # of `study.teaching`

    def __str__(self) -> str:
        more = "" if self.candidates == 16 else f", {self.candidates} candidates"
        more += "" if self.learning_rate == RATE else f", rate {self.learning_rate:g}"
        more += "" if self.temperature == 1 else f", temperature {self.temperature:g}"
        return f"weight={self.weight:g}{more}" + ("" if self.loss == "listwise" else f", {self.loss}")


ALONE, USUAL = Taught(), Taught(16.0, candidates=40)
TRIED = (USUAL, Taught(4.0, candidates=40), ALONE, *(Taught(weight) for weight in (1.0, 4.0, 16.0)))
"""On the validation split. USUAL, of all other figures, is best for each model but the two-tower one on Taobao."""
FURTHER = (Taught(64.0, candidates=40), *(USUAL._replace(learning_rate=rate) for rate in (5e-3, 2e-2)))
"""What the two-tower model alone tries too."""
TEMPERATURES = tuple(USUAL._replace(temperature=value) for value in (0.5, 2.0))  # on MovieLens' validation split
BEST = tuple(USUAL._replace(loss=loss) for loss in ("pairwise", "head"))
OTHER_LOSSES = {  # than listwise, there too; those that are best for the two-tower model are tried for all
    "two_tower": tuple(USUAL._replace(weight=each, loss=loss) for loss, tried in teaching.WEIGHTS.items() for each in tried),
    "matching": BEST,
    "aif": BEST,
}
SIZES = {1000: (20, 50, 100, 200), 3000: (100, 300)}
"""Retrieved candidates, and how many are kept."""
SMOKE_SIZES = {40: (10, 20), 100: (20,)}
TOPS = (10, 50)
CUT, NO_WORSE = "@1000-100", -0.3
"""The cut of `keys`, and the points of the top 10 that an equal model may lose more."""
ENDS = ("", "_low", "_high")
AGREEING = 200  # requests whose pairs are compared
BLOCK = 256  # requests whose candidates the ranker scores at once
LAST = np.float32(-1e9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A pre-ranker of the record, before a ranker."""

    dataset: str
    model: str
    ranker: str = "attention"
    split: str = "validation"
    weight: float = 0.0
    candidates: int = 16
    learning_rate: float = RATE
    temperature: float = 1.0
    loss: str = "listwise"  # these five are of `Taught`
    seed: int = 0

    @property
    def id(self) -> str:
        """The name of the record."""
        ranker = "" if self.ranker == "attention" else f"{self.ranker}/"
        return f"{self.dataset}/{self.split}/{ranker}{self.model}/{taught_of(dataclasses.asdict(self))}/seed {self.seed}"

    @property
    def trained(self) -> str:
        """The name of the model: what no ranker teaches is the same before all of them."""
        return self.id if self.weight else dataclasses.replace(self, ranker="attention").id


def plan(name: str, ranker: str) -> list[Trial]:
    """Return the runs of a plan with a ranker."""
    both = question.PUBLIC
    if name == "smoke":
        tried = [("smoke", "two_tower", ALONE), ("smoke", "matching", USUAL)]
    elif name == "validation" and ranker == "attention":
        every = [(model, taught) for taught in TRIED for model in COMPARED]
        every += [("two_tower", taught) for taught in FURTHER]
        every += [(model, USUAL) for model in (*JUDGED, *ONCE)]
        tried = [(where, *one) for where in both for one in every]
        tried += [("movielens", model, taught) for taught in TEMPERATURES for model in COMPARED]
        tried += [("movielens", model, taught) for model, some in OTHER_LOSSES.items() for taught in some]
    else:
        tried = [(where, model, taught) for where in both for model in COMPARED for taught in (USUAL, ALONE)]
    split, seeds = ("test", question.SEEDS) if name == "test" else ("validation", (0,))
    every = [(seed, *one) for seed in seeds for one in tried]
    if name == "validation" and ranker == "attention":
        every += [(seed, where, model, USUAL) for where in both for seed in (1, 2) for model in ("aif", *JUDGED[1:])]
    if name == "test" and ranker == "trees":
        every += [(0, "taobao", model, USUAL) for model in WITH_STATISTICS]
    return [
        Trial(dataset=where, model=model, ranker=ranker, seed=seed, split=split, **taught._asdict())
        for seed, where, model, taught in every
    ]


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
    """Return a data set as its files have it."""
    if name == "smoke":
        return datasets.load(name)
    if folder is None:
        raise ValueError("ranker_recall: expected --data DIR, the folder of the data sets, got none")
    files = folder / datasets.FOLDERS[name]
    dataset = movielens.read(files, behaviour_fields=("year",)) if name == "movielens" else None
    dataset = taobao.read(files, between=taobao.WINDOW) if dataset is None else dataset
    return datasets.StudyData(name=name, dataset=dataset, split=aif.data.split_by_time(dataset.log))


def world_of(data: datasets.StudyData, split: str, ranker: str, work: Path) -> World:
    """Train the ranker and score what retrieval finds, or read it from `work`."""
    trial = question.Trial(dataset=data.name, model="", split=split)
    (part,) = question.parts_of(trial, data)
    requests, counts = question.requests_of(trial, part, data), item_counts(data.dataset, part.seen)
    folder = work / f"{data.name}--{split}"
    own = folder / ranker
    own.mkdir(parents=True, exist_ok=True)
    positions = NextItem().positions(
        data.dataset, min_history=1, since=None, before=int(data.dataset.log.time[part.held].min())
    )
    found = once(folder / "found.npy", lambda: retrieval.of_requests(data, part, requests, counts))
    teaching = once(folder / "teaching.npy", lambda: retrieval.of_training(data, part, positions, counts))
    on = rankers.Training(data, part, positions, teaching, counts)
    scores, version = rankers.RANKERS[ranker](on, folder=own)
    scored = once(own / "scores.npy", lambda: scores_of(scores, requests.positions, found))
    options: dict[str, Any] = {"folder": own / "taught", "name": version}
    ranked = rank_retrieved(scores, data.dataset, positions, teaching, **options)
    jax.clear_caches()
    return World(data, part, requests, counts, found, scored, teaching, ranked)


def once(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array of a file, made where there is none."""
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def scores_of(scores: Scores, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return scores float32 [R, C] of all requests."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
    shown = track(blocks, label="ranker", unit="blocks of requests")
    return np.concatenate([scores(positions[some], rows[some]) for some in shown])


def run(trial: Trial, world: World, *, results: Path, work: Path) -> dict[str, Any]:
    """Train a pre-ranker, cut, and keep the figures by user."""
    began = time.process_time()

    def known(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found, scores = world.ranked.at(positions)
        assert (found == rows).all()  # `fit` takes the same candidates as `rank_retrieved` did
        return scores

    options: dict[str, Any] = {}
    if trial.weight:
        loss = teaching.LOSSES[trial.loss] if trial.temperature == 1 else teaching.softened(trial.temperature)
        options["teacher"] = train.Teacher(known, trial.weight * loss, candidates=world.teaching, count=trial.candidates)
    folder = work / f"{trial.dataset}--{trial.split}" / records.file_of(trial.trained)
    data = datasets.with_statistics(world.data) if trial.model in WITH_STATISTICS else world.data
    config = question.config_of(question.Trial(dataset=trial.dataset, model=MODELS[trial.model]), data)
    recipe = {"seed": trial.seed, "learning_rate": trial.learning_rate}
    trained = rankers.fitted(config, data, world.part, folder=folder, recipe=recipe, **options)
    seconds = time.process_time() - began
    scores = model_scores(trained.model, trained.params, data.dataset)(world.requests.positions, world.found)
    found = by_user(world, scores)
    asked = question.Trial(dataset=trial.dataset, model="", split=trial.split)
    ranking = question.evaluate(asked, world.part, trained.model, trained.params, data)
    found |= {name: ranking[name] for name in ("gauc", "gauc_trained", "hr100@0", "hr100_trained", "hr10@0")}
    jax.clear_caches()
    record = {"id": trial.id, **dataclasses.asdict(trial), "core_seconds": seconds, "commit": common.machine()["commit"]}
    return records.keep(results, record, found)


def by_user(world: World, scores: np.ndarray) -> dict[str, ByUser]:
    """Return the figures of scores [R, C] of the candidates, by user."""
    log, at = world.data.dataset.log, world.requests.positions
    target, users = log.item[at], log.user[at]
    made: dict[str, ByUser] = {}
    sizes = SMOKE_SIZES if world.data.name == "smoke" else SIZES
    for size, cuts in sizes.items():
        rows = world.found[:, :size]
        offset = rankers.correction(world.counts)[rows]
        ours, ranker = (np.where(rows > 0, one[:, :size] + offset, LAST) for one in (scores, world.ranker))
        values = of_cuts(ours, ranker, rows == target[:, None], cuts)
        wide, trained = f"@{size}", world.counts[target] > 0
        for name, each in values.items():
            made[name.replace("@", wide)] = metrics.mean_by_user(each, users)
            made[name.replace("@", wide) + " trained"] = metrics.mean_by_user(each[trained], users[trained])
        if size == min(sizes):
            some = np.random.default_rng(1).permutation(len(rows))[:AGREEING]
            pairs = [agreement(ours[n, rows[n] > 0], ranker[n, rows[n] > 0]) for n in some]
            made[f"agreement{wide}"] = metrics.mean_by_user(pairs, users[some])
    return made


def agreement(ours: np.ndarray, ranker: np.ndarray) -> float:
    """Return the share of the pairs that a ranker's scores [C] order which ours [C] order alike; a tie of ours is one half."""
    above = ranker[:, None] > ranker
    return float(((ours[:, None] > ours)[above].mean() + (ours[:, None] >= ours)[above].mean()) / 2)


def of_cuts(ours: np.ndarray, ranker: np.ndarray, hit: np.ndarray, cuts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return figures [R] by name of cutting candidates [R, C] to counts, see the header; `hit` is where the event's item is."""
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
    """Return ranks [R, C], 0 the highest score; ties by column, the order of retrieval."""
    ranks = np.empty(scores.shape, np.int64)
    np.put_along_axis(ranks, np.argsort(-scores, axis=1, kind="stable"), np.arange(scores.shape[1])[None], axis=1)
    return ranks


# from the records

Found = dict[str, dict[str, Any]]


def read(results: Path) -> Found:
    """Return the records; the first ones did not say all of a trial."""
    first = {"ranker": "attention", "candidates": 16, "learning_rate": RATE, "temperature": 1.0, "loss": "listwise"}
    return {name: first | record for name, record in records.read(results).items()}


def pooled(results: Path, runs: list[dict[str, Any]], metric: str) -> ByUser:
    """Return a metric by user, averaged over seeds."""
    return question.over_seeds([records.by_user(results, one, metric) for one in runs])


def taught_of(record: dict[str, Any]) -> Taught:
    """Return how the ranker taught the model of a record."""
    return Taught(*(record[name] for name in Taught._fields))


def runs_of(found: Found, dataset: str, split: str, ranker: str, model: str, taught: Taught) -> list[dict[str, Any]]:
    """Return the records of a model, one a seed."""
    wanted = (dataset, split, ranker, model, taught)
    return [r for r in found.values() if (r["dataset"], r["split"], r["ranker"], r["model"], taught_of(r)) == wanted]


def lost(results: Path, runs: list[dict[str, Any]], cut: str) -> ByUser:
    """Return the share of the ranker's top 10 that a cut loses, by user."""
    recall = pooled(results, runs, f"recall10{cut}")
    return recall._replace(values=1 - recall.values)


def report(results: Path) -> str:
    """Return tables by data set, split and ranker: shares of its top 10 lost, items kept, the HR@10 kept, GAUC."""
    found, lines = read(results), []
    for dataset, split, ranker in dict.fromkeys((r["dataset"], r["split"], r["ranker"]) for r in found.values()):
        sizes = SMOKE_SIZES if dataset == "smoke" else SIZES
        cuts = [f"@{size}-{cut}" for size, some in sizes.items() for cut in some]
        size, main = next(iter(sizes)), cuts[min(2, len(cuts) - 1)]
        lines += [
            f"\n{dataset}, {split}, ranker {ranker}: % of the ranker's top 10 lost; at {main[1:]} with 95 % over users, % of "
            "its top 50 lost, event's item kept, HR@10 and NDCG@10 of the cascade over the ranker's; of the pre-ranker alone "
            "pairs in the ranker's order, GAUC, HR@10",
            f"{'':46}"
            + "".join(f"{cut[1:]:>10}" for cut in cuts)
            + f"{'95 %':>16}{'top 50':>8}{'kept':>7}{'HR@10':>7}{'NDCG':>7}{'pairs':>7}{'GAUC':>8}{'HR@10':>7}",
        ]
        for model, taught in dict.fromkeys((r["model"], taught_of(r)) for r in found.values() if r["dataset"] == dataset):
            runs = runs_of(found, dataset, split, ranker, model, taught)
            if not runs:
                continue
            name = f"{model}, {taught if taught.weight else 'not taught'} ({len(runs)})"
            cells = "".join(f"{100 * lost(results, runs, cut).mean:10.2f}" for cut in cuts)
            _, low, high = metrics.user_interval(lost(results, runs, main))
            shares = (
                metrics.paired_interval(*(pooled(results, runs, each) for each in pair), ratio=True).value
                for pair in ((f"{name}{main}", f"ranker_{name}@{size}") for name in ("hr10", "ndcg10"))
            )
            top50 = f"recall50{main}"  # none where fewer are kept
            wide = f"{100 * (1 - pooled(results, runs, top50).mean):8.2f}" if top50 in runs[0]["figures"] else f"{'–':>8}"
            kept, pairs, gauc, own = (
                pooled(results, runs, metric).mean
                for metric in (f"survives{main}", f"agreement@{size}", "gauc", f"own_hr10@{size}")
            )
            cells += f"{f'{100 * low:.2f} to {100 * high:.2f}':>16}{wide}{kept:7.3f}"
            cells += "".join(f"{share:7.3f}" for share in (*shares, pairs)) + f"{gauc:8.4f}{own:7.3f}"
            lines.append(f"{name:46}{cells}")
    return "\n".join(lines)


def lost_more(found: Found, results: Path, dataset: str, models: tuple[str, str]) -> Interval | None:
    """Return points of the ranker's top 10 that one model loses more than another, both taught, on the seeds they share."""
    runs = [runs_of(found, dataset, "validation", "attention", model, USUAL) for model in models]
    both = {one["seed"] for one in runs[0]} & {one["seed"] for one in runs[1]}
    by_user = [lost(results, [one for one in each if one["seed"] in both], CUT) for each in runs if both]
    return _percent(metrics.paired_interval(*by_user)) if both else None


def keys(results: Path) -> dict[str, dict[str, Any]]:
    """Return figures of the test split by data set, see `figures_of`: with full attention, and other rankers by name.

    `order_holds` by ranker: AIF loses less than the two-tower model, and no more than that with matching statistics.
    """
    found, made = read(results), {}
    for dataset in question.PUBLIC:
        by_ranker: dict[str, dict[str, Interval]] = {}
        for ranker, added in (*((ranker, "") for ranker in rankers.RANKERS), ("trees", "_statistics")):
            taught, alone = (
                {model: runs_of(found, dataset, "test", ranker, model + added, how) for model in COMPARED}
                for how in (USUAL, ALONE)
            )
            if all(taught.values()):
                by_ranker[ranker + added] = figures_of(results, taught, {model: runs for model, runs in alone.items() if runs})
        flat = {
            ranker: {f"{name}{end}": value for name, one in figures.items() for end, value in zip(ENDS, one, strict=True)}
            for ranker, figures in by_ranker.items()
        }
        holds = {
            ranker: one["lost10_less_than_two_tower"].low > 0 and one["lost10_less_than_matching"].low > NO_WORSE
            for ranker, one in by_ranker.items()
        }
        if holds:
            made[dataset] = flat.pop("attention", {}) | flat | {"order_holds": holds}
    return made


def losses_of(results: Path) -> dict[str, dict[str, Interval]]:
    """Return % of the ranker's top 10 lost, by data set and model: taught; test split, for full attention validation."""
    found, made = read(results), {}
    for dataset in question.PUBLIC:
        for split, model in (*(("test", model) for model in COMPARED), ("validation", "full_attention")):
            if runs := runs_of(found, dataset, split, "attention", model, USUAL):
                made.setdefault(dataset, {})[model] = _percent(metrics.user_interval(lost(results, runs, CUT)))
    return made


def figures_of(results: Path, taught: dict[str, Any], alone: dict[str, Any]) -> dict[str, Interval]:
    """Return figures with 95 % over users: records of COMPARED, taught with their weights, and not taught.

    `lost10_...` are in % of the ranker's top 10, of AIF less than others in points, and its ratio over theirs; the shares are
    of what the ranker reaches without a cut, by the cascade behind AIF and by AIF alone.
    """
    losses = {model: lost(results, runs, CUT) for model, runs in taught.items()}
    untaught = {f"{model}_not_taught": lost(results, runs, CUT) for model, runs in alone.items()}
    made = {f"lost10_{model}": _percent(metrics.user_interval(one)) for model, one in (losses | untaught).items()}
    of = {(model, name): pooled(results, taught[model], name) for model in COMPARED for name in ("gauc", "hr100@0")}
    for other in COMPARED[:2]:
        made[f"lost10_ratio_over_{other}"] = metrics.paired_interval(losses["aif"], losses[other], ratio=True)
        made[f"lost10_less_than_{other}"] = _percent(metrics.paired_interval(losses[other], losses["aif"]))
        made[f"gauc_points_over_{other}"] = _percent(metrics.paired_interval(of["aif", "gauc"], of[other, "gauc"]))
        made[f"hr100_ratio_over_{other}"] = metrics.paired_interval(of["aif", "hr100@0"], of[other, "hr100@0"], ratio=True)
    size = CUT.partition("-")[0]
    shares = {"cascade_hr10": f"hr10{CUT}", "cascade_ndcg10": f"ndcg10{CUT}", "own_hr10": f"own_hr10{size}"}
    for name, metric in shares.items():
        whole = f"ranker_{'ndcg10' if 'ndcg10' in name else 'hr10'}{size}"
        ours, ranker = (pooled(results, taught["aif"], one) for one in (metric, whole))
        made[f"{name}_share"] = metrics.paired_interval(ours, ranker, ratio=True)
    return made


def _percent(part: Interval) -> Interval:
    return Interval(*(100 * value for value in part))


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Do the missing runs of a plan and print the tables."""
    parser = common.parser(__doc__, data=True, results=RESULTS, work=Path("out/ranker_recall"))
    parser.add_argument("--plan", choices=("validation", "test"), default="validation", help="default %(default)s")
    parser.add_argument("--ranker", choices=rankers.RANKERS, default="attention", help="default %(default)s")
    parser.add_argument("--dataset", nargs="+", help="only these data sets")
    parser.add_argument("--model", nargs="+", help="only these models")
    parser.add_argument("--seed", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--report-only", action="store_true", help="print tables from the records and stop")
    options = parser.parse_args(arguments)
    name, worlds = "smoke" if options.smoke else options.plan, {}
    for trial in [] if options.report_only else plan(name, options.ranker):
        wanted = ((trial.dataset, options.dataset), (trial.model, options.model), (trial.seed, options.seed))
        left_out = any(some and value not in some for value, some in wanted)
        if left_out or trial.id in records.read(options.results):
            continue
        if trial.dataset not in worlds:
            data = load(trial.dataset, options.data)
            worlds = {trial.dataset: world_of(data, trial.split, trial.ranker, options.work)}
        made = run(trial, worlds[trial.dataset], results=options.results, work=options.work)
        of = {name: value for name, value in made["figures"].items() if name.startswith("recall10@") and "trained" not in name}
        print(f"{trial.id}: {', '.join(f'{name} {value:.4f}' for name, value in of.items())}", flush=True)
    print(report(options.results))
    common.report({"preset": keys(options.results)}, options.json)


if __name__ == "__main__":
    main()
