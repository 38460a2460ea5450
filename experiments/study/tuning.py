"""Hyperparameters: chosen for each family of models by the trials on the validation slice, the same trials for every family."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.study import models, plan
from experiments.study.runs import Run

TUNED = ("learning_rate", "epochs", "weight_decay")


def chosen(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The hyperparameters of the trial with the highest validation GAUC, by family; families without a trial are left out.

    Every family has one seed in this: the more seeds, the higher the highest of them.
    """
    best: dict[str, dict[str, Any]] = {}
    for record in (records[run.id] for run in plan.runs("tuning") if run.id in records):
        family = record["model"]
        if family not in best or record["figures"]["gauc"] > best[family]["figures"]["gauc"]:
            best[family] = record
    return {family: {name: record[name] for name in TUNED} for family, record in best.items()}


def tuned(run: Run, records: dict[str, dict[str, Any]]) -> Run:
    """The run with its family's hyperparameters; a trial stays as it is, a family without trials keeps the defaults."""
    if run.slice == "validation":
        return run
    return dataclasses.replace(run, **chosen(records).get(models.family(run.model), {}))
