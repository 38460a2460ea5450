"""Closed-form baselines on the requests and candidates of `question`, and the tables of other people's models.

Claim     `presets.aif` ranks better than every peer's own code that is trained for as long.
Command   python -m experiments.peers --data DIR      (or --smoke; --report-only: tables from the records; --help lists all)
Protocol  experiments/notes/peers.md. Settings are chosen on the validation slice: the largest sum of GAUC and HR@100 of
          requests whose item has a training event. The test slice is judged once, and leaves a record in
          experiments/results/question/peers; what has one is not judged again. README.md here tells how to add a peer.
Time      about ten minutes of one core
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

from experiments import common
from experiments.peers import baselines, judge, report
from experiments.peers.judge import SLICES, Scores, Slice
from experiments.study import datasets, question, records
from experiments.study.question import Trial


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Judge the baselines that have no record yet, and report."""
    parser = common.parser(__doc__, data=True, ours=question.RESULTS)
    parser.add_argument("--dataset", choices=datasets.NAMES, default="movielens", help="default %(default)s")
    names = tuple(baselines.BASELINES)
    parser.add_argument("--baselines", nargs="*", choices=names, default=names, help="default: all")
    parser.add_argument("--report-only", action="store_true", help="tables from the records there are")
    parser.add_argument("--page", metavar="DIR", type=Path, help=f"write the tables of {report.PAGE} in this folder")
    options = parser.parse_args(arguments)
    options.results = Path("out/peers") if options.smoke else report.RESULTS
    if not options.report_only:
        evaluate(options)
    text = report.page(options.results, options.ours)
    print(text)
    if options.page is not None:
        page = options.page / report.PAGE
        heading, *_ = page.read_text(encoding="utf-8").partition("## ") if page.exists() else ("",)
        page.write_text(heading + text, encoding="utf-8")
    common.write_json(options.json, {"models": records.read(options.results)})


def evaluate(options: argparse.Namespace) -> None:
    """Write a record of every baseline that has none yet."""
    name = "smoke" if options.smoke else options.dataset
    data = datasets.load(name, options.data)
    slices = {slice_: judge.slice_of(data, slice_) for slice_ in SLICES}
    for baseline in options.baselines:
        trial = Trial(dataset=name, model=baseline, split="test", epochs=0)
        if trial.id in records.read(options.results):
            continue
        found, about = tuned(baseline, slices)
        made = judge.judged(found, slices["test"], about["powers"])
        met, commit = question.met_share(slices["test"]), common.machine()["commit"]
        about |= {"versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}, "seed": 0}
        question.keep(options.results, trial, made, met_items=met, about=about, commit=commit)


def tuned(name: str, slices: dict[str, Slice]) -> tuple[Scores, dict[str, Any]]:
    """Return the scores of the test slice by the best settings of a baseline, and what was tried."""
    function, trials = baselines.BASELINES[name]
    validation, test = (slices[slice_] for slice_ in SLICES)
    tried: list[dict[str, Any]] = []
    for settings in trials:
        found = judge.scored(function(judge.lists_of(validation), **settings), validation)
        powers, figures = judge.best_powers(found, validation)
        tried.append({"settings": settings, "powers": powers, "figures": figures})
        print(f"{name}, {settings}: {', '.join(f'{key} {value:.4f}' for key, value in figures.items())}", flush=True)
    best = max(tried, key=lambda trial: sum(trial["figures"].values()))
    about = {"settings": best["settings"], "chosen": best["settings"], "powers": best["powers"], "trials": tried}
    return judge.scored(function(judge.lists_of(test), **best["settings"]), test), about


if __name__ == "__main__":
    main()
