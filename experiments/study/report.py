"""What the records say: means over seeds, trials, history bins, the claims, and the JSON of all that."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.study import arms, plan, recipes

Records = dict[str, dict[str, Any]]
PATHS = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "gauc_mean": ("gauc_mean",),
    "log_loss": ("log_loss",),
    "hr100": ("hr100",),
    "ndcg100": ("ndcg100",),
    "auc_long_users": ("long_users", "auc"),
    "gauc_long_users": ("long_users", "gauc"),
    "gauc_mean_long_users": ("long_users", "gauc_mean"),
    "log_loss_long_users": ("long_users", "log_loss"),
    "hr100_long_users": ("hr100_long_users",),
    "ndcg100_long_users": ("ndcg100_long_users",),
    "ranker_top10_in_top100": ("ranker_top10_in_top100",),
}
"""Column to where a record's figures hold it."""
LEFT_OUT = {"test": "leave one out", "validation": "leave one out, validation"}
"""Slice to the stage that asks the full model without one block there."""


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


def by_recipe(records: Records, arm: str = recipes.ARM, *, bench: str = "movielens") -> dict[str, dict[str, float]]:
    """Recipe to the figures of one arm."""
    found = {name: summary(records, recipe=name).get(bench, {}).get(arm) for name in recipes.NAMES}
    return {name: figures for name, figures in found.items() if figures is not None}


