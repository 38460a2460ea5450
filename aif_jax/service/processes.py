"""The processes of a service: one, or several that share its ports, started, watched and drained together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aif_jax.checks import expect
from aif_jax.output import hidden
from aif_jax.service.core import Policy, Service
from aif_jax.service.inference import InferenceRest
from aif_jax.service.log import RequestLog
from aif_jax.service.models import Models
from aif_jax.service.process import Listening, bind, run
from aif_jax.serving import ServingConfig
from aif_jax.sharding.processes import end_with

logger = logging.getLogger(__name__)
WORKER = "AIF_JAX_SERVE_WORKER"  # in the environment of a worker: "port,process that watches it"
RESTARTS = 5  # of workers that died within `RESTART_SECONDS`; with more, something is wrong with all of them
RESTART_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Everything that a process needs to serve.

    Attributes:
      folder: an exported folder, or exports with a file `current` that says which serve.
      only: the one folder to serve, whatever `current` says; None: as `current` says.
      keep: versions in memory that callers may name.
      poll: seconds between two looks at `current`.
      config: config of the engines.
      policy: policy of the service.
      where: to listen.
      index: folder of index snapshots that `aif-jax index follow` writes, or a folder of such folders, named like the exports;
        None: the export's index.
      features: object with `async get(user)`, or a function that makes one, as MODULE:NAME, for calls that bring a user id
        alone; None: calls bring the features.
      features_timeout: seconds for one read of `features`; None: ServingConfig.callable_timeout.
      log: folder of the request log, Parquet files; None: no log.
      log_share: share of the calls that are logged, 0 to 1.

    Raises:
      ValueError: numbers out of range.
    """

    folder: Path
    config: ServingConfig = ServingConfig()
    policy: Policy = Policy()
    where: Listening = Listening()
    only: str | None = None
    keep: int = 2
    poll: float = 1.0
    index: Path | None = None
    features: str | None = None
    features_timeout: float | None = None
    log: Path | None = None
    log_share: float = 1.0

    def __post_init__(self):
        expect(self.keep >= 1, "keep", "at least 1", self.keep)
        expect(self.poll > 0, "poll", "more than 0 seconds", self.poll)
        expect((limit := self.features_timeout) is None or limit > 0, "features_timeout", "None or more than 0 seconds", limit)
        expect(0 <= self.log_share <= 1, "log_share", "0 to 1", self.log_share)


def serve(settings: ServiceSettings, *, workers: int = 1) -> None:
    """Serves until SIGTERM or SIGINT, in `workers` processes of this command line; RuntimeError where they keep dying."""
    ports = os.environ.get(WORKER)
    if ports is not None:
        http_port, watcher = ports.split(",")
        end_with(int(watcher), lambda: os.kill(os.getpid(), signal.SIGTERM))  # which drains
        where = dataclasses.replace(settings.where, http_port=int(http_port), reuse_port=True)
        settings = dataclasses.replace(settings, where=where)
    if workers == 1 or ports is not None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(run_one(settings))
    else:
        supervise(settings.where, workers)


def loop_factory() -> Any:
    """Makes uvloop's event loop, where it is installed: HTTP takes half the time of asyncio's. None for asyncio's."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def is_worker() -> bool:
    """Whether this process is a worker of another one that watches it."""
    return WORKER in os.environ


async def run_one(settings: ServiceSettings) -> None:
    """One process."""
    where = settings.where
    bind(where.host, where.http_port, reuse=where.reuse_port).close()  # found taken before anything is compiled
    models = Models(
        settings.folder, config=settings.config, only=settings.only, keep=settings.keep, poll=settings.poll,
        source=None if settings.features is None else source_of(settings.features), index=settings.index,
        source_timeout=settings.features_timeout,
    )  # fmt: skip
    log = None if settings.log is None else RequestLog(settings.log, share=settings.log_share)
    service = Service(models, policy=settings.policy, observers=() if log is None else (log,))
    try:
        with hidden():  # its log says what is compiled
            await run(service, where, routes=routes(service))
    finally:
        if log is not None:
            await asyncio.to_thread(log.close)


def routes(service: Service) -> dict[str, Any]:
    """HTTP routes in addition to those of `App`."""
    return {"/v2": InferenceRest(service)}


def source_of(name: str) -> Any:
    """The feature source at "MODULE:NAME". Raises ValueError for a name that leads to none."""
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--features {name}: expected MODULE:NAME of a feature source: {error}") from error
    source = found if hasattr(found, "get") and not isinstance(found, type) else found()
    good = callable(getattr(source, "get", None))
    expect(good, f"--features {name}", "an object with `async get(user)`", type(source).__name__)
    return source


def supervise(where: Listening, workers: int) -> None:
    """Starts worker processes on the same port, restarts those that die, and hands signals on to them."""
    # Bound and never listened to: the port stays taken between two workers, and a free port is chosen once.
    held = bind(where.host, where.http_port, reuse=True)
    environment = os.environ | {WORKER: f"{held.getsockname()[1]},{os.getpid()}"}
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "aif_jax", *sys.argv[1:]], env=environment)

    processes: list[subprocess.Popen[bytes]] = []
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    died: list[float] = []
    try:
        while len(processes) < workers and not stopping:
            processes.append(start())
        if stopping:  # while one of them started
            stop(0, None)
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            for at, process in enumerate(processes):
                if stopping or process.poll() is None:
                    continue
                if process.returncode == 2:  # the exit code of a command that cannot start: it has said why
                    stop(0, None)
                    sys.exit(2)
                died = [when for when in died if time.monotonic() - when < RESTART_SECONDS] + [time.monotonic()]
                if len(died) > RESTARTS:
                    stop(0, None)
                    raise RuntimeError(
                        f"serve: {len(died)} workers died within {RESTART_SECONDS:.0f} s, last code {process.returncode}"
                    )
                logger.error("worker %d ended with code %d: restarted", process.pid, process.returncode)
                processes[at] = start()
                if stopping:
                    stop(0, None)
    finally:
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        held.close()
