"""Other people's models on the study's own samples and lists, and closed-form baselines.

Claim     On merged MovieLens AIF ranks better than every peer's own code; its hit rate is compared with those of EASE and ALS.
Command   python -m experiments.peers --data DIR --json peers.json
          (--smoke: seconds; --report-only: tables from the records; --peer NAME=PYTHON: a trained peer too; --help lists all)
Data      DIR holds movielens-small-merged/; the synthetic world of --smoke is made here.
Protocol  experiments/notes/peers.md. Lists are written once into --work. Score files in WORK/DATA/test/scores are evaluated,
          whoever wrote it, and leaves a record in experiments/results/old_protocol/peers.jsonl, in the format of
          experiments/peers/README.md.
Time      closed-form baselines about ten minutes, each trained peer about seventeen, of one core.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from experiments import common
from experiments.peers import baselines, export, ours, outcomes, report, scores, tuning
from experiments.study import datasets, records

REQUESTS = 3000  # of the study
SMOKE = 64


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Makes the score files that are asked for and missing, evaluates all there are, and reports."""
    options = parse(arguments)
    found = report.read(options.results) if options.report_only else evaluate(options)
    made = report.tables(found)
    for table in made:
        print(f"{table.title}\n{common.table(table.rows, table.header)}\n")
    if options.page is not None:
        budget = tuning.Budget()
        text = report.markdown(made, trial=budget.trial, longer=budget.longer)
        (options.page / report.PAGE).write_text(text, encoding="utf-8")
        print(f"tables written to {options.page / report.PAGE}")
    common.write_json(options.json, {"models": {one["model"]: one for one in found.values()}})


def evaluate(options: argparse.Namespace) -> dict[str, dict]:
    """The records of every score file of the data set, those of others as they are."""
    dataset = "smoke" if options.smoke else options.dataset
    load = functools.cache(lambda: datasets.load(dataset, options.data))
    folder = options.work.resolve() / dataset
    requests = SMOKE if options.smoke else REQUESTS
    lists = {name: export.once(folder / name, dataset, name, load, requests=requests) for name in export.SLICES}
    workplace = tuning.Workplace(folder=folder, lists=lists)
    for name in options.baselines:
        tuning.baseline(name, workplace)
    for name, python in options.peer:
        tuning.trained(name, workplace, python, tuning.Budget())
    where, test = workplace.scores("test"), lists["test"]
    for name, checkpoint in options.checkpoint:
        made, about = ours.checkpoint_scores(Path(checkpoint), load().dataset, test, power=options.sampler_power)
        scores.write_catalogue(where, name, made, about)
    names = scores.names(where)
    for flag, name in (("--reference", options.reference), ("--retrieval", options.retrieval)):
        if name not in names:
            raise SystemExit(f"{flag}: expected a model with a score file in {where}, one of {names}, got {name!r}")
    retrieval = workplace.read(options.retrieval)
    if retrieval.catalogue is None:
        raise SystemExit(f"--retrieval: expected a model with scores of the whole catalogue, got {options.retrieval!r}")
    retrieved = outcomes.best_rows(test, retrieval, "corrected", k=min(report.RETRIEVED, len(test.count) - 1))
    reference = outcomes.outcomes(test, workplace.read(options.reference), retrieved=retrieved)
    made = []
    for name in names:
        one = workplace.read(name)
        done = outcomes.outcomes(test, one, retrieved=retrieved)
        made.append(
            report.record(
                test, one, done,
                reference=(options.reference, reference), retrieval=options.retrieval, command=command(options),
            )
        )  # fmt: skip
    return report.keep(options.results, made)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", metavar="DIR", type=Path, help="the folder that holds the data sets' folders")
    parser.add_argument("--dataset", choices=datasets.NAMES, default="movielens", help="default %(default)s")
    names = tuple(baselines.BASELINES)
    parser.add_argument("--baselines", nargs="*", choices=names, default=names, help="closed-form ones (default: all)")
    parser.add_argument(
        "--peer", action="append", default=[], type=pair, metavar="NAME=PYTHON",
        help=f"a trained peer, one of {', '.join(tuning.FEEDS)}, and the Python that has its package",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", action="append", default=[], type=pair, metavar="NAME=FOLDER", help="a model of this package"
    )
    parser.add_argument(
        "--sampler-power", type=float, default=export.POWER,
        help="of the checkpoints: their negatives were drawn by count ** this; 0 for a corrected loss (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--reference", default="ease", help="model that all are compared with (default %(default)s)")
    parser.add_argument("--retrieval", default="ease", help="model whose best items are ranked too (default %(default)s)")
    parser.add_argument("--report-only", action="store_true", help="tables from the records there are")
    parser.add_argument("--results", metavar="DIR", type=Path, help=f"records (default {records.RESULTS.name}/ of experiments)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("out/peers"), help="lists and score files")
    parser.add_argument("--page", metavar="DIR", type=Path, help=f"write {report.PAGE} into this folder")
    options = parser.parse_args(arguments)
    if options.results is None:
        options.results = options.work / "results" if options.smoke else records.RESULTS
    return options


def command(options: argparse.Namespace) -> str:
    """The command that a record is made by, with placeholders for what differs from machine to machine."""
    chosen = f"--reference {options.reference} --retrieval {options.retrieval}"
    return f"python -m experiments.peers --data DIR --dataset {options.dataset} {chosen}"


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


if __name__ == "__main__":
    main()
