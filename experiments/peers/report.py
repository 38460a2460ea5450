"""The page of peers, from their records and those of `question`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from aif_jax import metrics
from aif_jax.metrics import ByUser
from experiments.peers import baselines
from experiments.peers.judge import GAUC, HIT_RATE, POWERS
from experiments.study import question, records
from experiments.study.question import AIF, BASE, WITH_MATCHING

RESULTS = question.RESULTS / "peers"
PAGE = "peers.md"
DATASETS = {"movielens": "MovieLens", "taobao": "Taobao"}
OURS = {AIF: "AIF", WITH_MATCHING: "two-tower with matching statistics", BASE: "two-tower"}
HEADING = """# Other people's models

Written by `python -m experiments.peers --report-only --page experiments/notes` from `experiments/results/question/peers`.
Closed-form baselines, and unchanged models of other packages, whose feeds commit 2597cac1 has (`experiments/peers/feeds`);
`experiments/peers/README.md` says how to add a model by writing score files.

- *Protocol.* That of [results.md](../../docs/results.md#protocol): the same requests, the same 99 negatives, the same
  metrics by user. Rated films of MovieLens are neither candidates nor negatives in a peer's training. GAUC and HR@100 are of
  requests whose item has a training event, HR@100 in the catalogue of such items. Test split, trained on the first 90 % of
  events.
- *Against ours.* A peer has one seed, AIF and two-tower are means over three. Brackets are 95 % intervals over resampled
  users, paired; they do not hold the spread over a peer's seeds.
- *Budget.* A trained peer got the processor time that `presets.aif` trains for on the test split, three epochs on one core:
  MovieLens 160 s, Taobao 55 s. It runs from the first batch to the last and holds the making of batches, not imports and
  scoring.
- *Tuning*, on the validation split: three learning rates (0.001, 0.003, 0.01), YoutubeDNN then two more temperatures, with a
  sixth of the budget each; closed-form baselines the settings of the last table. The best trial has the largest sum of GAUC
  and HR@100. Ours: one, two and three epochs, and another learning rate with three. GAUC of the trials weighs users by
  candidates.
- *Popularity.* How much of it belongs in a score depends on a model's negatives and on the metric. Ours have the theoretical
  share, none for GAUC and 0.75 log(count) for HR@100. A peer gets the best one of {powers} for each metric on the validation
  split, times log(count), or as an exponent of count if its scores are no logarithms: ours do not have that choice.
- Where users come back to items (Taobao), item-kNN and EASE, which give an item nothing for itself, have 1 added for a met
  one.
- Other work shared the machine while peers trained, so a second of processor time may have bought fewer steps than on an
  idle core. DIN computes attention for each candidate, which for the whole catalogue takes longer than its training: it has
  no HR@100.
"""


def markdown(results: Path, ours: Path) -> str:
    """The page: a heading, a table of figures for each data set, settings, trials."""
    found, theirs = records.read(results), records.read(ours)
    parts = [HEADING.format(powers=", ".join(f"{power:g}" for power in POWERS))]
    for dataset in dict.fromkeys(one["dataset"] for one in found.values()):
        mine = [one for one in found.values() if one["dataset"] == dataset]
        mine.sort(key=lambda one: (-one["figures"][GAUC], one["model"]))
        title = DATASETS.get(dataset, dataset)
        missing = {*baselines.BASELINES} - {one["model"] for one in mine}
        left = f"\nNot run: {', '.join(sorted(missing))}.\n" if missing else ""
        parts.append(f"## {title}\n\n{_figures(results, mine, ours, theirs)}{left}")
        abouts = [(one["model"], one["about"]) for one in mine if "trials" in one["about"]]
        rows = [[model, *(_pairs(about[part]) for part in ("chosen", "powers", "versions")), str(about.get("steps", ""))]
                for model, about in abouts]  # fmt: skip
        parts.append(f"### {title}: chosen\n\n{table(['', 'settings', 'popularity', 'versions', 'steps'], rows)}")
        rows = [[model, _pairs(trial["settings"]), *(_number(trial["figures"].get(name)) for name in (GAUC, HIT_RATE))]
                for model, about in abouts for trial in about["trials"]]  # fmt: skip
        parts.append(f"### {title}: trials on the validation split\n\n{table(['', 'settings', 'GAUC', 'HR@100'], rows)}")
    return "\n".join(parts)


def _figures(results: Path, mine: list[dict[str, Any]], ours: Path, theirs: dict[str, dict[str, Any]]) -> str:
    """GAUC and HR@100 of this package's models and of peers, each with how far AIF and two-tower are above."""
    runs = {name: question.runs_of(theirs, mine[0]["dataset"], name) for name in OURS}

    def pooled(name: str, metric: str) -> ByUser:
        return question.pooled(ours, theirs, runs[name], metric)

    def row(title: str, of: Callable[[str], ByUser | None]) -> list[str]:
        cells = [title]
        for metric, tried in ((GAUC, (AIF, BASE)), (HIT_RATE, (AIF, BASE)), ("gauc", (AIF,))):
            figure = of(metric)
            cells.append("" if figure is None else interval(metrics.user_interval(figure), "{:.3f}"))
            for name in tried:
                if figure is None or not runs[name] or title == OURS[name]:
                    cells.append("")
                    continue
                ratio = metric == HIT_RATE
                gap = metrics.paired_interval(pooled(name, metric), figure, ratio=ratio)
                cells.append(interval(gap, "{:.2f}" if ratio else "{:+.1f}", scale=1 if ratio else 100))
        return cells

    def peer(one: dict[str, Any], metric: str) -> ByUser | None:
        return records.by_user(results, one, metric) if metric in one["figures"] else None

    rows = [row(OURS[name], partial(pooled, name)) for name in OURS if runs[name]]
    rows += [row(one["model"], partial(peer, one)) for one in mine]
    above = ["points AIF is above", "points two-tower is above"]
    ratios = ["AIF over it", "two-tower over it"]
    return table(["", "GAUC", *above, "HR@100", *ratios, "GAUC, all requests", above[0]], rows)


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows]) + "\n"


def interval(found: metrics.Interval, form: str, *, scale: float = 1.0) -> str:
    """A figure with its interval."""
    value, low, high = (form.format(scale * value) for value in (found.value, found.low, found.high))
    return f"{value} [{low.lstrip('+')}, {high.lstrip('+')}]"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
