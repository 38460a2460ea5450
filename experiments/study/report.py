"""What the records say: means over seeds, trials, history bins, the claims, and the JSON of all that."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.study import datasets, models, plan, recipes
from experiments.study.models import FACTORS
from experiments.study.runs import USUAL

Records = dict[str, dict[str, Any]]
PATHS = {
    "auc": ("auc",),
    "gauc": ("gauc",),
    "gauc_mean": ("gauc_mean",),
    "log_loss": ("log_loss",),
    "hr100": ("hr100",),
    "hr100_without_limit": ("hr100_without_limit",),
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
IN_CATALOGUE = {
    "gauc": ("gauc",),
    "log_loss": ("log_loss",),
    "plain": ("catalogue", "plain", "hr100"),
    "hr10": ("catalogue", "corrected", "hr10"),
    "hr50": ("catalogue", "corrected", "hr50"),
    "hr100": ("catalogue", "corrected", "hr100"),
    "hr500": ("catalogue", "corrected", "hr500"),
    "retrieved": ("catalogue", "retrieved", "hr100"),
    "untrained": ("catalogue", "plain_untrained", "hr100"),
    "untrained_in_top100": ("catalogue", "untrained_in_top100"),
}
"""The same for models that rank the whole catalogue for every request."""
LEFT_OUT = {"test": "leave one out", "validation": "leave one out, validation"}
"""Slice to the stage that evaluates the full model without one block there."""


def summary(records: Records, *, task: str = "next", recipe: str | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Data set to model to the mean over seeds of every column, `<column>_std` (sample deviation) and `seeds`.

    Args:
      records: by id.
      task: "next" or "liked".
      recipe: None for the one that models are compared with: `recipes.DEFAULT`, "pointwise" for "liked".
    """
    wanted = recipe or (recipes.DEFAULT if task == "next" else "pointwise")
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        if (record["slice"], record["task"], record["recipe"]) == ("test", task, wanted):
            groups[record["dataset"]][label(record)].append(record["figures"])
    order = {name: i for i, name in enumerate(models.names())}
    return {
        dataset: {
            model: averaged(found)
            for model, found in sorted(by_model.items(), key=lambda pair: (order[pair[0].partition(", with ")[0]], pair[0]))
        }
        for dataset, by_model in groups.items()
    }


def label(record: dict[str, Any]) -> str:
    """The model, and what else of the run is not as usual: "aif, with bfloat16"."""
    found = [record[name] for name, usual in USUAL.items() if record.get(name, usual) != usual]
    return record["model"] + (f", with {' and '.join(found)}" if found else "")


def by_recipe(records: Records, model: str = recipes.MODEL, *, dataset: str = "movielens") -> dict[str, dict[str, float]]:
    """Recipe to the figures of one model."""
    found = {name: summary(records, recipe=name).get(dataset, {}).get(model) for name in recipes.NAMES}
    return {name: figures for name, figures in found.items() if figures is not None}


def in_catalogue(records: Records, *, dataset: str = "movielens", where: str = "test") -> dict[str, dict[str, float]]:
    """What models that rank the whole catalogue score, by model and recipe, and with the factors of co-engagement added."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records.values():
        figures = record["figures"]
        if (record["dataset"], record["slice"], record["task"]) != (dataset, where, "next") or "catalogue" not in figures:
            continue
        name = label(record) + ("" if record["recipe"] == recipes.DEFAULT else f", {record['recipe']}")
        groups[name].append(figures)
        if "factors" in figures:
            groups[name + FACTORS].append(figures["factors"])
    return {name: averaged(found, IN_CATALOGUE) for name, found in sorted(groups.items())}


def averaged(found: list[dict[str, Any]], paths: Mapping[str, tuple[str, ...]] = PATHS) -> dict[str, float]:
    """Mean and sample deviation over seeds of every column that the figures have."""
    made: dict[str, float] = {}
    for name, path in paths.items():
        values = [value for figures in found if (value := _at(figures, path)) is not None]
        if values:
            made |= _spread(values, name)
    ceilings = [figures["ceiling"]["gauc"] for figures in found if "ceiling" in figures]
    if ceilings:
        made["ceiling_gauc"] = float(np.mean(ceilings))
    return made | {"seeds": len(found)}


def claims(table: dict[str, dict[str, dict[str, float]]], critical: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures of the study's claims; names end with what differs in the AIF model, such as " L=512"."""
    made: dict[str, float] = {}
    for dataset, rows in table.items():
        if "two_tower" not in rows:
            continue
        tower = rows["two_tower"]["gauc"]
        for name, figures in rows.items():
            if name not in models.AIF:
                continue
            more, gain, exact = _more(name), figures["gauc"] - tower, rows.get(_ceiling(name))
            made[f"{dataset}_gauc_points_over_two_tower{more}"] = 100 * gain
            if exact:
                made[f"{dataset}_share_of_exact_gain{more}"] = gain / (exact["gauc"] - tower)
            if "ceiling_gauc" in figures:
                made[f"{dataset}_share_of_gap_to_truth{more}"] = gain / (figures["ceiling_gauc"] - tower)
            if name == "aif" and "cold" in rows:
                made[f"{dataset}_gauc_points_over_cold"] = 100 * (figures["gauc"] - rows["cold"]["gauc"])
                made[f"{dataset}_spread_over_cold"] = 100 * float(np.hypot(figures["gauc_std"], rows["cold"]["gauc_std"]))
    times = critical or {}
    for name, timed in times.items():
        if name.startswith("aif") and (exact := times.get(_ceiling(name))):
            made[f"critical_exact_over_aif{_more(name)}"] = exact["p50"] / timed["p50"]
    return made