def averaged(found: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and sample deviation over seeds of every column that the figures have."""
    made: dict[str, float] = {}
    for name, path in PATHS.items():
        values = [value for figures in found if (value := _at(figures, path)) is not None]
        if values:
            made |= _spread(values, name)
    ceilings = [figures["ceiling"]["gauc"] for figures in found if "ceiling" in figures]
    if ceilings:
        made["ceiling_gauc"] = float(np.mean(ceilings))
    return made | {"seeds": len(found)}


def claims(table: dict[str, dict[str, dict[str, float]]], critical: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures that the study was asked for; names end with what is not as usual in the AIF arm, such as " L=512"."""
    made: dict[str, float] = {}
    for bench, rows in table.items():
        if "two_tower" not in rows:
            continue
        tower = rows["two_tower"]["gauc"]
        for name, figures in rows.items():
            if name not in arms.AIF:
                continue
            more, gain, exact = _more(name), figures["gauc"] - tower, rows.get(_ceiling(name))
            made[f"{bench}_gauc_points_over_two_tower{more}"] = 100 * gain
            if exact:
                made[f"{bench}_share_of_exact_gain{more}"] = gain / (exact["gauc"] - tower)
            if "ceiling_gauc" in figures:
                made[f"{bench}_share_of_gap_to_truth{more}"] = gain / (figures["ceiling_gauc"] - tower)
            if name == "aif" and "cold" in rows:
                made[f"{bench}_gauc_points_over_cold"] = 100 * (figures["gauc"] - rows["cold"]["gauc"])
                made[f"{bench}_spread_over_cold"] = 100 * float(np.hypot(figures["gauc_std"], rows["cold"]["gauc_std"]))
    times = critical or {}
    for name, timed in times.items():
        if name.startswith("aif") and (exact := times.get(_ceiling(name))):
            made[f"critical_exact_over_aif{_more(name)}"] = exact["p50"] / timed["p50"]
    return made


def _more(arm: str) -> str:
    """What is not as usual in an AIF arm: "aif, L=512" -> " L=512"."""
    return arm.removeprefix("aif").replace(",", "")


def _ceiling(arm: str) -> str:
    """The sequential ceiling with the history of an AIF arm: "aif, L=512, tiers by octaves" -> "exact, L=512"."""
    return ", ".join(["exact", *(part for part in arm.split(", ")[1:] if part.startswith("L="))])


def small(records: Records, *, bench: str = "movielens") -> dict[str, dict[str, dict[str, float]]]:
    """Stage to arm to figures of the comparisons that leave the test slice alone, on one data set."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for stage in plan.SMALL:
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for cell in plan.cells(stage):
            if cell.bench == bench and cell.id in records:
                found[label(records[cell.id])].append(records[cell.id]["figures"])
        if found:
            made[stage] = {arm: averaged(figures) for arm, figures in found.items()}
    return made


def lost(records: Records, *, where: str = "test") -> dict[str, dict[str, dict[str, float]]]:
    """Arm without a block to data set to the GAUC points that the full model is above it: mean and deviation over seeds.

    Args:
      records: by id.
      where: slice, one of `LEFT_OUT`.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in plan.cells(LEFT_OUT[where]):
        full = dataclasses.replace(cell, arm="aif")
        if cell != full and cell.id in records and full.id in records:
            points = 100 * (records[full.id]["figures"]["gauc"] - records[cell.id]["figures"]["gauc"])
            found[cell.arm][cell.bench].append(points)
    return {arm: {bench: _spread(points, "points") for bench, points in by.items()} for arm, by in found.items()}


def sizes(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Size to its values to figures on the validation slice, see `arms.SWEPT`; the paper's model stands in each."""
    stages = small(records)
    found = stages.get("signatures", {}) | stages.get("sweeps", {})
    return {size: {value: found[arm] for value, arm in values.items() if arm in found} for size, values in arms.SWEPT.items()}


def trials(records: Records) -> dict[str, dict[str, float]]:
    """Family to the validation GAUC of every trial."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for cell in plan.cells("tuning"):
        if cell.id in records:
            epochs = f"{cell.epochs} epoch" + "s" * (cell.epochs > 1)
            trial = f"lr {cell.learning_rate:g}, {epochs}, decay {cell.weight_decay:g}"
            found[cell.arm][trial] = records[cell.id]["figures"]["gauc"]
    return dict(found)


def by_epochs(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Arm of "more epochs" to epochs to its GAUC on the validation slice."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in plan.cells("more epochs"):
        if cell.id in records:
            found[cell.arm][f"{cell.epochs} epochs"].append(records[cell.id]["figures"]["gauc"])
    return {arm: {epochs: _spread(values, "gauc") for epochs, values in by.items()} for arm, by in found.items()}


def by_world(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Arm to its GAUC in every synthetic world with one source of interest, and what the truth scores there."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for bench, rows in summary(records).items():
        if bench.startswith("synthetic-"):
            for arm, figures in rows.items():
                found[arm][bench] = {name: figures[name] for name in ("gauc", "gauc_std", "seeds")}
                found["the truth"][bench] = {"gauc": figures["ceiling_gauc"], "gauc_std": float("nan")}
    truth = found.pop("the truth", {})
    return dict(found) | ({"the truth": truth} if truth else {})


def by_history(records: Records, *, bench: str = "movielens") -> dict[str, dict[str, float]]:
    """Arm to the GAUC of every history bin, mean over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        if (record["bench"], record["slice"], record["task"], record["recipe"]) == (bench, "test", "next", recipes.DEFAULT):
            for name, figures in record["figures"].get("by_history", {}).items():
                found[label(record)][name].append(figures["gauc"])
    return {arm: {name: float(np.mean(values)) for name, values in bins.items()} for arm, bins in found.items()}


def keys(records: Records, critical: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `--json` writes: per data set and arm the keys of the study, then recipes, bins and claims."""
    table, choices = summary(records), small(records)
    for rows in [*table.values(), *choices.values()]:
        for arm, figures in rows.items():
            figures["critical_ms"] = critical[arm]["p50"] if critical and arm in critical else float("nan")
    return {
        "next": table,
        "liked": summary(records, task="liked"),
        "recipes": by_recipe(records),
        "trials": trials(records),
        "by_world": by_world(records),
        "by_epochs": by_epochs(records),
        "by_history": by_history(records),
        **choices,
        "lost": lost(records),
        "lost, validation": lost(records, where="validation"),
        "claims": claims(table, critical),
    }


def _spread(values: list[Any], name: str) -> dict[str, float]:
    """Mean and sample deviation, the latter NaN for one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {name: float(np.mean(values)), f"{name}_std": deviation}


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        if name not in figures:
            return None
        figures = figures[name]
    return figures
