"""Commands on raw files: `aif-jax check` and `aif-jax train`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from aif_jax.cli.options import (
    FINE,
    PROBLEMS,
    UsageError,
    add_checkpoint,
    add_columns,
    add_command,
    add_flags,
    as_usage,
    encoder_of,
    flags_given,
    load_model,
    read_columns,
    read_fields,
)
from aif_jax.columns import Columns
from aif_jax.config import Config
from aif_jax.model import build
from aif_jax.presets import PRESETS
from aif_jax.readers import check, read
from aif_jax.readers.check import ORDERS
from aif_jax.readers.problems import CAP
from aif_jax.run import fit
from aif_jax.train.tasks import TASKS

CONFIG_FIELDS = [field.name for field in dataclasses.fields(Config) if field.name not in ("schema", "blocks")]
FIT = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "seed", "min_history", "validation", "test", "requests", "repeats",
)  # fmt: skip
"""Arguments of `fit` that have a flag."""


def add_commands(commands: Any) -> None:
    """Adds `check` and `train`."""
    one = add_command(
        commands,
        "check",
        run_check,
        "Lists every problem of event, item and user files (Parquet, CSV or TSV) with row numbers.",
    )
    add_files(one)
    add_checkpoint(one, use="values that its encoder lacks are problems, and its columns are the default")
    one.add_argument("--order", choices=ORDERS, default="auto", help="what the events are sorted by (default: %(default)s)")
    one.add_argument(
        "--cap", type=at_least_one, default=CAP, help="problems of one kind that are listed (default: %(default)s)"
    )
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    add_columns(one)

    one = add_command(commands, "train", run_train, "Trains a model on files. Killed and called again, it resumes.")
    add_files(one, items_required=True)
    one.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoints and logs")
    one.add_argument("--preset", choices=PRESETS, default="aif", help="the model (default: %(default)s)")
    one.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="changes",
        help="fields of the config in JSON, such as width=64 head=[64,32]: " + ", ".join(CONFIG_FIELDS),
    )  # fmt: skip
    one.add_argument(
        "--task", nargs="+", default=["NextItem"], metavar=("NAME", "FIELD=VALUE"),
        help=f"one of {', '.join(TASKS)}, and its fields, such as: Liked threshold=4 (default: NextItem)",
    )  # fmt: skip
    add_flags(one, {name: inspect.signature(fit).parameters[name].default for name in FIT}, fit)
    one.add_argument("--evaluate", action="store_true", help="evaluate the test slice too")
    one.add_argument("--json", action="store_true", help="print the figures as JSON")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    add_columns(one)


def add_files(parser: argparse.ArgumentParser, *, items_required: bool = False) -> None:
    """Adds the options that name files."""
    parser.add_argument("--events", required=True, help="file or folder: one row for each interaction")
    parser.add_argument("--items", required=items_required, help="file or folder: one row for each item")
    parser.add_argument("--users", help="file or folder: one row for each user")


def run_check(options: argparse.Namespace) -> int:
    """`check`."""
    encoder = None if options.checkpoint is None else encoder_of(options.checkpoint, load_model(options.checkpoint))
    report = check(
        options.events,
        items=options.items,
        users=options.users,
        columns=read_columns(options),
        encoder=encoder,
        order=options.order,
        cap=options.cap,
    )
    print(json.dumps(dataclasses.asdict(report), indent=2) if options.json else report)
    return FINE if report.clean else PROBLEMS


def run_train(options: argparse.Namespace) -> int:
    """`train`."""
    name, *words = options.task
    if name not in TASKS:
        raise UsageError(f"--task: expected one of {', '.join(TASKS)}, got {name!r}")
    fields = read_fields(words, f"--task {name}", [field.name for field in dataclasses.fields(TASKS[name])])
    changes = read_fields(options.changes, "--set", CONFIG_FIELDS)
    with as_usage("--task"):
        task = TASKS[name](**fields)
    data = read(options.events, items=options.items, users=options.users, columns=read_columns(options) or Columns())
    with as_usage("--set"):
        model = build(PRESETS[options.preset](data.schema, **changes))
    run = fit(model, data, out=options.out, task=task, progress=not options.quiet, **flags_given(options, FIT))
    figures: dict[str, Any] = {"validation": run.metrics}
    if options.evaluate:
        figures["test"] = run.evaluate(data, progress=not options.quiet).figures()
    if options.json:
        print(json.dumps(figures))
    else:
        for split, values in figures.items():
            print(f"{split}: {', '.join(f'{name} {value:.4f}' for name, value in values.items())}")
    return FINE


def at_least_one(text: str) -> int:
    """A positive integer of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number
