"""The commands of the service: `serve`, `replay`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import expect
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
FLAGS: dict[type, Mapping[str, str]] = {
    ServiceSettings: {"only": "version"}
    | {name: name for name in ("keep", "poll", "features", "features_timeout", "log", "log_share", "shadow", "shadow_share")}
    | {"traces": "traces"},
    Nearline: {"index": "index", "users": "user_table"},
    Policy: {name: name for name in ("max_age", "max_index_age", "max_user_age", "when_stale")},
    Limits: {"body_bytes": "max_bytes", "candidates": "max_candidates"},
    Listening: {"host": "host", "http_port": "port", "grpc_port": "grpc_port"}
    | {name: name for name in ("certificate", "key", "keep_alive", "drain_delay", "drain_timeout")},
}
"""Flags of `serve` by the field that each sets."""


def add_service_commands(commands: Any) -> None:
    """Adds the commands to what `add_subparsers` returned."""
    one = shared.add_command(commands, "serve", run_serve)
    text = "exported folder, or exports with a file `current` that says which serve, or URL of a snapshot store of exports"
    one.add_argument("folder", help=text)
    one.add_argument("--mirror", type=Path, metavar="DIR", help="local folder for the exports of a store")
    text = "fields of ServingConfig in JSON, such as buckets=[128,1024] max_k=300 budget=0.05: " + ", ".join(SERVING)
    one.add_argument("--serving", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    for owner, names in FLAGS.items():
        shared.add_flags(one, owner, names)
    text = "file with the bearer token that every call must bring (default: no token)"
    one.add_argument("--token-file", type=Path, help=text)
    one.add_argument("--workers", type=int, default=1, help="processes that share the ports (default: %(default)s)")
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
    given = {owner: shared.flags_given(options, names) for owner, names in FLAGS.items()}
    with shared.as_usage("serve"):
        config = ServingConfig(**shared.read_fields(options.serving, "--serving", SERVING))
        policy = Policy(limits=Limits(**given[Limits]), **given[Policy])
        where = Listening(token=_token(options.token_file), **given[Listening])
        nearline = Nearline(**given[Nearline] | {"users": _users(options)})
        own = given[ServiceSettings]
        settings = ServiceSettings(folder=folder, config=config, policy=policy, where=where, nearline=nearline, **own)
        if options.max_user_age is not None and options.user_table is None:
            raise UsageError("serve: expected --user-table with --max-user-age")
        expect(options.workers >= 1, "--workers", "at least 1", options.workers)
    log_to_stderr(options.log_form, options.log_level)
    with contextlib.nullcontext() if not is_store or is_worker() else _mirror(options, settings):
        serve(settings, workers=options.workers)
    return FINE


@contextlib.contextmanager
def _mirror(options: argparse.Namespace, settings: ServiceSettings) -> Iterator[None]:
    """Keeps the local folder like the store, in the process that watches the workers; credentials come from the environment."""
    with shared.open_store(options.folder) as store:
        mirror = Mirror(store, options.mirror, poll=settings.poll)
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
