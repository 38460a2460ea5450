"""The commands of a snapshot store: `snapshots list|current|publish|fetch|collect`."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, PROBLEMS
from aif_jax.connectors import SnapshotStore

KEEP = inspect.signature(SnapshotStore).parameters["keep"].default


def add_snapshot_commands(commands: Any) -> None:
    """Adds the commands to what `add_subparsers` returned."""
    text = "Looks into a snapshot store, publishes into it and fetches from it. Settings of S3 are those of the environment."
    inner = commands.add_parser("snapshots", help=text, description=text).add_subparsers(
        required=True, metavar="list|current|publish|fetch|collect"
    )
    url = "of the store, such as s3://BUCKET/PATH, or a local path"
    kept = "snapshots that stay, the current one among them (default: %(default)s)"
    for name, run in (
        ("list", run_list),
        ("current", run_current),
        ("publish", run_publish),
        ("fetch", run_fetch),
        ("collect", run_collect),
    ):
        one = shared.add_command(inner, name, run)
        one.add_argument("url", help=url)
        if name == "publish":
            one.add_argument("folder", type=Path, help="an export, or a snapshot of an index or a user table")
        if name == "fetch":
            one.add_argument("directory", type=Path, help="local folder, made where it is missing")
            one.add_argument("--name", help="of the snapshot (default: the current one)")
        if name in ("publish", "collect"):
            one.add_argument("--keep", type=int, default=KEEP, help=kept)


def run_list(options: argparse.Namespace) -> int:
    """Prints the names of all complete snapshots, oldest first, and of the current one as JSON."""
    with shared.open_store(options.url) as store:
        print(json.dumps({"current": store.current(), "snapshots": store.names()}))
    return FINE


def run_current(options: argparse.Namespace) -> int:
    """Prints the name of the current snapshot; exit code 1 for an empty store."""
    with shared.open_store(options.url) as store:
        name = store.current()
    if name is not None:
        print(name)
    return PROBLEMS if name is None else FINE


def run_publish(options: argparse.Namespace) -> int:
    """Uploads a folder, verifies it, makes it the current snapshot and removes the oldest; prints its name."""
    with shared.open_store(options.url, keep=options.keep) as store:
        print(store.publish(options.folder))
    return FINE


def run_fetch(options: argparse.Namespace) -> int:
    """Downloads a snapshot and checks every file; interrupted and called again, it goes on. Prints the local folder."""
    with shared.open_store(options.url) as store:
        print(store.fetch(options.directory, options.name))
    return FINE


def run_collect(options: argparse.Namespace) -> int:
    """Removes what is beyond --keep and interrupted uploads that are a day old; prints the names."""
    with shared.open_store(options.url, keep=options.keep) as store:
        for name in store.collect():
            print(name)
    return FINE
