"""Records of evaluated score files, and the tables made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.peers import outcomes, scores
from experiments.peers.figures import CUTS, DRAWS, difference, error, figures, level, others, resampled
from experiments.peers.lists import Lists
from experiments.study.records import rounded

FILE = "peers.jsonl"
PAGE = "peers.md"
TASK = "peers"
MAIN = {
    "gauc asked": "GAUC as asked",
    "gauc corrected": "GAUC corrected",
    "hr@100 asked": "HR@100 as asked",
    "hr@100 corrected": "HR@100 corrected",
}
GAUCS = {name: MAIN[name] for name in ("gauc asked", "gauc corrected")} | {
    "gauc mixed asked": "mixed as asked",
    "gauc mixed corrected": "mixed corrected",
}
RETRIEVED = 1000  # items that a retrieval hands on
HEADING = """# Other people's models

Written by `python -m experiments.peers --report-only --page docs` from the records of the old protocol,
`experiments/results/old_protocol/peers.jsonl`. The requests and lists are those of [the study](study.md): test slice, models
trained on the first 90 % of all events. Peers are unchanged models of their packages behind thin feeds;
`experiments/peers/README.md` says how to add one by writing a score file.

- *GAUC* pools a user's requests and weighs users by candidates: the next item against 99 drawn by count ** 0.75. *Mixed*
  replaces a share of the 99 by items without a training event, the share that such items have among the targets: lists drawn by
  popularity never hold one, so that a bonus for them would count as skill.
- *HR@k*: the next item is among the k best of all items that the user has not met; ties count against it.
- *Corrected*: scores that are logarithms of a likelihood over count ** p (p: the exponent of the negatives that the model was
  trained against) get p log(count) added for the catalogue, which asks for the likelihood, and (p - 0.75) log(count) for GAUC,
  which asks for it over that of the negatives. In the catalogue items without a training event are masked, and a request for
  one is a miss. Closed-form baselines are no logarithms: they are masked only.
- *Within a retrieval*: the same among the 1,000 best of another model (its corrected order); a target that it missed is a miss.
- ± is the standard error over users (bootstrap, {draws} samples). Differences are on the same samples of users, with
  the middle 95 %. One seed each.
- *Tuning*: closed-form baselines try the settings of the last table, trained peers three learning rates (0.001, 0.003, 0.01)
  with {trial:.0f} s of one core each (YoutubeDNN then two more temperatures), and the best of these with {longer:.0f} s, as
  long as `presets.aif` trains; with 2,048 events that takes three times as long. The best has the largest sum of GAUC and
  HR@100, both corrected, on the validation slice.
"""


class Table(NamedTuple):
    """A titled table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def record(
    lists: Lists,
    found: scores.Scores,
    made: outcomes.Outcomes,
    *,
    reference: tuple[str, outcomes.Outcomes] | None,
    retrieval: str | None,
    command: str,
) -> dict[str, Any]:
    """What is kept of one model: figures, standard errors, differences from the reference, what its file says of it.

    Args:
      lists: the slice.
      found: its score files.
      made: what they say on the lists.
      reference: name and outcomes of the model that it is compared with, or None.
      retrieval: name of the model whose best items the ranks within a retrieval are of.
      command: that wrote the record.
    """
    samples = resampled(len(np.unique(lists.user)))
    deepest = None if found.catalogue is not None or found.top is None else outcomes.depth(lists, found.top)
    values = figures(lists, made, deepest=deepest)
    seed = found.about.get("seed", 0)
    about, dataset, slice_ = lists.about, lists.about["dataset"], lists.about["slice"]
    against: dict[str, Any] = {}
    if reference is not None and reference[0] != found.name:
        theirs = figures(lists, reference[1])
        against = {name: difference(values[name], theirs[name], samples) for name in values if name in theirs}
    return rounded(
        {
            "id": f"{dataset}/{TASK}/{slice_}/{found.name}/seed {seed}",
            "dataset": dataset,
            "model": found.name,
            "seed": seed,
            "task": TASK,
            "recipe": "",
            "slice": slice_,
            "figures": {name: level(value) for name, value in values.items()},
            "errors": {name: error(value, samples) for name, value in values.items()},
            "others": others(lists, made),
            "reference": None if reference is None else reference[0],
            "against": against,
            "retrieval": retrieval,
            "requests": len(lists.user),
            "users": samples.shape[1],
            "untrained_share": about["untrained_share"],
            "draws": DRAWS,
            "about": found.about,
            "command": command,
            "commit": common.machine()["commit"],
        }
    )


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by id, in the order written; {} without a file."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {found["id"]: found for found in map(json.loads, lines)}


