"""The figures and tables of README and docs, from the records in experiments/results: one message a figure, errors on all.

Command   python -m experiments.plots     (`--out DIR` draws there and leaves the pages as they are)
Time      seconds
Errors    bars are 95 % intervals over users, of paired differences
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax import metrics
from aif_jax.metrics import ByUser, Interval
from experiments import common, ranker_recall, tables
from experiments.study import calibration, question, records
from experiments.study.question import AIF, BASE, WITH_MATCHING

REFRESH = Path("experiments/results/refresh/record.json")
LOAD = tables.COST
FIGURES = tables.ROOT / "docs" / "figures"
PRESET = "C=1000, L=512"
"""The size in that record of the models whose ranker recall is known."""
NAMES = {"movielens": "MovieLens", "taobao": "Taobao", "synthetic": "synthetic"}
COLOURS = {"movielens": "tab:blue", "taobao": "tab:orange", "synthetic": "tab:gray"}
SERVED = (
    ("two_tower", "new", "two_tower", "two-tower", 4), ("matching", "new", "matching", "with matching statistics", -34),
    ("aif", "new", "aif", "AIF", -16), ("aif", "returning_0", "aif", "AIF, cached", -16),
    ("sequential", "new", "aif", "AIF, not split", -16), ("exact", "new", "full_attention", "full attention\nvalidation", -36),
)  # fmt: skip
"""Points of the figure of the budget: service, users, the pre-ranker in the records of ranker recall, its name, and how far
above its point that stands for the second data set."""
SCORED = {
    BASE: ("two-tower", "black"), WITH_MATCHING: ("with matching statistics", "tab:orange"), AIF: ("AIF", "tab:blue"),
    question.FULL: ("full attention", "tab:gray"),
}  # fmt: skip
STYLE: dict[str, Any] = {
    "font.size": 13, "axes.titlesize": 14, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "figure.titlesize": 16, "lines.markersize": 8, "errorbar.capsize": 4, "figure.dpi": 100,
}  # fmt: skip
"""Large letters, few lines: to be read on a phone."""


def points(gap: Interval) -> tuple[float, list[list[float]]]:
    """Return a difference in GAUC points, and its error below and above as Matplotlib wants it."""
    value, low, high = (100 * part for part in gap)
    return value, [[value - low], [high - value]]


def draw_blocks(gains: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """Draw what each block is worth."""
    most = {name: max(100 * by_block[name].value for by_block in gains.values()) for name in next(iter(gains.values()))}
    matching, bridges, *others = most.values()
    title = f"Matching statistics add up to {matching:.1f} GAUC points, bridges (BEA) {bridges:.1f},\n"
    title += f"linear attention, SIM and SimTier at most {max(others):.1f}"
    with drawing(path, 4.6, title) as axis:
        for shift, (dataset, by_block) in zip((-0.13, 0.13), gains.items(), strict=False):
            for at, name in enumerate(most):
                value, error = points(by_block[name])
                axis.errorbar(value, at + shift, xerr=error, fmt="o", color=COLOURS[dataset], label=NAMES[dataset])
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(most)), list(most))
        axis.invert_yaxis()
        axis.set_xlabel("GAUC points that the block adds to AIF (validation split, one epoch)")
        _legend(axis, loc="lower right")


def draw_refresh(record: Mapping[str, Any], path: Path) -> None:
    """Draw what an old model costs."""
    worlds = record["worlds"]
    days, losses = next(iter(worlds.values()))["days"], [world["stale_loss_gauc_points"] for world in worlds.values()]
    title = f"A model that is not refreshed for {days} days loses {min(losses):.0f} to {max(losses):.0f} GAUC points"
    with drawing(path, 3.2, title) as axis:
        for at, (name, world) in enumerate(worlds.items()):
            lost, (low, high) = world["stale_loss_gauc_points"], world["stale_loss_interval"]
            axis.errorbar(lost, at, xerr=[[lost - low], [high - lost]], fmt="o", color=COLOURS[name])
        axis.set_xlim(-0.5, 1.15 * max(world["stale_loss_interval"][1] for world in worlds.values()))
        axis.set_xlabel("GAUC points lost against a model that is refreshed every day (one seed)")
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(worlds)), [NAMES[name] for name in worlds])
        axis.set_ylim(len(worlds) - 0.5, -0.5)


def draw_quality(results: Path, path: Path) -> None:
    """Draw GAUC over the two-tower model against the time of the scoring program, by number of candidates."""
    found, times = records.read(results), question.read_times(results)

    def of(model: str) -> ByUser:
        return question.of_test(results, found, "movielens", model, "gauc_trained")

    def score(model: str) -> list[float]:
        return [times[f"{model}, C={count}, L=512"]["score"]["p50"] for count in (1000, 10_000)]

    speed = np.divide(score(question.FULL), score(AIF))
    title = f"AIF ranks as full attention does and scores {speed[0]:.0f} times as fast\nat 1,000 candidates, "
    title += f"{speed[1]:.0f} times at 10,000 (MovieLens, test split)"
    with drawing(path, 4.8, title) as axis:
        for model, (name, colour) in SCORED.items():
            (value, error), ms = points(metrics.paired_interval(of(model), of(BASE))), score(model)
            axis.plot(ms, [value, value], color=colour, lw=1)
            for at, fill in zip(ms, (colour, "white"), strict=True):
                axis.errorbar(at, value, yerr=error, fmt="o", color=colour, markerfacecolor=fill)
            axis.annotate(name, (ms[1], value), xytext=(10, -20 if model == AIF else 6), textcoords="offset points", c=colour)
        axis.set(xscale="log", ylabel="GAUC points over two-tower", ylim=(-0.7, 3.9))
        axis.set_xlabel("milliseconds of scoring, median (filled: 1,000 candidates, hollow: 10,000)")
        axis.set_xticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
        axis.minorticks_off()


def draw_budget(record: Mapping[str, Any], losses: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """Draw what a cut keeps of the ranker's top 10 against requests a second.

    `record` is one size of `experiments.cost`; `losses` are of `ranker_recall.losses_of`.
    """
    best = {(service, users): tables.within(record["closed_loops"][service][users]) for service, users, *_ in SERVED}
    said = [(100 - losses["movielens"][model].value, best[model, "new"]["rps"]) for model in ("aif", "two_tower")]
    title = "AIF keeps {:.1f} % of the ranker's top 10 at {:,.0f} requests a second,\n".format(*said[0])
    title += "two-tower {:.1f} % at {:,.0f} (MovieLens, both taught)".format(*said[1])
    with drawing(path, 5.2, title) as axis:
        for dataset, by_model in losses.items():
            for service, users, model, name, under in SERVED:
                if (served := best[service, users]) and model in by_model:
                    rps = served["rps"]
                    value, low, high = by_model[model]
                    error = [[value - low], [high - value]]
                    axis.errorbar(rps, value, yerr=error, fmt="o", color=COLOURS[dataset], label=NAMES[dataset])
                    left, up = service in ("matching", "sequential"), 4 if dataset == "movielens" else under
                    given = dict(xytext=(-8 if left else 8, up), ha="right" if left else "left")
                    axis.annotate(name, (rps, value), textcoords="offset points", color=COLOURS[dataset], **given)
        bound = "requests a second on two cores, 99 % answered within 30 ms (log)"
        axis.set(xscale="log", yscale="log", xlabel=bound, ylabel="ranker recall@10, %, of a cut of 1,000 to 100")
        axis.set_yticks([50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1], ["50", "80", "90", "95", "98", "99", "99.5", "99.8", "99.9"])
        limits = axis.get_xlim()
        shown = [50, 100, 200, 500, 1000, 2000, 5000]
        axis.set_xticks(shown, [f"{rps:,}" for rps in shown])
        axis.minorticks_off()
        axis.invert_yaxis()
        axis.set_xlim(limits[0] / 1.2, limits[1] * 1.5)
        _legend(axis, loc="best")


def draw_calibration(record: Mapping[str, Any], path: Path) -> None:
    """Draw predicted against observed shares; `record` is what `experiments.study.calibration` writes."""
    totals = [record["ways"][way]["ratio"] for way in ("before", "logistic")]
    title = "Small probabilities are 2 to 4 times too low as trained; calibration\n"
    title += f"brings them nearer, but takes predicted / observed from {totals[0]:.2f} to {totals[1]:.2f}"
    with drawing(path, 5.4, title) as axis:
        shares = [0.0005, 0.002, 0.01, 0.05, 0.2, 1.0]
        axis.plot(shares, shares, color="black", lw=1)
        for way, name, colour in (("before", "as trained", "tab:gray"), ("logistic", "calibrated", "tab:blue")):
            one = record["ways"][way]
            shown = f"{name}: error {100 * one['error']:.1f} %, predicted / observed {one['ratio']:.2f}"
            given = dict(fmt="o", color=colour, label=shown, capsize=4)
            axis.errorbar(one["predicted"], one["observed"], yerr=2 * np.array(one["deviations"]), **given)
        axis.set(xscale="log", yscale="log", ylabel="observed share of positives")
        axis.set_xlabel("predicted probability, by tenths (MovieLens, 1 positive in 16 items)")
        axis.set_xlim(shares[0] / 2, 1.5)
        axis.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
        axis.set_yticks(shares, [f"{100 * share:g} %" for share in shares])
        axis.minorticks_off()
        _legend(axis, loc="upper left")


@contextlib.contextmanager
def drawing(path: Path, height: float, title: str) -> Iterator[Any]:
    """Lend axes in the style, saved when the block ends."""
    import matplotlib

    style = matplotlib.rc_context(STYLE)
    with style, common.picture(path, 1, 1, size=(8, height)) as (figure, axis):
        yield axis
        figure.suptitle(title, x=0.02, ha="left")


def _legend(axis: Any, **where: Any) -> None:
    """Draw each label once."""
    labelled = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axis.legend(labelled.values(), labelled.keys(), frameon=False, **where)


def main(arguments: list[str] | None = None) -> None:
    """Draw every figure that there is a record for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the PNG files go; none: docs/figures, and tables too")
    options = parser.parse_args(arguments)
    for page in () if options.out else tables.PAGES:
        page.write_text(tables.written(page.read_text(encoding="utf-8")), encoding="utf-8")
    out = options.out or FIGURES
    refreshed, load, calibrated = (json.loads(of.read_text(encoding="utf-8")) for of in (REFRESH, LOAD, calibration.RECORD))
    draw_blocks(tables.blocks(question.RESULTS), out / "blocks.png")
    draw_refresh(refreshed, out / "refresh.png")
    draw_quality(question.RESULTS, out / "quality_against_time.png")
    draw_budget(load[PRESET], ranker_recall.losses_of(ranker_recall.RESULTS), out / "budget.png")
    draw_calibration(calibrated, out / "calibration.png")


if __name__ == "__main__":
    main()
