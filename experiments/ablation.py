"""Does it rank better? AIF's blocks, baselines and recipes compared on public data.

Claim     On next-item MovieLens the full AIF model ranks better than a tuned two-tower model and than COLD, and keeps the gain
          of the sequential ceiling; each block gains where its signal is planted in a synthetic world.
Command   python -m experiments.ablation --data DIR --json ablation.json
          (--smoke: seconds; --report-only: tables from the records; --critical: times of the critical path; --help lists all)
Data      DIR holds movielens-small-merged/ and taobao-userbehavior-head100k/; the synthetic worlds are made here.
Protocol  experiments/notes/study.md, the old one: met items are negatives. `experiments.study.question` asks it rightly; its
          figures are under the key "preset" of --json. Each run (data set, model, recipe, seed) is trained and evaluated
          once and leaves a record in experiments/results/old_protocol/; runs with a record are skipped, so the study can be
          stopped and continued at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments import common
from experiments.study import critical as critical_path
from experiments.study import datasets, inttower, models, plan, plots, question, recipes, records, report, tables, tuning
from experiments.study.runs import SIZES, SMOKE, Run, recall_of_ranker, train_and_evaluate

CRITICAL = "critical.json"


def main(arguments: list[str] | None = None) -> None:
    """Does the missing runs, or measures critical paths, then reports."""
    options = parse(arguments)
    if options.protocol is not None:
        inttower.main(options)
        return
    if options.critical:
        time_models(options)
    elif options.workers > 1 and not options.report_only:
        spawn(options)
    elif not options.report_only:
        if options.worker is not None:
            own_core(options.worker)
        work_through(wanted(options), options)
    if not (options.report_only or options.list or options.worker is not None):
        fill(options)
    if not options.list and options.worker is None:
        tell(options)


def tell(options) -> None:
    """Prints every table, draws the figures and writes the JSON file, all from the records."""
    found, critical = records.read(options.results), read_critical(options)
    print(tables.text(tables.tables(found, critical)))
    figures = options.figures if options.page is None else options.page / "figures"
    for path in plots.draw(found, critical, figures):
        print(f"figure written to {path}")
    if options.page is not None:
        print(f"tables written to {tables.write(options.page, found, critical)}")
    common.write_json(options.json, report.keys(found, critical) | {"preset": question.keys(question.RESULTS)})


def time_models(options) -> None:
    """Measures the critical path of every model, interleaved, and writes one record."""
    data = datasets.load("smoke" if options.smoke else "movielens", options.data)
    names = options.model or models.names()
    rounds, lengths = (5, (64,)) if options.smoke else (options.rounds, critical_path.LENGTHS)
    timed = critical_path.measure(
        data, names, candidates=options.candidates, rounds=rounds, lengths=lengths, work=options.work, smoke=options.smoke
    )
    made = {"candidates": options.candidates, "rounds": rounds, "models": timed, "machine": common.machine()}
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(records.rounded(made), indent=1) + "\n"
    (options.results / CRITICAL).write_text(text, encoding="utf-8")


def read_critical(options) -> dict[str, Any] | None:
    """Times by model, or None where they were not measured."""
    path = options.results / CRITICAL
    return json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else None


def parse(arguments: list[str] | None):
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", metavar="DIR", type=Path, help="the folder that holds the data sets' folders")
    parser.add_argument("--stage", nargs="+", choices=plan.STAGES, help="only these stages")
    parser.add_argument("--dataset", nargs="+", choices=datasets.NAMES, help="only runs of these data sets")
    parser.add_argument("--model", nargs="+", metavar="MODEL", choices=models.names(), help="only these models")
    parser.add_argument("--recipe", nargs="+", metavar="RECIPE", choices=recipes.NAMES, help="only these recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(plan.SEEDS), help="default %(default)s")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no run after that many minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the runs that are missing and stop")
    parser.add_argument("--report-only", action="store_true", help="tables and figures from the records there are")
    parser.add_argument("--results", metavar="DIR", type=Path, default=records.RESULTS, help="records (default %(default)s)")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("out/study"), help="models (default %(default)s)")
    parser.add_argument("--figures", metavar="DIR", type=Path, default=Path("out/study"), help="where PNG files go")
    parser.add_argument("--page", metavar="DIR", type=Path, help=f"write {tables.PAGE} and figures/ into this folder")
    parser.add_argument("--critical", action="store_true", help="measure the critical path of every model, on a quiet machine")
    parser.add_argument("--candidates", type=int, default=1000, help="of --critical (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="of --critical (default %(default)s)")
    parser.add_argument("--protocol", choices=["inttower"], help="the pre-ranking literature's protocol on MovieLens-1M files")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.raw = sys.argv[1:] if arguments is None else arguments
    return options


def wanted(options) -> list[Run]:
    """The runs that the command line asks for, in the order of the plan."""
    if options.smoke:
        return [Run(dataset="smoke", model=model, seed=0) for model in options.model or ("exact", "two_tower", "aif")]
    stages = options.stage or plan.STAGES
    found = list(dict.fromkeys(run for stage in stages for run in plan.runs(stage, seeds=tuple(options.seeds))))
    return [
        run
        for run in found
        if (not options.dataset or run.dataset in options.dataset)
        and (not options.model or run.model in options.model)
        and (not options.recipe or run.recipe in options.recipe)
    ]


def work_through(runs: list[Run], options) -> None:
    """Executes every run that has no record and that no other process has claimed."""
    began = time.monotonic()
    claims = options.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    loaded: dict[str, datasets.StudyData] = {}
    sizes = SMOKE if options.smoke else SIZES
    for run in runs:
        done = records.read(options.results)
        if run.id in done:
            continue
        if options.list:
            print(run.id)
            continue
        if time.monotonic() - began > 60 * options.budget_minutes:
            print("time is up; the same command goes on from here")
            return
        if not claim(claims / run.file):
            continue
        try:
            if run.slice == "test" and not options.smoke:
                wait_for_trials(options.work)
                done = records.read(options.results)
            if run.dataset not in loaded:
                loaded = {run.dataset: datasets.load(run.dataset, options.data)}
            record = train_and_evaluate(
                tuning.tuned(run, done), loaded[run.dataset], options.work, sizes=sizes, progress=options.worker is None
            )
            records.append(options.results, record)
            figures = record["figures"]
            print(
                f"{run.id}: GAUC {figures['gauc']:.4f}, AUC {figures['auc']:.4f}, "
                f"{record['train_seconds']:.0f} of {record['seconds']:.0f} s were training",
                flush=True,
            )
        except FileNotFoundError as error:
            print(f"left for later: {error}", flush=True)
        finally:
            (claims / run.file).unlink(missing_ok=True)
        jax.clear_caches()  # every run compiles its own programs


def fill(options) -> None:
    """Adds the ranker's recall to records of runs that were evaluated before the ranker was."""
    fields = {field.name for field in dataclasses.fields(Run)}
    for record in records.read(options.results).values():
        if record["slice"] == "test" and record["task"] == "next" and "ranker_top10_in_top100" not in record["figures"]:
            share = recall_of_ranker(Run(**{name: value for name, value in record.items() if name in fields}), options.work)
            if share is not None:
                figures = record["figures"] | {"ranker_top10_in_top100": share}
                records.append(options.results, record | {"figures": figures})


