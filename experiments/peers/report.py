"""The page of peers, from their records and those of `question`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from aif_jax import metrics
from aif_jax.metrics import ByUser
from experiments.peers import baselines
from experiments.peers.judge import GAUC, HIT_RATE
from experiments.study import question, records
from experiments.study.question import AIF, BASE, WITH_MATCHING
from experiments.tables import DATASETS, markdown, spread

RESULTS = question.RESULTS / "peers"
PAGE = "peers.md"
OURS = {AIF: "AIF", WITH_MATCHING: "two-tower with matching statistics", BASE: "two-tower"}


def page(results: Path, ours: Path) -> str:
    """Return the tables of the page: figures for each data set, settings, trials."""
    found, theirs, parts = records.read(results), records.read(ours), []
    for dataset in dict.fromkeys(one["dataset"] for one in found.values()):
        mine = [one for one in found.values() if one["dataset"] == dataset]
        mine.sort(key=lambda one: (-one["figures"][GAUC], one["model"]))
        title = DATASETS.get(dataset, dataset)
        missing = {*baselines.BASELINES} - {one["model"] for one in mine}
        left = f"\nNot run: {', '.join(sorted(missing))}.\n" if missing else ""
        parts.append(f"## {title}\n\n{_figures(results, mine, ours, theirs)}\n{left}")
        abouts = [(one["model"], one["about"]) for one in mine if "trials" in one["about"]]
        rows = [[model, *map(_pairs, (about["chosen"], about["powers"], about["versions"])), str(about.get("steps", ""))]
                for model, about in abouts]  # fmt: skip
        parts.append(f"### {title}: chosen\n\n{markdown(['', 'settings', 'popularity', 'versions', 'steps'], rows)}\n")
        rows = [[model, _pairs(trial["settings"]), *(_number(trial["figures"].get(name)) for name in (GAUC, HIT_RATE))]
                for model, about in abouts for trial in about["trials"]]  # fmt: skip
        parts.append(f"### {title}: trials on the validation split\n\n{markdown(['', 'settings', 'GAUC', 'HR@100'], rows)}\n")
    return "\n".join(parts)


def _figures(results: Path, mine: list[dict[str, Any]], ours: Path, theirs: dict[str, dict[str, Any]]) -> str:
    """Return GAUC and HR@100 of this package's models and of peers, each with how far AIF and two-tower are above."""
    runs = {name: question.runs_of(theirs, mine[0]["dataset"], name) for name in OURS}

    pooled = partial(question.of_test, ours, theirs, mine[0]["dataset"])

    def row(title: str, of: Callable[[str], ByUser | None]) -> list[str]:
        cells = [title]
        for metric, tried in ((GAUC, (AIF, BASE)), (HIT_RATE, (AIF, BASE)), ("gauc", (AIF,))):
            figure = of(metric)
            cells.append("" if figure is None else spread(metrics.user_interval(figure), 3))
            for name in tried:
                if figure is None or not runs[name] or title == OURS[name]:
                    cells.append("")
                    continue
                gap = metrics.paired_interval(pooled(name, metric), figure, ratio=metric == HIT_RATE)
                cells.append(spread(gap, 2) if metric == HIT_RATE else spread(gap, 1, scale=100, sign="+"))
        return cells

    def peer(one: dict[str, Any], metric: str) -> ByUser | None:
        return records.by_user(results, one, metric) if metric in one["figures"] else None

    rows = [row(OURS[name], partial(pooled, name)) for name in OURS if runs[name]]
    rows += [row(one["model"], partial(peer, one)) for one in mine]
    above = ["points AIF is above", "points two-tower is above"]
    ratios = ["AIF over it", "two-tower over it"]
    return markdown(["", "GAUC", *above, "HR@100", *ratios, "GAUC, all requests", above[0]], rows)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
