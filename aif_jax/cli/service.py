"""The commands of production: `serve`, `index follow`, and those of `snapshots`."""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import expect
from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, UsageError, Value
from aif_jax.connectors import Follower, SnapshotStore
from aif_jax.connectors.kafka import FORM, open_stream
from aif_jax.export.consume.files import MANIFEST
from aif_jax.export.contents import open as open_model
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.index import inspect as read_manifest
from aif_jax.index.writer import snapshots
from aif_jax.output import track
from aif_jax.service.core import Service
from aif_jax.service.current import CURRENT, mirror
from aif_jax.service.log import RequestLog
from aif_jax.service.models import Models
from aif_jax.service.process import Listening, log_to_stderr, serve, source_of
from aif_jax.serving import compute_inline
from aif_jax.serving.metrics import exposed
from aif_jax.store.folders import URL
from aif_jax.store.trained import Trained

FLAGS: dict[type, Mapping[str, str]] = {
    Models: {"config": "serving"} | {name: name for name in ("keep", "poll", "index")},
    RequestLog: {"share": "log_share"},
    Listening: {"body_bytes": "max_bytes", "candidates": "max_candidates", "host": "host", "http_port": "port"}
    | {name: name for name in ("keep_alive", "drain_delay")},
}
"""Flags of `serve` by the field or argument that each sets."""


def add_service_commands(commands: Any) -> None:
    """Add the commands to what `add_subparsers` returned."""
    one = shared.add_command(commands, "serve", run_serve)
    text = "export; or folder of exports with the file `current` of service.current.publish; or URL of a store of exports"
    one.add_argument("folder", help=text)
    one.add_argument("--mirror", type=Path, metavar="DIR", help="local folder for the exports of a store")
    for owner, names in FLAGS.items():
        shared.add_flags(one, owner, names)
    text = "object with async get(user), or a function that makes one, as MODULE:NAME, for calls that bring a user id alone"
    one.add_argument("--features", metavar="MODULE:NAME", help=f"{text} (default: calls bring the features)")
    one.add_argument("--log", type=Path, metavar="DIR", help="folder of the request log, Parquet files (default: no log)")
    text = "file with the bearer token that calls must bring, but for / and /health (default: no token)"
    one.add_argument("--token-file", action=Value, make=read_token, dest="token", metavar="FILE", help=text)
    one.add_argument("--log-form", choices=("text", "json"), default="text", help="form of stderr log (default: %(default)s)")
    one.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: %(default)s)"
    )


def run_serve(options: argparse.Namespace) -> tuple[int, Any]:
    """Serve an exported model over HTTP until SIGTERM; prints its address as JSON when it is ready."""
    compute_inline()
    is_store = URL.match(options.folder) is not None
    fits, got = is_store == (options.mirror is not None), f"{options.folder} and --mirror {options.mirror}"
    expect(fits, "serve", "a folder, or the URL of a store, file:///PATH on disk, and --mirror", got, error=UsageError)
    folder = options.mirror if is_store else Path(options.folder)
    if not is_store and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected an exported folder, got none; write one: aif-jax export")
    given = {owner: shared.flags_given(options, names) for owner, names in FLAGS.items()}
    with shared.as_usage("serve"):
        where = Listening(token=options.token, **given[Listening])
    log_to_stderr(options.log_form, options.log_level)
    source = None if options.features is None else source_of(options.features)
    store: SnapshotStore | None = None
    if is_store:  # credentials come from the environment
        with shared.open_store(options.folder) as store:
            if not (folder / CURRENT).is_file():
                mirror(store, folder)
    models = Models(folder, source=source, store=store, **given[Models])
    with contextlib.ExitStack() as until_end:
        log = options.log and until_end.enter_context(contextlib.closing(RequestLog(options.log, **given[RequestLog])))
        serve(Service(models, observers=(log,) if log else ()), where)
    return FINE, None


def read_token(path: str) -> str:
    """Return the text in a file; ValueError for none."""
    token = Path(path).read_text("utf-8").strip()
    expect(token, path, "a token", "an empty file")
    return token


