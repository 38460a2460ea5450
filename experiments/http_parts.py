"""Where the time goes that a call over HTTP takes and the engine does not: sockets, uvicorn, our application, a cold process.

Claim     Our application takes half of what a call over HTTP adds, sockets and waking a core that has gone idle a fifth.
Command   python -m experiments.http_parts --json http_parts.json      (or --smoke; --help lists all)
Time      2 minutes on two cores
Load      of `experiments.service_load`: 1,000 candidates, k=300, cached users; one caller with a connection that stays open.
Ways      engine    the engine in this process
          http      `aif-jax serve` in another; `http_total_ms` is the stage `total` of its answers
          sockets, uvicorn   a process that takes the same bytes, is busy for as long as the engine, and answers with as many;
                    `_at_once`: is not busy
          app       `App` and `Service` in this process, less the stage `total` of their answers; `_at_once`: over a service
                    that has its answer, so in warm caches
Method    blocks of calls of each way in turn, since ways that alternate call by call cool each other's caches; medians.
Figures   `http_over_engine_ms` = `sockets_ms` + `uvicorn_ms` + `app_ms` + `engine_in_service_ms` + `not_found_ms`, where the
          first two are less the time busy, `uvicorn_ms` is less `sockets_ms`, and `engine_in_service_ms` is `http_total_ms`
          less `engine_ms`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.output import track
from aif_jax.service import tensors
from aif_jax.service.core import Service
from aif_jax.service.http import App
from aif_jax.service.models import Models
from aif_jax.serving import compute_inline
from experiments import common
from experiments.scale_out.replicas import NAMES
from experiments.service_clients import caller, packed
from experiments.service_load import SIZES, World, engine

Way = Callable[[int], Awaitable[Any]]


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the figures."""
    settings = SIZES | {
        "rounds": (10, 2, "blocks of each way"),
        "calls": (150, 5, "calls of a block"),
    }
    parser = common.parser(__doc__)
    parser.add_argument("--echo", nargs=3, metavar=("KIND", "SECONDS", "BYTES"), help="one process of sockets or uvicorn")
    options = common.options(parser, arguments, settings)
    if options.echo:
        return serve(options.echo[0], float(options.echo[1]), int(options.echo[2]))
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(Path(folder), options))
    common.report(figures, options.json)


async def measure(folder: Path, options: Any) -> dict[str, Any]:
    """All figures."""
    world, calls = World(folder / "models", options), folder / "calls"
    world.write(calls)
    bodies, totals = packed(calls, "http"), {"http": list[float](), "app": list[float]()}
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(world.serving())
        over_http = stack.enter_context(caller("http", service.address, bodies))
        size = len(over_http(0))
        async with engine(world) as rank, Service(Models(world.folder, config=world.config, only=NAMES[0])) as ours:
            app, ready = App(ours), App(Ready(ours, tensors.unpack(over_http(0))))  # type: ignore[arg-type]  # no engine

            async def http(user: int) -> None:
                totals["http"].append(float(tensors.unpack(over_http(user))["stages"]["total"]))

            async def through_app(user: int) -> None:
                totals["app"].append(float(tensors.unpack(await asgi(app, bodies[user]))["stages"]["total"]))

            ways: dict[str, Way] = {"engine": rank, "http": http, "app": through_app}
            ways["app_at_once"] = lambda user: asgi(ready, bodies[user])
            alone = float(np.median(await block(rank, 2 * options.calls)))
            for name, busy in (("", alone), ("_at_once", 0.0)):
                for kind in ("sockets", "uvicorn"):
                    address = stack.enter_context(echo(kind, busy, size))
                    ways[f"{kind}{name}"] = blocking(stack.enter_context(caller("http", address, bodies)))
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in track(range(options.rounds), label="blocks", unit="rounds"):
                for name in list(ways) if number % 2 else reversed(ways):
                    times[name] += await block(ways[name], options.calls)
    ms = {f"{name}_ms": 1e3 * float(np.median(each)) for name, each in times.items()}
    inside = {name: 1e3 * float(np.median(each)) for name, each in totals.items()}
    parts = {
        "sockets_ms": ms["sockets_ms"] - 1e3 * alone,
        "uvicorn_ms": ms["uvicorn_ms"] - ms["sockets_ms"],
        "app_ms": ms["app_ms"] - inside["app"],
        "engine_in_service_ms": inside["http"] - ms["engine_ms"],
    }
    over = ms["http_ms"] - ms["engine_ms"]
    at_once = {name: value for name, value in ms.items() if "at_once" in name}
    whole = {"engine_ms": ms["engine_ms"], "http_ms": ms["http_ms"], "http_total_ms": inside["http"]}
    return whole | {"http_over_engine_ms": over, **parts, "not_found_ms": over - sum(parts.values())} | at_once


async def block(way: Way, calls: int) -> list[float]:
    """Seconds of calls one after another; as many users before do not count."""
    found = []
    for number in range(-16, calls):
        start = time.perf_counter()
        await way(number % 16)
        if number >= 0:
            found.append(time.perf_counter() - start)
    return found


def blocking(call: Callable[[int], bytes]) -> Way:
    """A way that blocks the loop of this process, which has nothing else to do."""

    async def run(user: int) -> None:
        call(user)

    return run


class Ready:
    """A service that has its answer."""

    def __init__(self, service: Service, fields: dict[str, Any]):
        self.policy, self.models, self._fields = service.policy, service.models, fields

    async def fields(self, method: str, call: Any, batches: Any = None) -> dict[str, Any]:
        """The answer."""
        return self._fields | {"id": call.id}


async def asgi(app: App, body: bytes) -> bytes:
    """The answer of an application to one ranking."""
    sent: list[dict[str, Any]] = []
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(body)).encode())]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/v1/rank", "headers": headers}, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


@contextlib.contextmanager
def echo(kind: str, busy: float, size: int) -> Iterator[str]:
    """The address of a process that answers every call with so many bytes after so many busy seconds."""
    command = [sys.executable, "-m", "experiments.http_parts", "--echo", kind, str(busy), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def serve(kind: str, busy: float, size: int) -> None:
    """Such a process: prints its port, and answers until it is killed."""
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    length, body = (b"content-length", str(size).encode()), b"x" * size

    def work() -> None:
        end = time.perf_counter() + busy
        while time.perf_counter() < end:
            pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        work()
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    if kind == "uvicorn":
        import uvicorn

        settings: dict[str, Any] = dict(log_level="warning", lifespan="off", access_log=False, loop="uvloop", http="httptools")
        return uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[server])
    answer = b"HTTP/1.1 200 OK\r\n" + b": ".join(length) + b"\r\n\r\n" + body
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(1 << 16):
        head, end, rest = data.partition(b"\r\n\r\n")
        missing = int(head.rpartition(b"content-length: ")[2]) - len(rest) if end else 0
        while missing > 0:
            missing -= len(connection.recv(1 << 16))
        work()
        connection.sendall(answer)


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