def keep(folder: Path, made: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds records to those of a folder; a record of the same id is replaced. Returns all."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read(folder) | {one["id"]: one for one in made}
    lines = [json.dumps(one, separators=(",", ":")) + "\n" for one in found.values()]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")
    return found


def tables(found: dict[str, dict[str, Any]]) -> list[Table]:
    """Every table, by data set: figures, differences, what masking hides, trials."""
    made: list[Table] = []
    for dataset in dict.fromkeys(one["dataset"] for one in found.values()):
        mine = sorted((one for one in found.values() if one["dataset"] == dataset), key=_order)
        requests = f"{mine[0]['requests']:,} requests of {mine[0]['users']:,} users"
        made.append(_figures(f"{dataset}: {requests}", mine, MAIN))
        made.append(_figures(f"{dataset}: GAUC", mine, GAUCS))
        for kind, title in (("asked", "as asked"), ("corrected", "corrected")):
            ks = {f"hr@{k} {kind}": f"HR@{k}" for k in CUTS}
            made.append(_figures(f"{dataset}: HR@k of the unseen catalogue, {title}", mine, ks))
            for retrieval in dict.fromkeys(one["retrieval"] for one in mine if one["retrieval"]):
                by = [one for one in mine if one["retrieval"] == retrieval]
                ks = {f"hr@{k} {kind} retrieved": f"HR@{k}" for k in CUTS}
                title_ = f"{dataset}: HR@k within the {RETRIEVED:,} best of {retrieval}, {title}"
                made.append(_figures(title_, by, ks))
        made += [_against(dataset, mine, reference) for reference in dict.fromkeys(one["reference"] for one in mine)]
        hidden = list(dict.fromkeys(name for one in mine for name in one["others"]))
        lines = [[one["model"], *(_number(one["others"].get(name)) for name in hidden)] for one in mine]
        made.append(Table(f"{dataset}: what masking hides", ["", *hidden], lines))
        tried = [[one["model"], *_trial(trial)] for one in mine for trial in one["about"].get("trials", [])]
        header = ["", "settings", *MAIN.values()]
        made.append(Table(f"{dataset}: trials on the validation slice", header, tried))
    return [table for table in made if table.rows and len(table.header) > 1]


def markdown(found: Iterable[Table], *, trial: float, longer: float) -> str:
    """The page: a heading and every table."""
    parts = [HEADING.format(draws=f"{DRAWS:,}", trial=trial, longer=longer)]
    for table in found:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append(f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _order(one: dict[str, Any]) -> tuple[float, str]:
    """By GAUC, the best first."""
    return (-one["figures"].get("gauc asked", 0.0), one["model"])


def _figures(title: str, mine: list[dict[str, Any]], names: dict[str, str]) -> Table:
    """Figures with their errors; models without any of them are left out."""
    rows = []
    for one in mine:
        cells = [_number(one["figures"].get(name), one["errors"].get(name)) for name in names]
        if any(cells):
            rows.append([one["model"], *cells])
    return Table(title, ["", *names.values()], rows)


def _against(dataset: str, mine: list[dict[str, Any]], reference: str | None) -> Table:
    names = MAIN | {"hr@100 corrected retrieved": "HR@100 corrected, retrieved"}
    rows = []
    for one in mine:
        if one["reference"] == reference and one["against"]:
            rows.append([one["model"], *(_difference(one["against"].get(name)) for name in names)])
    return Table(f"{dataset}: difference from {reference}, points", ["", *names.values()], rows)


def _number(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _trial(trial: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{name} {value:g}" for name, value in trial["settings"].items())
    return [settings, *(f"{trial[name]:.4f}" for name in MAIN)]
