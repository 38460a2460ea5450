"""The commands of production: `serve`, `index follow`, `snapshots list`, `snapshots publish` and `snapshots fetch`."""

import contextlib
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from aif_jax.checks import expect
from aif_jax.cli import options
from aif_jax.cli.options import FINE, FLAGS, PROBLEMS, Result, UsageError
from aif_jax.connectors import Follower, KafkaStream
from aif_jax.export.consume.files import MANIFEST
from aif_jax.export.contents import open as open_model
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.index import inspect as read_manifest
from aif_jax.index.writer import snapshots
from aif_jax.output import track
from aif_jax.service import process
from aif_jax.service.core import Service
from aif_jax.service.log import RequestLog
from aif_jax.service.models import Models
from aif_jax.service.process import Listening
from aif_jax.serving import ServingConfig, compute_inline
from aif_jax.serving.metrics import registry_of
from aif_jax.store.folders import URL

PATIENCE = 30  # seconds that `index follow --until-idle` waits for what a stream has and does not give


def serve(
    folder: str,
    /,
    *,
    mirror_folder: Annotated[Path | None, Parameter("--mirror")] = None,
    serving: ServingConfig = ServingConfig(),
    keep: int = 2,
    poll: float = 1.0,
    index: Path | None = None,
    features: str | None = None,
    log: Path | None = None,
    log_share: float = 1.0,
    token_file: Path | None = None,
    where: Annotated[Listening, FLAGS] = Listening(),
    log_level: Literal["debug", "info", "warning", "error"] = "info",
) -> Result:
    """Serve an exported model over HTTP until SIGTERM; prints its address as JSON when it is ready.

    Args:
      folder: export; or folder of exports with the file `current` of service.current.publish; or URL of a store of exports.
      mirror_folder: local folder for the exports of a store.
      serving: config of every engine; its orders come on top of those of the export.
      keep: versions in memory that callers may name.
      poll: seconds between two looks at `current` and at the store.
      index: folder of snapshots of `aif-jax index follow` or `snapshots fetch`, or of such folders named like the exports.
        Default: the export's index.
      features: object with async get(user), or a function that makes one, as MODULE:NAME, for calls that bring a user id alone.
        Default: calls bring the features.
      log: folder of the request log, Parquet files. Default: no log.
      log_share: share of the calls that are logged, 0 to 1.
      token_file: file with the bearer token that calls must bring, but for / and /health. Default: no token.
      log_level: level of the log on stderr.
    """
    compute_inline()
    is_store = URL.match(folder) is not None
    fits, got = is_store == (mirror_folder is not None), f"{folder} and --mirror {mirror_folder}"
    expect(fits, "serve", "a folder, or the URL of a store, file:///PATH on disk, and --mirror", got, error=UsageError)
    expect(log or log_share == 1, "--log-share", "--log DIR, to which calls are logged", "no --log", error=UsageError)
    root = mirror_folder or Path(folder)
    expect(is_store or root.is_dir(), str(root), "an exported folder", "none; write: aif-jax export", error=FileNotFoundError)
    with options.as_usage("--token-file"):
        token = None if token_file is None else token_file.read_text("utf-8").strip()
        expect(token is None or len(token.split()) == 1, str(token_file), "a token", "an empty file, or several words")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("aif_jax").setLevel(log_level.upper())
    logging.captureWarnings(True)
    with options.as_usage("--features"):
        source = None if features is None else process.source_of(features)
    store = options.open_store(folder) if is_store else None  # credentials: from the environment
    models = Models(root, source=source, store=store, config=serving, keep=keep, poll=poll, index=index)
    with contextlib.closing(RequestLog(log, share=log_share)) if log else contextlib.nullcontext() as calls:
        process.serve(Service(models, observers=(calls,) if calls else ()), where, token)
    return FINE, None