def claim(path: Path) -> bool:
    """Whether this process may run the run: nobody else alive has claimed it."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        if abandoned(path):
            path.unlink(missing_ok=True)
            return claim(path)
        return False


def abandoned(path: Path) -> bool:
    """Whether the process of a claim is gone; where that cannot be told, as without /proc, it counts as alive."""
    try:
        owner = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    return bool(owner) and Path("/proc/self").exists() and not Path(f"/proc/{owner}").exists()


def wait_for_trials(work: Path, *, rest: Callable[[float], None] = time.sleep) -> None:
    """Waits while another process is still at a trial: its outcome decides the hyperparameters."""
    trials = {run.file for run in plan.runs("tuning")}
    while any(path.name in trials and not abandoned(path) for path in (work / "claims").iterdir()):
        rest(5)


def spawn(options) -> None:
    """Starts the workers, each on its own core with one thread, and waits for them.

    Two runs at a time take less than one after another with two threads each: the products are small. Seeds share their
    compiled programs.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.work / "compiled"), **os.environ, "XLA_FLAGS": flags}
    raw = strip(options.raw, "--workers")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.ablation", *raw, "--worker", str(i)],
            env=environment,
        )
        for i in range(options.workers)
    ]
    failed = [process.wait() for process in processes]
    if any(failed):
        sys.exit(f"{sum(map(bool, failed))} of {len(failed)} workers failed; the same command goes on from here")


def own_core(number: int) -> None:
    """Keeps this process to one core; called before JAX starts its threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def strip(arguments: list[str], flag: str) -> list[str]:
    """The arguments without a flag and its value."""
    kept: list[Any] = []
    for argument in arguments:
        if argument.startswith(f"{flag}="):
            continue
        kept.append(argument)
    if flag in kept:
        at = kept.index(flag)
        del kept[at : at + 2]
    return kept


if __name__ == "__main__":
    main()