def add_index_follow(inner: Any) -> None:
    """Add `index follow` to the commands of `index`."""
    one = shared.add_command(inner, "follow", run_index_follow)
    shared.add_checkpoint(one, required=True)
    one.add_argument("--stream", required=True, metavar="URL", help=FORM)
    text = "JSON of settings of the client, such as passwords"
    one.add_argument("--stream-options", action=Value, make=shared.read_json, metavar="FILE", help=text)
    one.add_argument("--until-idle", action="store_true", help="end when nothing comes for a second")
    text = "serve counters, lag and age for Prometheus there, at /metrics"
    one.add_argument("--metrics", type=_address, metavar="[HOST:]PORT", help=text)
    shared.add_quiet(one)
    one.add_argument("--directory", type=Path, required=True, help="folder of snapshots; resumes from its newest")
    one.add_argument("--index", type=Path, help="folder of the index to start from, where the directory has no snapshot")
    text = "where snapshots are published, such as s3://BUCKET/PATH; settings: AWS_ACCESS_KEY_ID and other variables"
    one.add_argument("--store", metavar="URL", help=text)
    one.add_argument("--every-seconds", type=float, default=60.0, help="seconds between two snapshots (default: %(default)s)")


def run_index_follow(options: argparse.Namespace) -> tuple[int, Any]:
    """Apply an update stream to an index until SIGTERM or SIGINT. Resumable: run the same command again."""
    trained = open_model(options.checkpoint)
    with shared.as_usage("--stream"):
        stream = open_stream(options.stream, options.stream_options)
    store = None if options.store is None else SnapshotStore(options.store)
    with contextlib.closing(stream):
        with _writer(trained, options) as writer, shared.stop_requested() as told:
            follower = Follower(stream, writer, store=store)
            serving = contextlib.nullcontext() if options.metrics is None else exposed(follower.metrics, *options.metrics)
            with serving, track(label="follow", unit="messages") as bar:
                while not told():
                    count = follower.step(1.0)
                    bar.update(count)
                    if options.until_idle and not count:
                        break
        follower.flush()
    return FINE, follower.metrics()


def _writer(trained: Trained, options: argparse.Namespace) -> IndexWriter:
    """Return the writer of the directory: resumed, or started from a saved index."""
    every: dict[str, Any] = {"every_updates": None, "every_seconds": options.every_seconds}
    if snapshots(options.directory):
        return IndexWriter.resume(options.directory, trained, **every)
    if options.index is None:
        raise UsageError(f"follow: expected --index, to start from, got none, and {options.directory} has no snapshot")
    index, positions = ItemIndex.load(options.index, trained), read_manifest(options.index).positions
    return IndexWriter.start(options.directory, index, positions=positions, **every)


def _address(text: str) -> tuple[int, str]:
    """Return port and host of an option."""
    host, _, port = text.rpartition(":")
    return int(port), host or "127.0.0.1"


def add_snapshot_commands(commands: Any) -> None:
    """Add the commands to what `add_subparsers` returned."""
    text = "Looks into a snapshot store, publishes into it and fetches from it. Settings of S3: AWS_ACCESS_KEY_ID and others."
    inner = commands.add_parser("snapshots", help=text, description=text).add_subparsers(required=True)
    for name, run in (("list", run_list), ("publish", run_publish), ("fetch", run_fetch)):
        one = shared.add_command(inner, name, run)
        one.add_argument("url", help="the store, such as s3://BUCKET/PATH, or a local path")
        if run is run_publish:
            one.add_argument("folder", type=Path, help="an export, or a snapshot of an index")
            shared.add_flags(one, SnapshotStore, ["keep"])
        if run is run_fetch:
            one.add_argument("directory", type=Path, help="local folder, made where it is missing")
            shared.add_flags(one, SnapshotStore.fetch, ["name"])


def run_list(options: argparse.Namespace) -> tuple[int, Any]:
    """Print the names of all complete snapshots, oldest first, and of the current one as JSON."""
    with shared.open_store(options.url) as store:
        return FINE, {"current": store.current(), "snapshots": store.names()}


def run_publish(options: argparse.Namespace) -> tuple[int, Any]:
    """Upload and verify a folder, make it current and print its name; remove old snapshots, down to --keep, and torn ones."""
    folder, expected = options.folder, "an export, or a snapshot of an index"
    if folder.is_dir():  # a service would take it over, and a rollback go onto it
        expect((folder / MANIFEST).is_file(), str(folder), expected, f"a folder without {MANIFEST}", error=UsageError)
    with shared.open_store(options.url, **shared.flags_given(options, ["keep"])) as store:
        return FINE, store.publish(folder)


def run_fetch(options: argparse.Namespace) -> tuple[int, Any]:
    """Download a snapshot and check every file. Prints the local folder."""
    with shared.open_store(options.url) as store:
        return FINE, str(store.fetch(options.directory, **shared.flags_given(options, ["name"])))
