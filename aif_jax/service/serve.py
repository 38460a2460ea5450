"""One process of a service: HTTP and gRPC on one event loop, ready after warm-up, drained on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import expect
from aif_jax.service.connection import bounded
from aif_jax.service.core import Service
from aif_jax.service.http import App, Handler

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening:
    """Where and how a process listens.

    Attributes:
      host: address to bind; the default is reachable from this machine alone.
      http_port: 0 takes a free one.
      grpc_port: 0 takes a free one; None serves no gRPC.
      token: bearer token that every call must bring; None for none.
      certificate, key: PEM files of TLS; None for none.
      reuse_port: several processes may listen on the ports.
      drain_delay: seconds between the end of readiness and the end of listening, for load balancers to notice.
      drain_timeout: seconds that calls in flight may take after that.
      connections: HTTP connections, and calls of gRPC, at once. With one more connection the one that has waited longest for
        its caller is closed; one more call gets 503 or RESOURCE_EXHAUSTED, and health is answered still.
      keep_alive: seconds after which an idle HTTP connection is closed: longer than a load balancer keeps one, or its calls
        meet connections that are being closed.

    Raises:
      ValueError: a certificate without a key, or the other way round; ports or seconds out of range.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    reuse_port: bool = False
    drain_delay: float = 0.0
    drain_timeout: float = 10.0
    connections: int = 1024
    keep_alive: int = 75

    def __post_init__(self):
        together = (self.certificate is None) == (self.key is None)
        expect(together, "TLS", "a certificate and its key", "one of them")
        for port in (self.http_port, self.grpc_port or 0):
            expect(0 <= port < 1 << 16, "port", "0 to 65535", port)
        expect(
            self.drain_delay >= 0 and self.drain_timeout >= 0,
            "drain",
            "0 seconds or more",
            (self.drain_delay, self.drain_timeout),
        )
        expect(
            self.connections >= 1 and self.keep_alive >= 1,
            "connections, keep_alive",
            "at least 1",
            (self.connections, self.keep_alive),
        )
        expect(self.token != "", "token", "None or some text", "none")


GrpcServer = Callable[[Service, Listening], Any]
"""Starts gRPC: `await server(service, listening)` returns (port, stop), `await stop(seconds)` ends it."""


@contextlib.asynccontextmanager
async def listening(
    service: Service, where: Listening, *, routes: Mapping[str, Handler] | None = None, grpc: Any = None
) -> AsyncIterator[dict[str, Any]]:
    """Serves a service that has started; yields the addresses, and drains at the end of the block.

    Args:
      service: that answers.
      where: to listen.
      routes: further HTTP routes, see `App`.
      grpc: `rpc.start`; None serves no gRPC.

    Raises:
      ImportError: uvicorn or grpc is missing; names the extra.
      OSError: a port is taken.
    """
    try:
        import uvicorn
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError as error:
        raise ImportError('a service needs uvicorn and httptools: pip install "aif_jax[service]"') from error

    class Quiet(uvicorn.Server):
        """Signals are those of the process, which drains."""

        @contextlib.contextmanager
        def capture_signals(self):
            yield

    bound = bind(where.host, where.http_port, reuse=where.reuse_port)
    secure: dict[str, Any] = {}
    if where.certificate is not None:
        secure = {"ssl_certfile": str(where.certificate), "ssl_keyfile": str(where.key)}
    server = Quiet(
        uvicorn.Config(
            App(service, token=where.token, more=routes, most=where.connections), ws="none", lifespan="off",
            http=bounded(HttpToolsProtocol, connections=where.connections), timeout_keep_alive=where.keep_alive,
            log_config=None, access_log=False, server_header=False, date_header=False, proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(where.drain_timeout)), **secure,
        )
    )  # fmt: skip
    stop_grpc: Any = None
    running = asyncio.get_running_loop().create_task(server.serve(sockets=[bound]))
    try:
        while not server.started:
            if running.done():
                running.result()
                raise OSError(f"{where.host}:{where.http_port}: the HTTP server did not start")
            await asyncio.sleep(0.005)
        scheme = "http" if where.certificate is None else "https"
        addresses: dict[str, Any] = {"http": f"{scheme}://{_shown(where.host)}:{bound.getsockname()[1]}"}
        if grpc is not None:
            port, stop_grpc = await grpc(service, where)
            addresses["grpc"] = f"{_shown(where.host)}:{port}"
        yield addresses
    finally:
        service.ready, service.draining = False, True
        if not running.done():
            await asyncio.sleep(where.drain_delay)
        if stop_grpc is not None:
            await stop_grpc(where.drain_timeout)
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        bound.close()


async def run(service: Service, where: Listening, *, routes: Mapping[str, Handler] | None = None, grpc: Any = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Prints one JSON line with the addresses when it is ready."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with service, listening(service, where, routes=routes, grpc=grpc) as addresses:
            print(json.dumps({"ready": True, **addresses}), flush=True)
            logger.info("ready: %s", addresses)
            await stop.wait()
            logger.info("draining")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def bind(host: str, port: int, *, reuse: bool) -> socket.socket:
    """A bound socket; OSError names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay only where the protocol is named; else a body waits 40 ms for an acknowledgement
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from None
    return bound


class JsonLines(logging.Formatter):
    """Log records as JSON, a line each."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        entry = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname, "logger": record.name}
        entry["message"] = record.getMessage()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_to_stderr(form: str, level: str) -> None:
    """Sends the log of the process to stderr, as "json" lines or as "text": this package's at a level, others' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("aif_jax").setLevel(level.upper())
    logging.captureWarnings(True)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
