"""One process of a service: HTTP by uvicorn on an event loop, ready after warm-up, drained on SIGTERM.

It bounds bodies in bytes and seconds, and requests in flight. TLS, and what else strangers may do to a server, such as heads
that do not end, are for the proxy in front of it: docs/deploy has the configurations of two.
"""

import asyncio
import contextlib
import inspect
import json
import logging
import pkgutil
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

from aif_jax.checks import expect, needs_extra
from aif_jax.output import hidden
from aif_jax.service.core import Service
from aif_jax.service.http import App, Listening
from aif_jax.service.inference import Inference

logger = logging.getLogger(__name__)


def serve(service: Service, where: Listening, token: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT, and print one JSON line with its address when it is ready.

    Raises OSError where the port is taken, ImportError where a package is missing, and what `Models.start` raises for a folder
    that cannot be read: all before anything is compiled.
    """
    _, uvloop = server_packages()
    bind(where.host, where.port).close()
    with hidden(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # no bars: the log says what is compiled
        runner.run(run(service, where, token))


def server_packages() -> tuple[Any, Any]:
    """Return the modules uvicorn and uvloop; ImportError where these, httptools or orjson are missing, names the extra."""
    with needs_extra("a service needs uvicorn, uvloop, httptools and orjson", "service"):
        import httptools  # noqa: F401  which uvicorn imports when it starts
        import orjson  # noqa: F401  which a call imports
        import uvicorn
        import uvloop  # HTTP takes half the time of asyncio's loop
    return uvicorn, uvloop


def source_of(name: str) -> Any:
    """Return the feature source at "MODULE:NAME". Raises ValueError for a name that leads to none."""
    try:
        found = pkgutil.resolve_name(name)
        source = found if hasattr(found, "get") and not isinstance(found, type) else found()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected MODULE:NAME of a feature source in PYTHONPATH: {error}") from error
    good = inspect.iscoroutinefunction(getattr(source, "get", None))
    expect(good, name, "an object with `async get(user)`, defined with async", type(source).__name__)
    return source


@contextlib.asynccontextmanager
async def listening(service: Service, where: Listening, token: str | None = None) -> AsyncIterator[dict[str, Any]]:
    """Serve a service that has started; yields its address by protocol, and drains at the end of the block.

    Raises:
      ImportError: a package of the extra `service` is missing; names the extra.
      OSError: the port is taken.
    """
    uvicorn, _ = server_packages()
    app = App(service, Inference(service, where.max_candidates).route, where, token)
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", timeout_keep_alive=where.keep_alive,
        timeout_graceful_shutdown=max(1, round(service.models.config.drain_timeout)), log_config=None, access_log=False,
        server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip
    config.load()
    server = uvicorn.Server(config)  # not run by its `serve`, which takes the signals
    server.lifespan = config.lifespan_class(config)
    with bind(where.host, where.port) as bound:
        await server.startup(sockets=[bound])
        host = f"[{where.host}]" if ":" in where.host else where.host
        try:
            yield {"http": f"http://{host}:{bound.getsockname()[1]}"}
        finally:
            service.unready = "draining"
            await asyncio.sleep(where.drain_delay)
            for accepting in server.servers:
                accepting.close()
            for _ in range(10):  # turns of the loop: what was accepted becomes a connection, which the shutdown ends
                await asyncio.sleep(0.002)
            await server.shutdown(sockets=[bound])


async def run(service: Service, where: Listening, token: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Prints one JSON line with the address when it is ready.

    For a process that does nothing else: the signals are those of the service.
    """
    stop = asyncio.timeout(None)

    def end() -> None:
        if stop.when() is None:
            logger.info("draining")
            stop.reschedule(0)  # a moment in the past: cancels what runs below

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        async with stop, service, listening(service, where, token) as addresses:
            with contextlib.suppress(OSError):  # nobody reads it any more: no reason not to serve
                print(json.dumps({"ready": True, **addresses}) + "\n", end="", flush=True)
            logger.info("ready: %s", addresses)
            await asyncio.Event().wait()
    except TimeoutError:
        if not stop.expired():
            raise


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; OSError names the address."""
    # asyncio sends without delay only where the protocol is named; else a body waits 40 ms for an acknowledgement
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from None
    return bound
