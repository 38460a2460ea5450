"""The commands that follow update streams: `index follow`, `users follow`."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from aif_jax import index
from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, UsageError
from aif_jax.connectors import (
    EventLayout,
    Follower,
    IndexTarget,
    SinkTarget,
    SnapshotStore,
    Target,
    UserTarget,
    ValkeyFeatureWriter,
)
from aif_jax.connectors.connect import FORMS, open_client, open_stream
from aif_jax.export.opening import open as open_model
from aif_jax.index import STORAGES, IndexWriter, ItemIndex
from aif_jax.output.progress import Bar
from aif_jax.serving.metrics import exposed
from aif_jax.store.snapshots import snapshots
from aif_jax.store.trained import Trained
from aif_jax.user_table import RemoteRows, UserTable, UserTableWriter

SHOWN = 1.0  # seconds between two looks at lag and age for the progress bar


def add_index_follow(inner: Any) -> None:
    """Adds `index follow` to the commands of `index`."""
    one = shared.add_command(inner, "follow", run_index_follow)
    _add_stream(one)
    one.add_argument("--directory", type=Path, required=True, help="of snapshots; goes on with the newest one there")
    one.add_argument("--index", type=Path, help="folder of the index to start from, where the directory has no snapshot")
    _add_snapshots(one)


def add_users_follow(inner: Any) -> None:
    """Adds `users follow` to the commands of `users`."""
    one = shared.add_command(inner, "follow", run_users_follow)
    _add_stream(one)
    where = one.add_mutually_exclusive_group(required=True)
    text = "keep the table in this process, with snapshots there; goes on with the newest one"
    where.add_argument("--directory", type=Path, help=text)
    where.add_argument("--rows", metavar="URL", help="keep the rows of the table in Valkey or Redis, redis://HOST:PORT")
    where.add_argument("--features", metavar="URL", help="append the raw events to a feature store in Valkey or Redis")
    text = "JSON of arguments of `redis.Redis` for --rows or --features, such as passwords"
    one.add_argument("--server-options", type=Path, metavar="FILE", help=text)
    one.add_argument("--prefix", default="aif", help="of every key of --rows or --features (default: %(default)s)")
    text = "events of a user that the feature store keeps (default: the model's history)"
    one.add_argument("--length", type=int, metavar="NUMBER", help=text)
    text = "consumers of this group share the partitions of a Kafka topic; with --rows or --features"
    one.add_argument("--group", metavar="NAME", help=text)
    start = one.add_mutually_exclusive_group()
    start.add_argument("--table", type=Path, help="folder of the table to start from, where --directory has no snapshot")
    start.add_argument("--empty", action="store_true", help="start without users there: the stream holds every event")
    text = "of matrices in a row, for --rows or --empty (default: %(default)s)"
    one.add_argument("--storage", choices=STORAGES, default="float32", help=text)
    _add_snapshots(one)


def run_index_follow(options: argparse.Namespace) -> int:
    """Applies an update stream to an index until it is told to end (SIGTERM, SIGINT); killed and called again, it goes on."""
    trained = open_model(options.checkpoint)
    shared.encoder_of(options.checkpoint, trained)
    stream, store, every = _stream(options), _store(options), _every(options)
    if snapshots(options.directory):
        writer = IndexWriter.resume(options.directory, trained, takeover=options.takeover, **every)
    elif options.index is None:
        raise UsageError(f"index follow: {options.directory} has no snapshot; expected --index, to start from")
    else:
        loaded = ItemIndex.load(options.index, trained)
        writer = IndexWriter.start(options.directory, loaded, positions=index.inspect(options.index).positions, **every)
    return _follow(stream, IndexTarget(writer), options, writer=writer, store=store)


def run_users_follow(options: argparse.Namespace) -> int:
    """Applies a stream of users' events to a user table or a feature store until it is told to end (SIGTERM, SIGINT).

    Killed and called again, it goes on; events that are in already count once.
    """
    remote = options.rows or options.features
    if options.group is not None and not remote:
        raise UsageError(
            "users follow: expected --group with --rows or --features; a table in this process needs every partition"
        )
    if remote and (options.table or options.empty or options.store):
        raise UsageError("users follow: expected --table, --empty and --store with --directory alone")
    trained = open_model(options.checkpoint)
    encoder = shared.encoder_of(options.checkpoint, trained)
    if not remote:
        stream, store = _stream(options), _store(options)
        writer = _table_writer(options, trained)
        return _follow(stream, UserTarget(writer), options, writer=writer, store=store)
    with shared.as_usage("--rows" if options.rows else "--features"):
        client = open_client(remote, shared.read_json(options.server_options, "--server-options"))
    with contextlib.closing(client):
        if options.rows:
            sink: Any = UserTable(trained, storage=options.storage)
            version, width = trained.version, sink.row_bytes // 4
            sink.rows = RemoteRows(client, version=version, width=width, prefix=options.prefix)
        else:
            length = options.length or trained.config.history_length
            user, layout = encoder.columns.user, EventLayout.of(encoder)
            sink = ValkeyFeatureWriter(client, layout, user=user, length=length, prefix=options.prefix)
        return _follow(_stream(options), SinkTarget(sink), options)


def _table_writer(options: argparse.Namespace, trained: Trained) -> UserTableWriter:
    """The writer of the directory: resumed, or started from a saved or an empty table."""
    every = _every(options)
    if snapshots(options.directory):
        return UserTableWriter.resume(options.directory, trained, takeover=options.takeover, **every)
    if options.table is not None:
        table = UserTable.load(options.table, trained)
        positions = UserTable.inspect(options.table).positions
        return UserTableWriter.start(options.directory, table, positions=positions, **every)
    if not options.empty:
        raise UsageError(f"users follow: {options.directory} has no snapshot; expected --table, to start from, or --empty")
    table = UserTable(trained, storage=options.storage)
    return UserTableWriter.start(options.directory, table, **every)


def _follow(stream: Any, target: Target, options: argparse.Namespace, *, writer: Any = None, store: Any = None) -> int:
    """Steps until the process is told to end, or nothing comes; then saves, publishes and prints the metrics as JSON."""
    shown = 0.0
    with contextlib.closing(stream):
        with writer or contextlib.nullcontext(), shared.told_to_end() as told:
            follower = Follower(stream, target, store=store)
            serving = contextlib.nullcontext() if options.metrics is None else exposed(follower.metrics, *options.metrics)
            with serving, Bar(label="follow", unit="messages", show=not options.quiet) as bar:
                while not told():
                    count = follower.step(1.0)
                    bar.update(count)
                    if not options.quiet and time.monotonic() - shown > SHOWN:
                        gauges, shown = follower.metrics()["gauges"], time.monotonic()
                        bar.note(lag=gauges["stream_lag"], age=f"{gauges['stream_age_seconds']:.1f} s")
                    if options.until_idle and not count:
                        break
        follower.flush()
        print(json.dumps(follower.metrics()))
    return FINE


def _add_stream(one: argparse.ArgumentParser) -> None:
    shared.add_checkpoint(one, required=True)
    one.add_argument("--stream", required=True, metavar="URL", help=FORMS)
    one.add_argument("--stream-options", type=Path, metavar="FILE", help="JSON of settings of the client, such as passwords")
    one.add_argument("--until-idle", action="store_true", help="end when nothing comes for a second")
    text = "serve counters, lag and age for Prometheus there, at /metrics"
    one.add_argument("--metrics", type=_address, metavar="[HOST:]PORT", help=text)
    one.add_argument("--quiet", action="store_true", help="no progress, lag and age on stderr")


def _add_snapshots(one: argparse.ArgumentParser) -> None:
    text = "where snapshots are published, such as s3://BUCKET/PATH; settings are those of the environment"
    one.add_argument("--store", metavar="URL", help=text)
    one.add_argument("--every-seconds", type=float, default=60.0, help="between two snapshots (default: %(default)s)")
    one.add_argument("--takeover", action="store_true", help="take the directory from a writer that hangs")


def _address(text: str) -> tuple[int, str]:
    """Port and host of an option."""
    host, _, port = text.rpartition(":")
    return int(port), host or "127.0.0.1"


def _stream(options: argparse.Namespace) -> Any:
    settings = shared.read_json(options.stream_options, "--stream-options")
    with shared.as_usage("--stream"):
        return open_stream(options.stream, settings, group=getattr(options, "group", None))


def _store(options: argparse.Namespace) -> SnapshotStore | None:
    return None if options.store is None else SnapshotStore(options.store)


def _every(options: argparse.Namespace) -> dict[str, Any]:
    return {"every_updates": None, "every_seconds": options.every_seconds}
