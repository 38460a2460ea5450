"""The study's figures: GAUC against the critical path, length of history and sizes of blocks, and without a block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.study import models
from experiments.study.models import FACTORS
from experiments.study.report import Records, by_history, by_seen, in_catalogue, lost, sizes, summary

PLACED = tuple(model for model in (*models.BASELINES, *models.ADDITIVE, *models.LONGER) if model != "two_tower, S=128")
"""Models of the first figure, where their critical path was measured; the one left out coincides with `two_tower`."""
COMPARED = (
    *models.BASELINES, "exact, L=512", "exact, L=2048", *models.ADDITIVE, "aif, L=512", "preset",
    "preset, L=2048", f"two_tower{FACTORS}", f"preset{FACTORS}", f"preset, L=2048{FACTORS}",
)  # fmt: skip
"""Models of the frontier."""
DRAWN = ("two_tower", "cold", "+ SimTier", "aif", "exact", "aif, L=512", "exact, L=512", "preset, L=2048", "exact, L=2048")
"""Models of the second."""
GAUC = "GAUC, next item, merged MovieLens"


def draw(records: Records, critical: Mapping[str, Any] | None, folder: Path) -> list[Path]:
    """Draws every figure that the records have something for; the PNG files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "frontier": _frontier(records, critical or {}),
        "gauc_by_critical_path": _by_critical_path(records, critical or {}),
        "gauc_by_history": _by_history(records),
        "gauc_by_seen": _by_seen(records),
        "gauc_by_size": _by_size(records),
        "leave_one_out": _leave_one_out(records),
    }
    made = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=120)
            made.append(folder / f"{name}.png")
    pyplot.close("all")
    return made


def _by_critical_path(records: Records, critical: Mapping[str, Any]) -> Any:
    from matplotlib import pyplot, ticker

    rows = summary(records).get("movielens", {})
    placed = [(model, critical[model]["p50"], rows[model]) for model in PLACED if model in critical and model in rows]
    if not placed:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for model, ms, figures in placed:
        level = figures["gauc"]
        near = sorted(
            there["gauc"] for _, other, there in placed if abs(level - there["gauc"]) < 0.003 and ms < 2 * other < 4 * ms
        )
        crowded = any(ms < other and abs(level - there["gauc"]) < 0.003 for _, other, there in placed)
        # names of a crowd are one above another, each with a line to its point
        lift = 12 * (near.index(level) - (len(near) - 1) / 2) if len(near) > 2 else 0
        line = dict(arrowstyle="-", color="0.6", linewidth=0.6) if lift else None
        away = 30 if lift else 8
        at, side = ((-away, lift), "right") if crowded else ((away, lift), "left")  # where no other name is
        axes.errorbar(ms, level, yerr=figures["gauc_std"], fmt="o", capsize=3)
        words = dict(textcoords="offset points", ha=side, va="center", fontsize=9, arrowprops=line)
        axes.annotate(model, (ms, level), xytext=at, **words)
    axes.margins(x=0.3, y=0.1)
    axes.set(xscale="log", xlabel="critical path at C=1000, ms (median)", ylabel=GAUC)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    return figure


