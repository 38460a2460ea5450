"""The tables of README, docs/index.md and docs/results.md, from the records in experiments/results.

Command   python -m experiments.plots      (writes them, and draws the figures)

A page names the table in a comment, and the table that follows it is written:

    <!-- table recall: python -m experiments.plots -->

    | ... |
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aif_jax import metrics
from aif_jax.metrics import Interval
from experiments import ranker_recall
from experiments.ranker_recall import ALONE, COMPARED, FURTHER, RESULTS, TEMPERATURES, TRIED, USUAL, Taught
from experiments.study import question, records

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "experiments" / "notes" / "results.md"
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "results.md", NOTES)
COST = Path(__file__).resolve().parent / "results" / "cost" / "record.json"
DATASETS = {"movielens": "MovieLens", "taobao": "Taobao"}
RANKERS = {"attention": "attention", "trees": "trees", "sequence": "SASRec"}
PRESETS = {"two_tower": "`presets.two_tower`", "matching": "`presets.two_tower_matching`", "aif": "`presets.aif`"}
BOUND = 30.0  # milliseconds of a whole request: 99 % are answered within it
SHOWN = ("C=1000, L=512", "C=1000, L=4096")  # sizes of README's table
SERVED = {
    "two_tower": ("two_tower", "new", PRESETS["two_tower"]),
    "matching": ("matching", "new", PRESETS["matching"]),
    "aif": ("aif", "new", PRESETS["aif"]),
    "known": ("aif", "returning_0", "`presets.aif`, user state cached"),
    "sequential": ("sequential", "new", "`presets.aif`, not split"),
    "exact": ("exact", "new", "`presets.full_attention`, not split"),
}
"""Rows of the tables of cost: service and users in the record, and the name."""


def written(page: str) -> str:
    """Return the text of a page with its tables made again; ValueError for a table that there is none of."""

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"table {found[2]!r}: expected one of {list(TABLES)}")
        return f"{found[1]}\n\n{TABLES[found[2]]()}\n\n"

    return re.sub(r"(<!-- table (\w+): [^\n]* -->)\n+(?:\|[^\n]*\n)*\n*", table, page)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as text."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def spread(interval: Interval, digits: int, *, scale: float = 1.0, sign: str = "") -> str:
    """Return a figure with its interval: 1.2 [0.9, 1.5]."""
    value, low, high = (round(scale * part, digits) + 0.0 for part in interval)  # no -0.0
    return f"{value:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# ranker recall


class Recalls:
    """The pre-rankers of a data set before a ranker: their runs on the test split."""

    def __init__(self, dataset: str, ranker: str = "attention"):
        runs = functools.partial(ranker_recall.runs_of, ranker_recall.read(RESULTS), dataset, "test", ranker)
        self.taught = {model: runs(model, USUAL) for model in COMPARED}
        self.alone = {model: runs(model, ALONE) for model in COMPARED}
        self.name = DATASETS[dataset]

    def recall(self, runs: Sequence[dict[str, Any]]) -> Interval:
        """Return ranker recall of a cut of 1,000 candidates to 100."""
        return metrics.user_interval(ranker_recall.pooled(RESULTS, list(runs), "recall10@1000-100"))

    def share(self, model: str) -> Interval:
        """Return HR@10 of the ranker behind the cut over that of the ranker on all 1,000 candidates."""
        names = ("hr10@1000-100", "ranker_hr10@1000")
        return metrics.paired_interval(*(ranker_recall.pooled(RESULTS, self.taught[model], name) for name in names), ratio=True)


def recall(*several: str) -> str:
    """Return ranker recall of a cut of 1,000 to 100 and the HR@10 kept, before full attention or several rankers."""
    rows = []
    for ranker in several or ("attention",):
        sets = [Recalls(dataset, ranker) for dataset in DATASETS]
        for model, name in PRESETS.items():
            row = [RANKERS[ranker], name.replace("presets.", "")] if several else [name]
            for one in sets:
                both = [one.recall(runs[model]) for runs in (one.alone, one.taught)]
                shown = [spread(each, 1, scale=100) if ranker == "attention" else f"{100 * each.value:.0f}" for each in both]
                row += [*shown, f"{one.share(model).value:.2f}"]
            rows.append(row)
    header = ["ranker", "pre-ranker"] if several else [""]
    figures = ("recall (not taught)", "recall (taught)", "HR@10 kept (taught)")
    return markdown(header + [f"{name}: {what}" for name in DATASETS.values() for what in figures], rows)


def cuts() -> str:
    """Return ranker recall of several cuts, the HR@10 kept with its interval, and GAUC of all requests."""
    header = ["", "1,000 to 100, not taught", "taught", "item trained", "1,000 to 50", "3,000 to 100", "HR@10 kept"]
    rows = []
    for one in map(Recalls, DATASETS):
        for model in COMPARED:
            taught, alone = one.taught[model], one.alone[model]
            gauc = [f"{ranker_recall.pooled(RESULTS, runs, 'gauc').mean:.3f}" for runs in (alone, taught)]
            more = [
                f"{100 * ranker_recall.pooled(RESULTS, taught, f'recall10@{cut}').mean:.1f}"
                for cut in ("1000-100 trained", "1000-50", "3000-100")
            ]
            name = f"**{one.name}**: {PRESETS[model]}" if model == COMPARED[0] else PRESETS[model]
            both = [spread(one.recall(runs), 1, scale=100) for runs in (alone, taught)]
            rows.append([name, *both, *more, spread(one.share(model), 3), ", ".join(gauc)])
    return markdown([*header, "GAUC: not taught, taught"], rows)


GOALS = {
    "lost10_aif": ("% lost", "1.0; 0.3"),
    "lost10_ratio_over_matching": ("over what matching loses", "0.3; less than 1"),
    "lost10_ratio_over_two_tower": ("over what two-tower loses", "0.15"),
    "cascade_hr10_share": ("HR@10 of the cascade over the ranker's", "0.98"),
    "cascade_ndcg10_share": ("NDCG@10 of the cascade over the ranker's", "0.98"),
    "own_hr10_share": ("HR@10 of AIF alone over the ranker's", "0.95"),
    "gauc_points_over_two_tower": ("GAUC, points over two-tower", "1.5; –"),
    "hr100_ratio_over_two_tower": ("HR@100 over two-tower's", "1.10; –"),
}
OTHERS = {
    "lost10_aif": ("% lost", "1.5"),
    "lost10_less_than_matching": ("points less than matching", "above -0.3"),
    "lost10_less_than_two_tower": ("points less than two-tower", "above 0"),
}
"""Goals of the results page before full attention, and before each other ranker: key in `ranker_recall.keys`, name, reach."""


def goals() -> str:
    """Return the goals of ranker recall, by figure, with what was reached; AIF, taught, a cut of 1,000 to 100."""
    every, rows = ranker_recall.keys(RESULTS), []
    for ranker, title in RANKERS.items():
        for key, (name, reach) in (GOALS if ranker == "attention" else OTHERS).items():
            found = [every[dataset] if ranker == "attention" else every[dataset][ranker] for dataset in DATASETS]
            reached = [Interval(*(one[key + end] for end in ranker_recall.ENDS)) for one in found]
            rows.append([f"{title}: {name}", reach, *(spread(one, 3 if one.value < 2 else 1) for one in reached)])
    return markdown(["ranker: figure", "goal", *DATASETS.values()], rows)


def runs_tried(dataset: str, model: str, taught: Taught) -> list[dict[str, Any]]:
    """Return the run of the validation split before full attention, of seed 0, or none."""
    runs = ranker_recall.runs_of(ranker_recall.read(RESULTS), dataset, "validation", "attention", model, taught)
    return [run for run in runs if run["seed"] == 0]


def tried(ways: Mapping[str, Taught], datasets: Sequence[str] = tuple(DATASETS)) -> str:
    """Return % of the ranker's top 10 that a cut of 1,000 to 100 loses, by model and way to teach it."""
    rows = []
    for dataset in datasets:
        for model, name in PRESETS.items():
            each = [runs_tried(dataset, model, taught) for taught in ways.values()]
            cells = [f"{100 * ranker_recall.lost(RESULTS, runs, '@1000-100').mean:.1f}" if runs else "–" for runs in each]
            rows.append([f"{DATASETS[dataset]}: {name}", *cells])
    return markdown(["% lost", *ways], rows)


