"""Tables, figures and the JSON of the study, from its records alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from experiments.study import arms, plan, recipes

Records = dict[str, dict[str, Any]]
COLUMNS = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "gauc_mean": ("gauc_mean",),
    "log_loss": ("log_loss",),
    "gauc_long_users": ("long_users", "gauc"),
    "auc_long_users": ("long_users", "auc"),
    "hr100": ("hr100",),
    "hr100_long_users": ("hr100_long_users",),
    "ndcg100": ("ndcg100",),
    "ranker_top10_in_top100": ("ranker_top10_in_top100",),
}
SHOWN = ("auc", "gauc", "gauc_mean", "gauc_long_users", "hr100", "ndcg100", "ranker_top10_in_top100")


def summary(records: Records, *, task: str = "next", recipe: str | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Data set to arm to the mean over seeds of every column, `<column>_std` (sample deviation) and `seeds`.

    Args:
      records: by id.
      task: "next" or "liked".
      recipe: None for the one that arms are compared with: `recipes.DEFAULT`, "pointwise" for "liked".
    """
    wanted = recipe or (recipes.DEFAULT if task == "next" else "pointwise")
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        if (record["slice"], record["task"], record["recipe"]) == ("test", task, wanted):
            groups[record["bench"]][label(record)].append(record["figures"])
    order = {name: i for i, name in enumerate(arms.names())}
    return {
        bench: {
            arm: averaged(found)
            for arm, found in sorted(by_arm.items(), key=lambda pair: (order[pair[0].partition(", with ")[0]], pair[0]))
        }
        for bench, by_arm in groups.items()
    }


def label(record: dict[str, Any]) -> str:
    """The arm, and what else of the cell is not as usual: "aif, with bfloat16"."""
    usual = {"compute": "float32", "projection": "rotated"}
    found = [record[name] for name in usual if record.get(name, usual[name]) != usual[name]]
    return record["arm"] + (f", with {' and '.join(found)}" if found else "")


def by_recipe(records: Records, *, bench: str = "movielens", arm: str = recipes.ARM) -> dict[str, dict[str, float]]:
    """Recipe to the figures of one arm."""
    found = {name: summary(records, recipe=name).get(bench, {}).get(arm) for name in recipes.NAMES}
    return {name: figures for name, figures in found.items() if figures is not None}


