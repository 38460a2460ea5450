"""The tables of README, the pages and the notes, from the records in experiments/results.

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
from experiments.ranker_recall import ALONE, COMPARED, FURTHER, OTHER_LOSSES, RESULTS, TEMPERATURES, TRIED, USUAL, Taught
from experiments.study import question, records

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "experiments" / "notes" / "results.md"
WRITTEN = ("index", "results", "how_to_tune", "how_to_refresh")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in WRITTEN), NOTES, ROOT / "experiments" / "README.md")
COST, REFRESH = (ROOT / "experiments" / "results" / name / "record.json" for name in ("cost", "refresh"))
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


def whole_requests() -> str:
    """Return what whole requests cost, by `experiments.cost`: 1,000 candidates, 4,096 events."""
    every = json.loads(COST.read_text(encoding="utf-8"))
    of, shorter = every["C=1000, L=4096"], every["C=1000, L=512"]
    cpu, rate, added = of["cpu_ms"], of["rps_ratio_aif_over_sequential"], of["overhead_p50_ms"]
    kinds = ("new", "returning_0", "session")
    rows = {
        "CPU a request, ms: aif new / cached / session": " / ".join(f"{cpu['aif'][kind]:.1f}" for kind in kinds),
        "the same of new users: not split / `two_tower` / `full_attention`": " / ".join(
            f"{cpu[service]['new']:.{digits}f}" for service, digits in (("sequential", 1), ("two_tower", 1), ("exact", 0))
        ),
        "requests a second over the model that is not split, 99 % within 30 ms: new / cached": " / ".join(
            f"{rate[kind]:.2f}" for kind in kinds[:2]
        ),
        "the same with 512 events": " / ".join(f"{shorter['rps_ratio_aif_over_sequential'][kind]:.2f}" for kind in kinds[:2]),
        "what the engine adds to a lone request, ms: back to back / after a wait": " / ".join(
            f"{added[way]:.2f}" for way in ("back_to_back", "after_wait")
        ),
        "start with the default buckets, programs on disk": f"{of['start_s']:.1f} s",
        "the engine without a model, 16 callers: requests a second; CPU over commit ed966627": (
            f"{every['empty_engine_requests_per_second']:,.0f}; {every['empty_engine_over_before']:.2f}"
        ),
    }
    return markdown(["question", "measured"], rows.items())


# refresh

WORLDS = {"synthetic": "synthetic shop", "movielens": "MovieLens", "taobao": "Taobao"}


def refreshed(*, costs: bool) -> str:
    """Return what a refresh is worth in GAUC points by data set, or what it costs and how hourly ones compare."""
    worlds = [json.loads(REFRESH.read_text(encoding="utf-8"))["worlds"][name] for name in WORLDS]

    def over(key: str, sign: str = "+") -> list[str]:
        return [spread(Interval(of[f"{key}_gauc_points"], *of[f"{key}_interval"]), 1, sign=sign) for of in worlds]

    def points(key: str) -> list[str]:
        return [f"{of[f'{key}_gauc_points']:+.1f}" for of in worlds]

    worth = {
        "lost on the third day by a model that is not refreshed": over("stale_loss", ""),
        "gained by a daily warm start over daily training from scratch (two untuned epochs), mean of three days": points(
            "warm_minus_scratch"
        ),
        "gained by an hourly warm start over hourly training from scratch, last day": over("hourly_minus_scratch"),
    }
    hourly = [of["cpu_seconds_a_day_within"]["hourly"] / of["cpu_seconds_a_day"]["scratch"] for of in worlds]
    cost = {
        "hourly warm start minus a daily one, mean of three days, GAUC points": points("hourly_minus_daily_warm"),
        "training CPU of a warm start over from scratch": [f"{100 * of['warm_cost_share']:.1f} %" for of in worlds],
        "HR@100 of new items over the model without a refresh": [f"{of['new_item_hr100_gain']:+.2f}" for of in worlds],
        "training CPU of 24 hourly warm starts over one training from scratch": [f"{100 * share:.1f} %" for share in hourly],
    }
    rows = ([name, *cells] for name, cells in (cost if costs else worth).items())
    return markdown(["question" if costs else "GAUC points", *WORLDS.values()], rows)


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


# tuning


def settings() -> str:
    """Return settings in the order of what they bring: GAUC points of all requests, validation split, seed 0."""
    every = records.read(question.RESULTS)

    def points(dataset: str, one: dict[str, Any], other: dict[str, Any]) -> float:
        trials = (question.Trial(**({"dataset": dataset, "model": question.AIF, "epochs": 3} | each)) for each in (one, other))
        pair = (question.pooled(question.RESULTS, every, [every[trial.id]], "gauc") for trial in trials)
        return 100 * metrics.paired_interval(*pair).value

    def both(one: dict[str, Any], other: dict[str, Any]) -> str:
        return " and ".join(f"{points(dataset, one, other):+.1f}" for dataset in DATASETS)

    def preset(dataset: str) -> float:
        pair = (question.of_test(question.RESULTS, every, dataset, model, "gauc") for model in (question.AIF, question.BASE))
        return 100 * metrics.paired_interval(*pair).value

    def lost(taught: Taught) -> str:
        return f"{100 * ranker_recall.lost(RESULTS, runs_tried('taobao', 'aif', taught), '@1000-100').mean:.1f}"

    heads = (points("movielens", {"model": f"{question.AIF}, head {sizes}"}, {}) for sizes in ("16", "32", "32 16", "128 64"))
    longer = points("movielens", {"model": f"{question.AIF}, 2,048 events"}, {})
    one = {"epochs": 1}
    rows = [
        ("`FitConfig(epochs=)`", "1, 3, 5", f"AIF from one epoch to three {both({}, one)}, to five {both({'epochs': 5}, one)}; "
         "for Taobao's items with a training event nothing"),
        ("`learning_rate`", "1e-2, 5e-3", f"5e-3 instead of 1e-2, three epochs: AIF {both({'learning_rate': 5e-3}, {})}"),
        ("preset", "`two_tower`, `two_tower_matching`, `aif`",
         f"test split: {preset('movielens'):+.1f} and {preset('taobao'):+.1f} from the first to the last; on Taobao the second "
         "is enough ([which one](which_config.md))"),
        ("what the ranker wants", "[a teacher](tutorial_ranker.md#teach-another-model), weight 1, 4, 16",
         f"Taobao, AIF: {lost(ALONE)} % of the ranker's top 10 lost without, {lost(Taught(1.0))}, {lost(Taught(4.0))} % with 1 "
         f"and 4, {lost(USUAL)} with 16 and 40 candidates; GAUC falls with the weight "
         "([both](results.md#what-the-ranker-wants))"),
        ("`Columns(item_statistics=)`", "half-lives of an hour to a week", "helps two-tower more than AIF ([figures]"
         "(../experiments/notes/results.md#item-statistics-and-negatives-that-existed)); misleading if most items are new"),
        ("terms after training", "`run.with_svd(data)`, `run.with_popularity_correction(data)`",
         "keep the first if GAUC rises, the second if HR@k does"),
        ("blocks", "leave one out, add one", "[ablation](results.md#which-blocks-earn-their-place)"),
        ("`long_length`", "the length that most users have",
         f"2,048 instead of 512: {longer:+.1f} on MovieLens, where 8 % of the test users have more than 512 events"),
        ("`head`, `width`", "last", f"heads from (16,) to (128, 64): within {max(map(abs, heads)):.1f} points on MovieLens"),
    ]  # fmt: skip
    return markdown(["#", "setting", "try", "what it brought"], [(str(n), *row) for n, row in enumerate(rows, 1)])


TABLES: dict[str, Callable[[], str]] = {
    "recall": recall, "rankers": functools.partial(recall, *RANKERS), "cuts": cuts,
    "budget": budget, "load": under_load, "lone": lone,
    "requests": whole_requests, "settings": settings,
    "worth": functools.partial(refreshed, costs=False), "refreshes": functools.partial(refreshed, costs=True),
    "quality": quality, "scoring": scoring, "ablation": ablation, "goals": goals, "tuned": tuned,
    "weights": functools.partial(tried, {str(one): one for one in sorted(TRIED, key=lambda one: (one.candidates, one.weight))}),
    "temperatures": functools.partial(tried, {f"{one.temperature:g}": one for one in (USUAL, *TEMPERATURES)}, ("movielens",)),
    "losses": functools.partial(
        tried,
        {f"{one.loss}, {one.weight:g}": one for one in (Taught(4.0, candidates=40), USUAL, *OTHER_LOSSES["two_tower"])},
        ("movielens",),
    ),
}  # fmt: skip