def _frontier(records: Records, critical: Mapping[str, Any]) -> Any:
    """GAUC and HR@100 of the whole catalogue against the critical path and against processor time of a whole request."""
    from matplotlib import pyplot, ticker

    rows, asked = summary(records).get("movielens", {}), in_catalogue(records)
    figures = {model: asked.get(model) or rows.get(model) for model in COMPARED}
    timed = {model: critical[model] for model, found in figures.items() if found and "cpu" in critical.get(model, {})}
    if not timed:
        return None
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 7), sharex="col", sharey="row", squeeze=False)
    times = {"p50": "critical path at C=1000, ms (median)", "cpu": "processor time of a request of a new user, ms (median)"}
    qualities = {"gauc": GAUC, "hr100": "HR@100 of the whole catalogue"}
    for axes, (quality, time) in zip(panels.flat, itertools.product(qualities, times), strict=True):
        for number, (model, ms) in enumerate(timed.items()):
            found = figures[model] or {}
            if model in asked or quality == "gauc":
                style = dict(fmt="osD^v<>P*"[number % 9], capsize=3, label=model, color=f"C{number % 10}")
                axes.errorbar(ms[time], found[quality], yerr=found[f"{quality}_std"], **style)
        axes.set(xscale="log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
    for axes, label in zip(panels[1], times.values(), strict=True):
        axes.set(xlabel=label)
    for axes, label in zip(panels[:, 0], qualities.values(), strict=True):
        axes.set(ylabel=label)
    panels[0][1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _by_history(records: Records) -> Any:
    from matplotlib import pyplot

    bins = {model: values for model, values in by_history(records).items() if model in DRAWN}
    if not bins:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for model, values in bins.items():
        axes.plot(list(values), list(values.values()), marker="o", label=model)
    axes.set(xlabel="earlier events of the user", ylabel=GAUC)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _by_seen(records: Records) -> Any:
    """A panel for each data set: GAUC against the last events that a state has seen."""
    from matplotlib import pyplot

    found = by_seen(records)
    if not found:
        return None
    names = sorted({model for rows in found.values() for model in rows})  # one colour in all panels
    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 4), squeeze=False)
    for axes, (dataset, rows) in zip(panels[0], found.items(), strict=True):
        for model, by in sorted(rows.items()):
            levels, spread = ([parts["gauc"][name] for parts in by.values()] for name in ("gauc", "gauc_std"))
            axes.errorbar(list(by), levels, yerr=spread, marker="o", capsize=3, label=model, color=f"C{names.index(model)}")
        axes.set(title=dataset, xlabel="last events that the state has seen", ylabel="GAUC")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _by_size(records: Records) -> Any:
    """A panel for each size, all on one scale."""
    from matplotlib import pyplot

    found = {size: values for size, values in sizes(records).items() if len(values) > 1}
    if not found:
        return None
    figure, panels = pyplot.subplots(1, len(found), figsize=(3 * len(found), 3.6), sharey=True, squeeze=False)
    for axes, (size, values) in zip(panels[0], found.items(), strict=True):
        levels, spread = ([figures[name] for figures in values.values()] for name in ("gauc", "gauc_std"))
        joined = all(value.isdigit() for value in values)
        axes.errorbar(list(values), levels, yerr=spread, fmt="o-" if joined else "o", capsize=3)
        axes.margins(x=0.1)
        axes.set(xlabel=size)
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel="GAUC, validation slice")
    return figure


def _leave_one_out(records: Records) -> Any:
    """Bars: points that the full model loses without a block, a panel for each data set; diamonds: on the validation slice."""
    from matplotlib import pyplot

    before = lost(records, where="validation")
    found = sorted(lost(records).items(), key=lambda pair: next(iter(pair[1].values()))["points"])
    datasets = list(dict.fromkeys(dataset for _, by in found for dataset in by))
    if not found:
        return None
    figure, panels = pyplot.subplots(1, len(datasets), figsize=(2 + 3.4 * len(datasets), 3.9), sharey=True, squeeze=False)
    for axes, dataset in zip(panels[0], datasets, strict=True):
        rows = [(model, by[dataset]) for model, by in found if dataset in by]
        points, spread = ([figures[name] for _, figures in rows] for name in ("points", "points_std"))
        bars = axes.barh([model for model, _ in rows], points, xerr=spread, capsize=3, color="tab:blue", alpha=0.7)
        chosen = [(before[model][dataset]["points"], model) for model, _ in rows if dataset in before.get(model, {})]
        marks = axes.scatter(*zip(*chosen, strict=True), marker="D", s=22, zorder=3, color="tab:orange") if chosen else None
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=dataset, xlabel="GAUC points below the full model")
        axes.grid(alpha=0.3, axis="x")
        if marks is not None and axes is panels[0][-1]:
            axes.legend([bars, marks], ["test slice", "validation slice, one epoch"], loc="lower right", fontsize=8)
    return figure