def averaged(found: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and sample deviation over seeds of every column that the figures have."""
    made: dict[str, float] = {}
    for name, path in COLUMNS.items():
        values = [value for figures in found if (value := _at(figures, path)) is not None]
        if values:
            made[name] = float(np.mean(values))
            made[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    ceilings = [figures["ceiling"]["gauc"] for figures in found if "ceiling" in figures]
    if ceilings:
        made["ceiling_gauc"] = float(np.mean(ceilings))
    return made | {"seeds": len(found)}


def claims(table: dict[str, dict[str, dict[str, float]]], critical: dict[str, Any] | None) -> dict[str, float]:
    """The figures that the study was asked for."""
    made: dict[str, float] = {}
    rows = table.get("movielens", {})
    if {"two_tower", "aif"} <= set(rows):
        tower, aif = rows["two_tower"]["gauc"], rows["aif"]["gauc"]
        for name in ("aif", "aif, L=512"):
            length, exact = name.removeprefix("aif").replace(",", ""), name.replace("aif", "exact")
            if name in rows:
                made[f"gauc_points_over_two_tower{length}"] = 100 * (rows[name]["gauc"] - tower)
            if name in rows and exact in rows:
                made[f"share_of_exact_gain{length}"] = (rows[name]["gauc"] - tower) / (rows[exact]["gauc"] - tower)
        if "cold" in rows:
            made["gauc_points_over_cold"] = 100 * (aif - rows["cold"]["gauc"])
            made["spread_over_cold"] = 100 * float(np.hypot(rows["aif"]["gauc_std"], rows["cold"]["gauc_std"]))
    times = critical or {}
    for name in times:
        arm, _, length = name.partition(", ")
        exact = f"exact, {length}" if length else "exact"
        if arm == "aif" and exact in times:
            made[f"critical_exact_over_aif {length}".rstrip()] = times[exact]["p50"] / times[name]["p50"]
    for bench, rows in table.items():
        if {"two_tower", "aif"} <= set(rows) and "ceiling_gauc" in rows["aif"]:
            tower = rows["two_tower"]["gauc"]
            made[f"{bench}_share_of_gap"] = (rows["aif"]["gauc"] - tower) / (rows["aif"]["ceiling_gauc"] - tower)
    return made


def text(records: Records, critical: dict[str, Any] | None) -> str:
    """Every table as plain text."""
    parts = []
    for task, title in (("next", "next item"), ("liked", "liked or not")):
        for bench, rows in summary(records, task=task).items():
            parts.append(
                f"{bench}, {title}, recipe {recipes.DEFAULT if task == 'next' else 'pointwise'}\n" + _table(rows, critical)
            )
    if found := by_recipe(records):
        parts.append(f"movielens, next item, {recipes.ARM} by recipe\n" + _table(found, None))
    if bins := by_history(records):
        header = ["arm", *next(iter(bins.values()))]
        parts.append("movielens, GAUC by earlier events\n" + common.table([[a, *r.values()] for a, r in bins.items()], header))
    if trials := tuning(records):
        parts.append("movielens, trials on the validation slice, GAUC\n" + common.table(*trials))
    for title, found in small(records).items():
        rows = [[arm, _spread(row, "auc"), _spread(row, "gauc"), row["seeds"]] for arm, row in found.items()]
        parts.append(f"movielens, {title}, validation slice\n" + common.table(rows, ["arm", "auc", "gauc", "seeds"]))
    if found := claims(summary(records), critical):
        parts.append("\n".join(f"{name}: {value:.3f}" for name, value in found.items()))
    return "\n\n".join(parts)


def small(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Title to arm to figures of the comparisons that leave the test slice alone."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for stage in plan.SMALL:
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for cell in plan.cells(stage):
            if cell.id in records:
                found[label(records[cell.id])].append(records[cell.id]["figures"])
        if found:
            made[stage] = {arm: averaged(figures) for arm, figures in found.items()}
    return made


def tuning(records: Records) -> tuple[list[list[Any]], list[str]] | None:
    """Rows and header: validation GAUC of every trial by family."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records.values():
        if record["slice"] == "validation" and record["arm"] in plan.FAMILIES:
            trial = f"lr {record['learning_rate']:g}, {record['epochs']} epochs, decay {record['weight_decay']:g}"
            found[record["arm"]][trial] = record["figures"]["gauc"]
    if not found:
        return None
    trials = list(dict.fromkeys(trial for values in found.values() for trial in values))
    return [[arm, *(values.get(trial, float("nan")) for trial in trials)] for arm, values in found.items()], ["arm", *trials]


def by_history(records: Records, *, bench: str = "movielens") -> dict[str, dict[str, float]]:
    """Arm to the GAUC of every history bin, mean over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        if (record["bench"], record["slice"], record["task"], record["recipe"]) == (bench, "test", "next", recipes.DEFAULT):
            for name, figures in record["figures"].get("by_history", {}).items():
                found[label(record)][name].append(figures["gauc"])
    return {arm: {name: float(np.mean(values)) for name, values in bins.items()} for arm, bins in found.items()}


def keys(records: Records, critical: dict[str, Any] | None) -> dict[str, Any]:
    """What `--json` writes: per data set and arm the keys of the study, then recipes, bins and claims."""
    table = summary(records)
    for rows in table.values():
        for arm, figures in rows.items():
            figures["critical_ms"] = critical[arm]["p50"] if critical and arm in critical else float("nan")
    return {
        "next": table,
        "liked": summary(records, task="liked"),
        "recipes": by_recipe(records),
        "by_history": by_history(records),
        **small(records),
        "claims": claims(table, critical),
    }


def draw(records: Records, critical: dict[str, Any] | None, folder: Path) -> list[Path]:
    """GAUC against the critical path, and against history length; the PNG files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    rows = summary(records).get("movielens", {})
    placed = [(arm, critical[arm]["p50"], rows[arm]) for arm in _MAIN if critical and arm in critical and arm in rows]
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
        if arm in ("two_tower", "cold", "+ SimTier", "aif", "exact", "aif, L=512", "exact, L=512")
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


_MAIN = (*arms.BASELINES, *arms.ADDITIVE, *arms.LONGER)


def _table(rows: dict[str, dict[str, float]], critical: dict[str, Any] | None) -> str:
    shown = [name for name in SHOWN if any(name in figures for figures in rows.values())]
    lines = []
    for arm, figures in rows.items():
        cells = [_spread(figures, name) for name in shown]
        lines.append([arm, *cells, f"{critical[arm]['p50']:.2f}" if critical and arm in critical else "", figures["seeds"]])
    return common.table(lines, ["arm", *shown, "critical ms", "seeds"])


def _spread(figures: dict[str, float], name: str) -> str:
    if name not in figures:
        return ""
    spread = figures[f"{name}_std"]
    return f"{figures[name]:.4f}" + (f" ±{spread:.4f}" if np.isfinite(spread) else "")


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        if name not in figures:
            return None
        figures = figures[name]
    return figures


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