def tuned() -> str:
    """Return what two-tower loses as it is tuned further, and what AIF gains over it alone; AIF by the usual recipe."""
    ways = {str(taught): ("two_tower", taught) for taught in (USUAL, *FURTHER)}
    ways["with a head, 512 events"] = ("two_tower_512", USUAL)
    rows = []
    for dataset, title in DATASETS.items():
        runs, aif = [runs_tried(dataset, *way) for way in ways.values()], runs_tried(dataset, "aif", USUAL)
        lost = [f"{100 * ranker_recall.lost(RESULTS, one, '@1000-100').mean:.1f}" for one in runs]
        gauc, hits = (
            [(ranker_recall.pooled(RESULTS, aif, metric), ranker_recall.pooled(RESULTS, one, metric)) for one in runs]
            for metric in ("gauc", "hr100@0")
        )
        rows.append([f"{title}: % lost", *lost])
        rows.append(["GAUC, points of AIF over it", *(spread(metrics.paired_interval(*pair), 1, scale=100) for pair in gauc)])
        rows.append(["HR@100 of AIF over its", *(spread(metrics.paired_interval(*pair, ratio=True), 2) for pair in hits)])
    return markdown(["two-tower", *ways], rows)


# cost


def load(path: Path = COST) -> dict[str, Any]:
    """Return what `experiments.cost` wrote by size, "C=1000, L=512"."""
    return {size: of for size, of in json.loads(path.read_text(encoding="utf-8")).items() if size.startswith("C=")}