def _more(model: str) -> str:
    """What is not as usual in an AIF model: "aif, L=512" -> " L=512"."""
    return model.removeprefix("aif").replace(",", "")


def _ceiling(model: str) -> str:
    """The sequential ceiling with the history of an AIF model: "aif, L=512, seven recency windows" -> "exact, L=512"."""
    return ", ".join(["exact", *(part for part in model.split(", ")[1:] if part.startswith("L="))])


def small(records: Records, *, dataset: str = "movielens") -> dict[str, dict[str, dict[str, float]]]:
    """Stage to model to figures of the comparisons on the validation slice, on one data set."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for stage in plan.SMALL:
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in plan.runs(stage):
            if run.dataset == dataset and run.id in records:
                found[label(records[run.id])].append(records[run.id]["figures"])
        if found:
            made[stage] = {model: averaged(figures) for model, figures in found.items()}
    return made


def lost(records: Records, *, where: str = "test") -> dict[str, dict[str, dict[str, float]]]:
    """Model without a block to data set to the GAUC points that the full model is above it: mean and deviation over seeds.

    Args:
      records: by id.
      where: slice, one of `LEFT_OUT`.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in plan.runs(LEFT_OUT[where]):
        full = dataclasses.replace(run, model="aif")
        if run != full and run.id in records and full.id in records:
            points = 100 * (records[full.id]["figures"]["gauc"] - records[run.id]["figures"]["gauc"])
            found[run.model][run.dataset].append(points)
    return {model: {dataset: _spread(points, "points") for dataset, points in by.items()} for model, by in found.items()}


def sizes(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Size to its values to figures on the validation slice, see `models.SWEPT`; the paper's model is in each."""
    stages = small(records)
    found = stages.get("signatures", {}) | stages.get("sweeps", {})
    return {
        size: {value: found[model] for value, model in values.items() if model in found}
        for size, values in models.SWEPT.items()
    }


def trials(records: Records) -> dict[str, dict[str, float]]:
    """Family to the validation GAUC of every trial."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for run in plan.runs("tuning"):
        if run.id in records:
            epochs = f"{run.epochs} epoch" + "s" * (run.epochs > 1)
            trial = f"lr {run.learning_rate:g}, {epochs}, decay {run.weight_decay:g}"
            found[run.model][trial] = records[run.id]["figures"]["gauc"]
    return dict(found)


def by_epochs(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Model of "more epochs" to epochs to its GAUC on the validation slice."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in plan.runs("more epochs"):
        if run.id in records:
            found[run.model][f"{run.epochs} epochs"].append(records[run.id]["figures"]["gauc"])
    return {model: {epochs: _spread(values, "gauc") for epochs, values in by.items()} for model, by in found.items()}


def by_world(records: Records) -> dict[str, dict[str, dict[str, float]]]:
    """Model to its GAUC in every synthetic world with one source of interest, and what the truth scores there."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for dataset, rows in summary(records).items():
        if dataset.startswith("synthetic-") and dataset in datasets.SYNTHETIC:
            for model, figures in rows.items():
                found[model][dataset] = {name: figures[name] for name in ("gauc", "gauc_std", "seeds")}
                found["the truth"][dataset] = {"gauc": figures["ceiling_gauc"], "gauc_std": float("nan")}
    truth = found.pop("the truth", {})
    return dict(found) | ({"the truth": truth} if truth else {})


def by_history(records: Records, *, dataset: str = "movielens") -> dict[str, dict[str, float]]:
    """Model to the GAUC of every history bin, mean over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        if (record["dataset"], record["slice"], record["task"], record["recipe"]) == (dataset, "test", "next", recipes.DEFAULT):
            for name, figures in record["figures"].get("by_history", {}).items():
                found[label(record)][name].append(figures["gauc"])
    return {model: {name: float(np.mean(values)) for name, values in bins.items()} for model, bins in found.items()}


def by_seen(records: Records) -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
    """Data set to model to the last events that its states have seen to GAUC: of all requests, of users with more events than
    were trained on, and of requests for a category that rested; mean and deviation over seeds.
    """
    found: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    for record in records.values():
        for seen, figures in record["figures"].get("by_seen", {}).items():
            parts = {"gauc": figures} | {part: figures[part] for part in ("more_than_trained", "rested") if part in figures}
            for part, values in parts.items():
                found[record["dataset"]][label(record)][seen][part].append(values["gauc"])
    return {
        dataset: {
            model: {seen: {part: _spread(values, "gauc") for part, values in parts.items()} for seen, parts in by.items()}
            for model, by in rows.items()
        }
        for dataset, rows in found.items()
    }


def keys(records: Records, critical: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `--json` writes: per data set and model the keys of the study, then recipes, bins and claims."""
    table, choices = summary(records), small(records)
    for rows in [*table.values(), *choices.values()]:
        for model, figures in rows.items():
            figures["critical_ms"] = critical[model]["p50"] if critical and model in critical else float("nan")
    return {
        "next": table,
        "liked": summary(records, task="liked"),
        "recipes": by_recipe(records),
        "trials": trials(records),
        "by_world": by_world(records),
        "by_epochs": by_epochs(records),
        "by_history": by_history(records),
        "by_seen": by_seen(records),
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
