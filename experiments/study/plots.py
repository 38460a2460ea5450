"""The study's figures: GAUC against the critical path, and against the length of the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.study import arms
from experiments.study.report import Records, by_history, summary

PLACED = tuple(arm for arm in (*arms.BASELINES, *arms.ADDITIVE, *arms.LONGER) if arm != "two_tower, S=128")
"""Arms of the first figure, where their critical path was measured; the one left out lies on `two_tower`."""
DRAWN = ("two_tower", "cold", "+ SimTier", "aif", "exact", "aif, L=512", "exact, L=512")
"""Arms of the second."""


def draw(records: Records, critical: dict[str, Any] | None, folder: Path) -> list[Path]:
    """GAUC against the critical path, and against history length; the PNG files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    rows = summary(records).get("movielens", {})
    placed = [(arm, critical[arm]["p50"], rows[arm]) for arm in PLACED if critical and arm in critical and arm in rows]
    if placed:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for arm, ms, figures in placed:
            level = figures["gauc"]
            crowded = any(ms < other and abs(level - there["gauc"]) < 0.003 for _, other, there in placed)
            at, side = ((-8, 0), "right") if crowded else ((8, 0), "left")  # the name stands where no other point is
            axes.errorbar(ms, level, yerr=figures["gauc_std"], fmt="o", capsize=3)
            axes.annotate(arm, (ms, level), xytext=at, textcoords="offset points", ha=side, va="center", fontsize=9)
        axes.margins(x=0.3)
        axes.set(xscale="log", xlabel="critical path at C=1000, ms (median)", ylabel="GAUC, next item, merged MovieLens")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
        made.append(_saved(figure, folder / "gauc_by_critical_path.png"))
    bins = {
        arm: values
        for arm, values in by_history(records).items()
        if arm in DRAWN
    }
    if bins:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for arm, values in bins.items():
            axes.plot(list(values), list(values.values()), marker="o", label=arm)
        axes.set(xlabel="earlier events of the user", ylabel="GAUC, next item, merged MovieLens")
        axes.legend()
        axes.grid(alpha=0.3)
        made.append(_saved(figure, folder / "gauc_by_history.png"))
    pyplot.close("all")
    return made


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