def index_follow(
    *,
    checkpoint: Path,
    stream: str,
    stream_options: Path | None = None,
    directory: Path,
    index: Path | None = None,
    store: str | None = None,
    every_seconds: float = 60.0,
    until_idle: bool = False,
    metrics: str | None = None,
) -> Result:
    """Apply an update stream to an index until SIGTERM or SIGINT. Resumable: run the same command again.

    Args:
      checkpoint: folder of a checkpoint or an export, or the --out of train.
      stream: kafka://HOST:PORT/TOPIC.
      stream_options: JSON file of settings of the client, such as passwords.
      directory: folder of snapshots; resumes from its newest.
      index: folder of the index to start from, where the directory has no snapshot.
      store: where snapshots are published, such as s3://BUCKET/PATH; settings: AWS_ACCESS_KEY_ID and other variables.
      every_seconds: seconds between two snapshots.
      until_idle: end when all is read; with exit code 1 when nothing comes for 30 s and more is left.
      metrics: [HOST:]PORT where counters, lag and age are served for Prometheus, at /metrics.
    """
    trained = open_model(checkpoint)
    host, _, port = (metrics or "").rpartition(":")
    expect(metrics is None or port.isdecimal(), "--metrics", "[HOST:]PORT", metrics, error=UsageError)
    at = (int(port), host or "127.0.0.1") if metrics else None
    with options.as_usage("--stream"):
        updates = KafkaStream(stream, options=stream_options and options.read_json(stream_options))
    target = None if store is None else options.open_store(store)
    with contextlib.closing(updates), contextlib.ExitStack() as scrapes:
        if snapshots(directory):
            held = IndexWriter.resume(directory, trained, every_updates=None, every_seconds=every_seconds)
        elif index is None:
            raise UsageError(f"follow: expected --index, to start from, got none, and {directory} has no snapshot")
        else:
            given: dict[str, Any] = {"positions": read_manifest(index).positions, "every_seconds": every_seconds}
            held = IndexWriter.start(directory, ItemIndex.load(index, trained), every_updates=None, **given)
        with held as writer, options.stop_requested() as told:
            follower = Follower(updates, writer, store=target)
            if at is not None:
                client, registry = registry_of(lambda: [({}, follower.metrics())])
                server, _ = client.start_http_server(*at, registry)
                scrapes.enter_context(server)
                scrapes.callback(server.shutdown)
            with track(label="follow", unit="messages") as bar:
                idle = 0
                while not told() and not (until_idle and idle and (idle == PATIENCE or not any(updates.lag.values()))):
                    count = follower.step(1.0)
                    bar.update(count)
                    idle = 0 if count else idle + 1
        fine = follower.flush() and not (until_idle and idle >= PATIENCE)
    return FINE if fine else PROBLEMS, follower.metrics()


def snapshots_list(url: str, /) -> Result:
    """Print the names of all complete snapshots, oldest first, and of the current one as JSON.

    Args:
      url: the store, such as s3://BUCKET/PATH, or a local path.
    """
    store = options.open_store(url)
    return FINE, {"current": store.current(), "snapshots": store.names()}


def snapshots_publish(url: str, folder: Path, /, *, keep: int = 3) -> Result:
    """Upload and verify a folder, make it current and print its name; remove old snapshots, down to --keep, and torn ones.

    Args:
      url: the store, such as s3://BUCKET/PATH, or a local path.
      folder: an export, or a snapshot of an index.
      keep: how many snapshots stay, the current one among them.
    """
    expected = "an export, or a snapshot of an index"
    if folder.is_dir():  # a service would take it over, and a rollback go onto it
        expect((folder / MANIFEST).is_file(), str(folder), expected, f"a folder without {MANIFEST}", error=UsageError)
    return FINE, options.open_store(url, keep=keep).publish(folder)


def snapshots_fetch(url: str, directory: Path, /, *, name: str | None = None, keep: int | None = None) -> Result:
    """Download a snapshot and check every file. Prints the local folder.

    Args:
      url: the store, such as s3://BUCKET/PATH, or a local path.
      directory: local folder, made where it is missing.
      name: name of the snapshot. Default: the current one.
      keep: how many fetched snapshots stay, those fetched last. Default: all.
    """
    return FINE, str(options.open_store(url).fetch(directory, name=name, keep=keep))


COMMANDS = (serve, index_follow, snapshots_list, snapshots_publish, snapshots_fetch)