def within(loops: Sequence[Mapping[str, float]], bound: float = BOUND) -> Mapping[str, float] | None:
    """Return the closed loop with the most requests a second of which 99 % are answered within the bound, or None.

    Where the next larger loop is beyond the bound, its figures are interpolated to the bound.
    """
    best = max((loop for loop in loops if loop["p99_ms"] <= bound), key=lambda loop: loop["rps"], default=None)
    if best is None:
        return None
    larger = (loop for loop in loops if loop["concurrency"] > best["concurrency"] and loop["rps"] > best["rps"])
    beyond = min(larger, key=lambda loop: loop["concurrency"], default=best)
    part = (bound - best["p99_ms"]) / max(beyond["p99_ms"] - best["p99_ms"], 1e-9) if beyond is not best else 0.0
    return {name: value + part * (beyond[name] - value) for name, value in best.items()}


def title(size: str) -> str:
    """Return  "C=1000, L=512" in words."""
    candidates, length = (int(number) for number in re.findall(r"\d+", size))
    return f"{candidates:,} candidates, {length:,} events"


def budget() -> str:
    """Return milliseconds after retrieval, requests a second within the bound and the CPU of one, for README."""
    record = {size: load()[size] for size in SHOWN}
    header = [""]
    for size in record:
        header += [f"{title(size).split()[2]} events: {figure}" for figure in ("latency, ms", "requests/s", "CPU, ms/request")]
    rows = []
    for service, users, name in list(SERVED.values())[:-1]:
        row = [name]
        for of in record.values():
            loops = of["closed_loops"][service][users]
            best = within(loops)
            row += [waited(loops, "p50"), f"{best['rps']:,.0f}" if best else "none", f"{(best or loops[0])['cpu_ms']:.1f}"]
        rows.append(row)
    return markdown(header, rows)


def under_load() -> str:
    """Return requests a second within the bound and the CPU of one, by service and size."""
    record = load()
    header = ["requests a second; CPU of one", *map(title, record)]
    rows = []
    for service, users, name in SERVED.values():
        cells = []
        for of in record.values():
            loops = of["closed_loops"].get(service, {}).get(users)
            best = within(loops) if loops else None
            late = loops and f"too slow, {loops[0]['cpu_ms']:,.0f} ms"
            cells.append(f"{best['rps']:,.0f}, {best['cpu_ms']:.1f} ms" if best else late or "–")
        if set(cells) != {"–"}:
            rows.append([name, *cells])
    return markdown(header, rows)


def lone() -> str:
    """Return milliseconds after retrieval of one request at a time."""
    record = load()
    rows = [
        [name, *(waited(of["closed_loops"][service][users]) for of in record.values())]
        for service, users, name in SERVED.values()
    ]
    return markdown(["ms, p50 / p99", *map(title, record)], rows)


def waited(loops: Sequence[Mapping[str, Any]], *shown: str) -> str:
    """Return milliseconds after retrieval of one request at a time, p50 / p99 or those shown."""
    return " / ".join(f"{loops[0][f'critical_{p}_ms']:.1f}" for p in shown or ("p50", "p99"))


# ranking alone

RULES = {"movielens": "rule, most popular first", "taobao": "rule, met items, the latest first, then most popular"}
RANKED = {
    question.BASE: PRESETS["two_tower"], question.WITH_MATCHING: PRESETS["matching"], question.AIF: PRESETS["aif"],
    question.FULL: "`presets.full_attention`",
}  # fmt: skip


def quality() -> str:
    """Return GAUC and HR@100 on the test split: requests whose item has a training event, and GAUC of all requests."""
    found = records.read(question.RESULTS)
    rows = []
    for dataset, title in DATASETS.items():
        rule = question.runs_of(found, dataset, RULES[dataset], epochs=0)
        runs = {"no model": rule} | {name: question.runs_of(found, dataset, of) for of, name in RANKED.items()}
        pools = {
            (name, metric): question.pooled(question.RESULTS, found, of, metric)
            for name, of in runs.items()
            for metric in ("gauc_trained", "hr100_trained", "gauc")
        }
        for name in runs:
            gauc, hits, every = (pools[name, metric] for metric in ("gauc_trained", "hr100_trained", "gauc"))
            first = f"**{title}**: {name}" if name == "no model" else name
            cells = [first, f"{every.mean:.3f}", f"{gauc.mean:.3f}"]
            for base in (PRESETS["two_tower"], PRESETS["matching"]):
                shown = name != "no model" and list(runs).index(name) > list(runs).index(base)
                gap = metrics.paired_interval(gauc, pools[base, "gauc_trained"])
                cells.append(spread(gap, 1, scale=100, sign="+") if shown else "–")
            rows.append([*cells, spread(metrics.user_interval(hits), 3)])
    header = ["", "GAUC, all requests", "GAUC", "points over two-tower", "points over matching", "HR@100"]
    return markdown(header, rows)


