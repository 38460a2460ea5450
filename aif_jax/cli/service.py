"""The commands of the service: `serve`, `replay`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aif_jax.cli import options as shared
from aif_jax.cli.options import FINE, UsageError
from aif_jax.service.calls import Limits
from aif_jax.service.core import Policy, to_json
from aif_jax.service.exports import Mirror
from aif_jax.service.log import replay
from aif_jax.service.nearline import Nearline
from aif_jax.service.process import Listening, log_to_stderr
from aif_jax.service.processes import ServiceSettings, is_worker, serve
from aif_jax.serving import ServingConfig
from aif_jax.store.folders import URL

SERVERS = ("redis://", "rediss://", "unix://")
SERVING = [field.name for field in dataclasses.fields(ServingConfig)]


def add_service_commands(commands: Any) -> None:
    """Adds the commands to what `add_subparsers` returned."""
    one = shared.add_command(commands, "serve", run_serve)
    text = "exported folder, or exports with a file `current` that says which serve, or URL of a snapshot store of exports"
    one.add_argument("folder", help=text)
    one.add_argument("--mirror", type=Path, metavar="DIR", help="local folder for the exports of a store")
    one.add_argument(
        "--host", default="127.0.0.1", help="address to bind; others can reach only what you bind to (default: %(default)s)"
    )
    one.add_argument("--port", type=int, default=8080, help="of HTTP; 0 takes a free one (default: %(default)s)")
    one.add_argument("--grpc-port", type=int, help="of gRPC; 0 takes a free one (default: no gRPC)")
    one.add_argument("--version", metavar="NAME", help="the one folder to serve, whatever `current` says")
    one.add_argument("--keep", type=int, default=2, help="versions in memory that callers may name (default: %(default)s)")
    one.add_argument("--poll", type=float, default=1.0, help="seconds between two looks at `current` (default: %(default)s)")
    text = "fields of ServingConfig in JSON, such as buckets=[128,1024] max_k=300 budget=0.05: " + ", ".join(SERVING)
    one.add_argument("--serving", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    text = "object with `async get(user)`, or a function that makes one, as MODULE:NAME, for calls that bring a user id alone"
    one.add_argument("--features", metavar="MODULE:NAME", help=text)
    one.add_argument("--features-timeout", type=float, metavar="SECONDS", help="for one read of --features (default: no bound)")
    text = (
        "folder of index snapshots that `aif-jax index follow` writes, of the one version or one in it for each export's name"
    )
    one.add_argument("--index", type=Path, metavar="DIR", help=text)
    text = "rows of users for calls that bring an id alone: folder of snapshots of a UserTable, as for --index, or redis:// URL"
    one.add_argument("--user-table", metavar="DIR", help=text)
    one.add_argument("--log", type=Path, metavar="DIR", help="folder of the request log, Parquet files (default: none)")
    one.add_argument("--log-share", type=float, default=1.0, help="of the calls that are logged (default: %(default)s)")
    text = "folder whose version scores a share of the calls too, for comparison; `current` names it with share=0"
    one.add_argument("--shadow", metavar="NAME", help=text)
    one.add_argument("--shadow-share", type=float, default=0.1, help="of the calls (default: %(default)s)")
    text = "write OpenTelemetry spans to the tracer provider of the process, as `opentelemetry-instrument` sets it up"
    one.add_argument("--traces", action="store_true", help=text)
    one.add_argument("--max-age", type=float, help="seconds since its export after which a model is stale (default: no bound)")
    one.add_argument("--max-index-age", type=float, help="the same for the index, since it was written")
    one.add_argument("--max-user-age", type=float, help="the same for the rows of --user-table, since they were written")
    text = "mark the answers of a stale model, index or table as degraded, or refuse to answer (default: %(default)s)"
    one.add_argument("--when-stale", choices=("degrade", "refuse"), default="degrade", help=text)
    one.add_argument("--max-bytes", type=int, default=Limits.body_bytes, help="of one call (default: %(default)s)")
    one.add_argument("--max-candidates", type=int, default=Limits.candidates, help="of one call (default: %(default)s)")
    one.add_argument(
        "--token-file", type=Path, help="file with the bearer token that every call must bring (default: no token)"
    )
    one.add_argument("--certificate", type=Path, help="PEM file for TLS, with --key")
    one.add_argument("--key", type=Path, help="PEM file of the certificate's private key")
    one.add_argument("--workers", type=int, default=1, help="processes that share the ports (default: %(default)s)")
    text = (
        "seconds after which an idle HTTP connection is closed, more than your load balancer keeps one (default: %(default)s)"
    )
    one.add_argument("--keep-alive", type=int, default=Listening.keep_alive, help=text)
    one.add_argument("--drain-delay", type=float, default=0.0, help="seconds unready before the end of listening (default: 0)")
    one.add_argument("--drain-timeout", type=float, default=10.0, help="seconds for calls in flight after that (default: 10)")
    one.add_argument("--log-form", choices=("text", "json"), default="text", help="of the log on stderr (default: %(default)s)")
    one.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: %(default)s)"
    )

    one = shared.add_command(commands, "replay", run_replay)
    one.add_argument("log", type=Path, help="file or folder that `serve --log` wrote")
    one.add_argument("--model", type=Path, required=True, help="exported folder that scores the log again")
    one.add_argument("--limit", type=int, help="records to read at most (default: all)")
    one.add_argument("--serving", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of ServingConfig, as for serve")
    one.add_argument("--json", action="store_true", help="print the report as JSON")


def run_serve(options: argparse.Namespace) -> int:
    """Serves an exported model over HTTP and gRPC until SIGTERM; prints its addresses as JSON when it is ready."""
    is_store = URL.match(options.folder) is not None
    if is_store != (options.mirror is not None):
        raise UsageError("serve: expected --mirror with the URL of a store, and only then")
    folder = options.mirror if is_store else Path(options.folder)
    if not is_store and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected an exported folder, got none")
    fields = shared.read_fields(options.serving, "--serving", SERVING)
    with shared.as_usage("serve"):
        config = ServingConfig(**fields)
        limits = Limits(body_bytes=options.max_bytes, candidates=options.max_candidates)
        policy = Policy(
            limits=limits, max_age=options.max_age, max_index_age=options.max_index_age, max_user_age=options.max_user_age,
            when_stale=options.when_stale,
        )  # fmt: skip
        where = Listening(
            host=options.host, http_port=options.port, grpc_port=options.grpc_port, token=_token(options.token_file),
            certificate=options.certificate, key=options.key, keep_alive=options.keep_alive,
            drain_delay=options.drain_delay, drain_timeout=options.drain_timeout,
        )  # fmt: skip
    if options.max_user_age is not None and options.user_table is None:
        raise UsageError("serve: expected --user-table with --max-user-age")
    if options.workers < 1 or options.keep < 1 or not options.poll > 0:
        raise UsageError("serve: expected --workers and --keep of at least 1 and a --poll above 0")
    if options.features_timeout is not None and not options.features_timeout > 0:
        raise UsageError(f"--features-timeout: expected more than 0 seconds, got {options.features_timeout}")
    log_to_stderr(options.log_form, options.log_level)
    settings = ServiceSettings(
        folder=folder, config=config, policy=policy, where=where, only=options.version, keep=options.keep,
        poll=options.poll, features=options.features, features_timeout=options.features_timeout, log=options.log,
        log_share=options.log_share, shadow=options.shadow, shadow_share=options.shadow_share, traces=options.traces,
        nearline=Nearline(index=options.index, users=_users(options)),
    )  # fmt: skip
    with contextlib.nullcontext() if not is_store or is_worker() else _mirror(options):
        serve(settings, workers=options.workers)
    return FINE


@contextlib.contextmanager
def _mirror(options: argparse.Namespace) -> Iterator[None]:
    """Keeps the local folder like the store, in the process that watches the workers; credentials come from the environment."""
    with shared.open_store(options.folder) as store:
        mirror = Mirror(store, options.mirror, poll=options.poll)
        mirror.update()
    with mirror:
        yield


def run_replay(options: argparse.Namespace) -> int:
    """Scores a request log with another version: features that differ, overlap of the rankings, differences of the scores."""
    fields = shared.read_fields(options.serving, "--serving", SERVING)
    with shared.as_usage("--serving"):
        config = ServingConfig(**fields)
    report = replay(options.log, options.model, config=config, limit=options.limit)
    print(json.dumps(to_json(report.to_json())) if options.json else report)
    return FINE


def _users(options: argparse.Namespace) -> Path | str | None:
    users = options.user_table
    if users is None or users.startswith(SERVERS):
        return users
    if URL.match(users):
        raise UsageError(f"--user-table {users}: expected a folder or one of {', '.join(SERVERS)}")
    return Path(users)


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    token = path.read_text("utf-8").strip()
    if not token:
        raise UsageError(f"--token-file {path}: expected a token, got an empty file")
    return token
