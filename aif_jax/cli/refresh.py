"""The commands of the next model: `refresh` and `rollback`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, REFUSED
from aif_jax.refreshing import GateConfig, refresh

FLAGS = (
    "unknown", "since", "forget", "replay", "held_out", "epochs", "batch_size", "learning_rate", "id_dropout", "seed",
    "requests", "k", "keep",
)  # fmt: skip
"""Arguments of `refresh` that have a flag of their name."""
BOUNDS = [field.name for field in dataclasses.fields(GateConfig)]


def add_refresh_commands(commands: Any) -> None:
    """Adds the commands to what `add_subparsers` returned."""
    one = shared.add_command(commands, "refresh", run_refresh)
    text = "served model: URL or folder of a snapshot store of exports, or the folder of a run, checkpoint or export"
    one.add_argument("--current", metavar="URL", help=text + " (default: --out)")
    one.add_argument("--events", required=True, help="file or folder: new events, and those before them for histories")
    one.add_argument("--items", required=True, help="file or folder: one row for each item")
    one.add_argument("--users", help="file or folder: one row for each user")
    one.add_argument("--out", required=True, metavar="URL", help="snapshot store that `aif-jax serve URL --mirror DIR` follows")
    text = "local folder of the finished steps; required if --out is remote (default: OUT.work)"
    one.add_argument("--work", type=Path, metavar="DIR", help=text)
    text = f"{shared.TASK_HELP} (default: that of the served model)"
    one.add_argument("--task", nargs="+", metavar=("NAME", "FIELD=VALUE"), help=text)
    text = "bounds of the gate, such as gauc=0.005 users=100: " + ", ".join(BOUNDS)
    one.add_argument("--gate", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    text = "two dates, such as 2022-05-06 2022-05-07: judge also on the requests since the first, before the second"
    one.add_argument("--fixed", nargs=2, type=shared.number_or_text, metavar=("FROM", "BEFORE"), help=text)
    shared.add_flags(one, refresh, FLAGS)
    one.add_argument("--platforms", nargs="+", metavar="NAME", help=shared.PLATFORM_HELP)
    shared.add_shown(one, printed="the report")

    one = shared.add_command(commands, "rollback", run_rollback)
    one.add_argument("--out", required=True, metavar="URL", help="snapshot store of exports, --out of refresh")


def run_refresh(options: argparse.Namespace) -> int:
    """Trains the served model on new events, judges it against the served one, and publishes it if the gate passes it.

    Killed and called again, it goes on after the last finished step. Exit code 0: published, or nothing new; 3: the gate
    refused the model, which stays out, and the report says why; 1 and 2 as for every command.
    """
    settings: dict[str, Any] = shared.flags_given(options, FLAGS)
    if options.task is not None:
        settings["task"] = shared.read_task(options.task)
    with shared.as_usage("--gate"):
        settings["gate"] = GateConfig(**shared.read_fields(options.gate, "--gate", BOUNDS))
    settings |= {name: tuple(words) for name, words in shared.flags_given(options, ("fixed", "platforms")).items()}
    made = refresh(
        options.current or options.out, options.events, items=options.items, users=options.users, out=options.out,
        work=options.work, progress=not options.quiet, **settings,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"status": made.status, "name": made.name} | made.report))
    else:
        reasons = made.report.get("gate", {}).get("reasons", ())
        print("\n".join([made.status if made.name is None else f"{made.status}: {made.name}", *reasons]))
    return REFUSED if made.status == "refused" else FINE


def run_rollback(options: argparse.Namespace) -> int:
    """Makes the version before the current one current again; services that follow the store swap. Prints its name."""
    with shared.open_store(options.out) as store:
        print(store.rollback())
    return FINE
