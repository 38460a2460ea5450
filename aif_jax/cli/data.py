"""Commands on raw files: `aif-jax check` and `aif-jax train`."""

from __future__ import annotations

import argparse
import dataclasses
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
    encoder_of,
    load_model,
    read_columns,
)
from aif_jax.columns import Columns
from aif_jax.config import Config
from aif_jax.model import build
from aif_jax.presets import PRESETS
from aif_jax.readers import check, read
from aif_jax.readers.check import ORDERS
from aif_jax.readers.problems import CAP
from aif_jax.train.fit import fit


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

    one = add_command(commands, "train", run_train, "Trains a model on files; killed and called again, it resumes.")
    add_files(one, items_required=True)
    one.add_argument("--preset", choices=PRESETS, default="aif", help="the model (default: %(default)s)")
    one.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="changes",
        help="fields of the config as JSON, such as width=64 head=[64,32]: " + ", ".join(config_fields()),
    )  # fmt: skip
    one.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoints and logs")
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
    data = read(options.events, items=options.items, users=options.users, columns=read_columns(options) or Columns())
    config = PRESETS[options.preset](data.schema, **config_changes(options.changes))
    run = fit(build(config), data, out=options.out)
    print(run)
    return FINE


def config_fields() -> list[str]:
    """Fields of a config that a preset takes from the command line."""
    return [field.name for field in dataclasses.fields(Config) if field.name not in ("schema", "blocks")]


def config_changes(words: list[str]) -> dict[str, Any]:
    """Fields of a config from FIELD=VALUE words. Raises UsageError for other words."""
    changes = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if name not in config_fields() or value is None and text != "null":
            raise UsageError(f"--set: expected FIELD=VALUE with a field of {config_fields()} and JSON, got {word!r}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    return changes


def at_least_one(text: str) -> int:
    """A positive integer of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number
