"""Other people's models, and closed-form baselines, on the requests and candidates of `question`.

Claim     `presets.aif` ranks better than every peer's own code that is trained for as long.
Command   python -m experiments.peers --data DIR
          (--smoke: seconds; --report-only: tables from the records; --help lists all)
Data      DIR holds movielens-small-merged/ and taobao-userbehavior-head100k/; the synthetic world of --smoke is made here.
Protocol  experiments/notes/peers.md. Requests are written once into --work. Score files in WORK/DATA/test/scores are judged,
          whoever wrote them, and leave a record in experiments/results/question/peers; experiments/peers/README.md has their
          format.
Time      about ten minutes of one core
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments import common
from experiments.peers import baselines, judge, report, scores, tuning
from experiments.study import datasets, question, records
from experiments.study.question import Trial


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Make the score files that are asked for and missing, judge all there are, and report."""
    options = parse(arguments)
    if not options.report_only:
        evaluate(options)
    text = report.markdown(options.results, options.ours)
    print(text)
    if options.page is not None:
        page = options.page / report.PAGE
        heading, *_ = page.read_text(encoding="utf-8").partition("## ") if page.exists() else ("",)
        page.write_text(heading + text, encoding="utf-8")
    common.write_json(options.json, {"models": records.read(options.results)})


def evaluate(options: argparse.Namespace) -> None:
    """Write a record of every score file of the test slice that has none yet."""
    name = "smoke" if options.smoke else options.dataset
    data = datasets.load(name, options.data)
    folder = options.work.resolve() / name
    slices = {slice_: judge.slice_of(data, slice_) for slice_ in judge.SLICES}
    lists = {slice_: judge.once(folder / slice_, one) for slice_, one in slices.items()}
    workplace = tuning.Workplace(folder=folder, lists=lists, slices=slices)
    for baseline in options.baselines:
        tuning.baseline(baseline, workplace)
    kept = records.read(options.results)
    for model in scores.names(workplace.scores("test")):
        found = workplace.read(model)
        trial = Trial(dataset=name, model=model, split="test", epochs=0, seed=found.about.get("seed", 0))
        if found.about and kept.get(trial.id, {}).get("about") == records.rounded(found.about):
            continue  # the same settings, tuned alike
        made = judge.judged(found, slices["test"], found.about.get("powers", {}))
        met = question.met_share(trial, slices["test"].part, data)
        question.keep(options.results, trial, made, met_items=met, about=found.about, commit=common.machine()["commit"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", metavar="DIR", type=Path, help="the folder that holds the data sets' folders")
    parser.add_argument("--dataset", choices=datasets.NAMES, default="movielens", help="default %(default)s")
    names = tuple(baselines.BASELINES)
    parser.add_argument("--baselines", nargs="*", choices=names, default=names, help="closed-form ones (default: all)")
    parser.add_argument("--report-only", action="store_true", help="tables from the records there are")
    parser.add_argument("--results", metavar="DIR", type=Path, help="records of peers (default question/peers of the results)")
    parser.add_argument(
        "--ours", metavar="DIR", type=Path, default=question.RESULTS, help="records that they are compared with, of `question`"
    )
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("out/peers"), help="requests and score files")
    parser.add_argument("--page", metavar="DIR", type=Path, help=f"write the tables of {report.PAGE} in this folder")
    options = parser.parse_args(arguments)
    if options.results is None:
        options.results = options.work / "results" if options.smoke else report.RESULTS
    return options


if __name__ == "__main__":
    main()