def scoring() -> str:
    """Return milliseconds of the programs alone, from `question --times`."""
    times = question.read_times(question.RESULTS)
    rows = []
    shown = (("score", "p50"), ("score", "p99"), ("whole", "p50"), ("cpu", "p50"))
    for size in ("C=1000, L=512", "C=10000, L=512"):
        for place, (model, name) in enumerate(RANKED.items()):
            if one := times.get(f"{model}, {size}"):
                first = name if place else f"**{title(size)}**: {name}"
                rows.append([first, *(f"{one[what][p]:.2f}" for what, p in shown)])
    return markdown(["ms", "scoring, p50", "p99", "user part and scoring, p50", "CPU of both"], rows)


# blocks

PARTS = {
    "matching statistics": "without matching statistics", "bridges (BEA)": "without BEA",
    "linear attention": "without linear memory", "recency, added": "with recency",
    "similar events, added": "with similar events", "SIM, added": "with SIM", "SimTier, added": "with SimTier",
}  # fmt: skip


def blocks(results: Path) -> dict[str, dict[str, Interval]]:
    """Return GAUC that each block adds to `presets.aif`, by data set and block: left out, or added; validation, one epoch.

    Means over the seeds that both models have.
    """
    found = records.read(results)
    made: dict[str, dict[str, Interval]] = {}
    for dataset in ("movielens", "taobao"):
        runs: dict[str, dict[int, Any]] = {}
        for run in found.values():
            if (run["dataset"], run["split"], run["epochs"]) == (dataset, "validation", 1):
                runs.setdefault(run["model"], {})[run["seed"]] = run
        for name, changed in PARTS.items():
            models = runs.get(question.AIF, {}), runs.get(f"{question.AIF} {changed}", {})
            if seeds := sorted(set(models[0]) & set(models[1])):
                pair = [question.pooled(results, found, [by_seed[seed] for seed in seeds], "gauc") for by_seed in models]
                made.setdefault(dataset, {})[name] = metrics.paired_interval(*(pair if "without" in changed else pair[::-1]))
    return made


def ablation() -> str:
    """Return what each block adds to `presets.aif`: points of ranker recall and GAUC, and milliseconds at 10,000 candidates."""
    gains, found = blocks(question.RESULTS), ranker_recall.read(RESULTS)
    times = json.loads((question.RESULTS / "times_blocks.json").read_text(encoding="utf-8"))["models"]
    names, rows = {of: name for name, of in ranker_recall.MODELS.items()}, []
    for name, changed in PARTS.items():
        model = names.get(f"{question.AIF} {changed}", "")
        pair = (model, "aif") if "without" in changed else ("aif", model)
        more = [ranker_recall.lost_more(found, RESULTS, dataset, pair) for dataset in DATASETS]
        row = [name, *(spread(gap, 2, sign="+") if gap else "–" for gap in more)]
        row += [spread(of[name], 1, scale=100, sign="+") if name in of else "–" for of in gains.values()]
        whole, other = (times.get(f"{one}, C=10000, L=512") for one in (question.AIF, f"{question.AIF} {changed}"))
        row += [f"{abs(whole[what]['p50'] - other[what]['p50']):.2f}" if other else "–" for what in ("score", "cpu")]
        rows.append(row)
    header = [f"{metric}, {name}" for metric in ("ranker recall@10", "GAUC") for name in DATASETS.values()]
    return markdown(["block", *header, "scoring, ms", "CPU, ms"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "recall": recall, "rankers": functools.partial(recall, *RANKERS), "cuts": cuts,
    "budget": budget, "load": under_load, "lone": lone,
    "quality": quality, "scoring": scoring, "ablation": ablation, "goals": goals, "tuned": tuned,
    "weights": functools.partial(tried, {str(one): one for one in sorted(TRIED, key=lambda one: (one.candidates, one.weight))}),
    "temperatures": functools.partial(tried, {f"{one.temperature:g}": one for one in (USUAL, *TEMPERATURES)}, ("movielens",)),
}  # fmt: skip
