"""The study's tables: as plain text for the terminal, as Markdown for `experiments/notes/study_tables.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.study import recipes, report
from experiments.study.report import Records

PAGE = "study_tables.md"
HEADING = """# The study's tables

Written by `python -m experiments.ablation --report-only --page docs` from the records in `experiments/results/old_protocol/`;
[Does it rank better?](study.md) explains them. Figures are means over seeds, ± their sample deviation; without ± there is one
seed. *GAUC* pools a user's requests, *per user* is the plain mean over users. *Ranker recall@100* is the share of the `exact`
model's ten best that are among the model's hundred best; in the synthetic world it is of two seeds for logQ, of one or two
where L=512. Recency windows in SimTier are ours. *Critical ms* is the median from "candidates are here" to "top 100
are here" at C=1000 with the model's history length, all models in turn in one run, measured on MovieLens.
"""
NAMES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "gauc_mean": "GAUC per user",
    "log_loss": "log-loss",
    "hr100": "HR@100",
    "hr100_without_limit": "HR@100 without limit",
    "ndcg100": "NDCG@100",
    "ranker_top10_in_top100": "ranker recall@100",
}
IN_CATALOGUE = {
    "gauc": "GAUC",
    "log_loss": "log-loss",
    "plain": "HR@100 as it is",
    "hr10": "HR@10",
    "hr50": "HR@50",
    "hr100": "HR@100",
    "hr500": "HR@500",
    "retrieved": "HR@100 within the two-tower's 1,000",
    "untrained": "HR@100 as it is, untrained items",
    "untrained_in_top100": "share of untrained items in the 100 as they are",
}
DATASETS = ("movielens", "taobao", "synthetic")
LONG = "_long_users"
TIMES = ("p50", "p99", "best", "cpu")
SEEN_BY = {
    "gauc": "",
    "more_than_trained": ": users with more events than were trained on",
    "rested": ": requests whose category the user met, but not within 520 events",
}
TASKS = {"next": f"next item, {recipes.DEFAULT}", "liked": "liked or not, pointwise"}


class Table(NamedTuple):
    """A title and its runs; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(records: Records, critical: Mapping[str, Any] | None) -> list[Table]:
    """Every table of the study, the main ones first.

    Args:
      records: by id.
      critical: model to its times in ms, or None where they were not measured.
    """
    times = {model: timed["p50"] for model, timed in (critical or {}).items()}
    made = []
    if found := report.claims(report.summary(records), critical):
        made.append(Table("Claims", ["claim", "figure"], [[name, f"{value:.3f}"] for name, value in found.items()]))
    for task, title in TASKS.items():
        for dataset, rows in report.summary(records, task=task).items():
            if dataset.startswith("synthetic-"):
                continue  # they have a table together, below
            made.append(_figures(f"{dataset}, {title}", rows, NAMES, times))
            long = {f"{name}{LONG}": shown for name, shown in NAMES.items()}
            made.append(_figures(f"{dataset}, {title}: users with at least 200 earlier events", rows, long, {}))
    for dataset, where in product(DATASETS, ("test", "validation")):
        title = f"{dataset}, the whole catalogue for every request, HR corrected by item offsets, {where} slice"
        made.append(_figures(title, report.in_catalogue(records, dataset=dataset, where=where), IN_CATALOGUE, {}))
    if critical:
        measured = {model: timed for model, timed in critical.items() if set(TIMES) <= set(timed)}
        lines = [[model, *(f"{timed[name]:.2f}" for name in TIMES)] for model, timed in measured.items()]
        made.append(
            Table("Critical path at C=1000, and processor time (cpu) of a whole request of a new user, ms", ["", *TIMES], lines)
        )
    made.append(_plain("movielens, GAUC by the user's earlier events", report.by_history(records)))
    for dataset, found in report.by_seen(records).items():
        for part, title in SEEN_BY.items():
            rows = {model: {seen: parts[part] for seen, parts in by.items() if part in parts} for model, by in found.items()}
            made.append(_grid(f"{dataset}, GAUC by the last events that a state has seen{title}", rows, "gauc"))
    made.append(_plain("movielens, trials on the validation slice, GAUC", report.trials(records)))
    for dataset, model in product(DATASETS, (recipes.MODEL, "two_tower")):
        if len(found := report.by_recipe(records, model, dataset=dataset)) > 1:
            made.append(_figures(f"{dataset}, {model} by recipe", found, NAMES, {}))
    for dataset in DATASETS:
        for stage, rows in report.small(records, dataset=dataset).items():
            made.append(_figures(f"{dataset}, {stage.partition(',')[0]}, validation slice", rows, NAMES, times))
    for where in report.LEFT_OUT:
        title = f"leave one out: GAUC points below the full model, seed by seed, {where} slice"
        made.append(_grid(title, report.lost(records, where=where), "points", digits=2))
    made.append(_grid("synthetic worlds with one source of interest, GAUC", report.by_world(records), "gauc"))
    made.append(_grid("synthetic-short by epochs, validation slice, GAUC", report.by_epochs(records), "gauc"))
    return [table for table in made if table.rows and len(table.header) > 1]


def text(found: Iterable[Table]) -> str:
    """Plain text, columns aligned."""
    return "\n\n".join(f"{table.title}\n{common.table(table.rows, table.header)}" for table in found)


def markdown(found: Iterable[Table]) -> str:
    """The page: a heading and every table."""
    parts = [HEADING]
    for table in found:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append(f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def write(folder: Path, records: Records, critical: Mapping[str, Any] | None) -> Path:
    """Writes the page into a folder of documentation and says where."""
    path = folder / PAGE
    path.write_text(markdown(tables(records, critical)), encoding="utf-8")
    return path


def _figures(title: str, rows: Mapping[str, dict[str, float]], names: Mapping[str, str], times: Mapping[str, float]) -> Table:
    """Figures with their spread, and the critical path where there is one; columns that nobody has are left out."""
    shown = {name: header for name, header in names.items() if any(name in figures for figures in rows.values())}
    timed = any(model in times for model in rows)
    lines = []
    for model, figures in rows.items():
        path = [f"{times[model]:.2f}" if model in times else ""] if timed else []
        lines.append([model, *(_spread(figures, name) for name in shown), *path, str(figures["seeds"])])
    header = ["", *shown.values(), *["critical ms"] * timed, "seeds"]
    return Table(title, header, lines if shown else [])


def _plain(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """One figure a cell."""
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = [[row, *(f"{values[name]:.4f}" if name in values else "" for name in columns)] for row, values in rows.items()]
    return Table(title, ["", *columns], lines)


def _grid(title: str, rows: Mapping[str, Mapping[str, dict[str, float]]], name: str, *, digits: int = 4) -> Table:
    """One figure with its spread in every cell."""
    columns = list(dict.fromkeys(column for found in rows.values() for column in found))
    lines = [[row, *(_spread(found.get(column, {}), name, digits=digits) for column in columns)] for row, found in rows.items()]
    return Table(title, ["", *columns], lines)


def _spread(figures: Mapping[str, float], name: str, *, digits: int = 4) -> str:
    if name not in figures:
        return ""
    spread = figures[f"{name}_std"]
    return f"{figures[name]:.{digits}f}" + (f" ± {spread:.{digits}f}" if np.isfinite(spread) else "")
