"""One process of a service: HTTP on an event loop, ready after warm-up, drained on SIGTERM.

An HTTP connection is uvicorn's, with budgets in bytes and seconds for whatever a caller sends, or leaves unsent and unread:

| state | bytes | seconds | then |
|---|---|---|---|
| a request's head is awaited or arrives | `HEAD_BYTES` | `HEAD_SECONDS` | 400 for too many, closed |
| trailers, or anything else of a body that is not its content | `HEAD_BYTES` in a row | `Limits.body_seconds` | 400, closed |
| idle between two requests | none that start no request | `keep_alive` | closed |
| answers that the caller does not read | the transport's buffer | `UNREAD_SECONDS` | aborted |

Requests that come before their predecessors' answers are read `AHEAD` at a time and answered in order, whatever follows them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import signal
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import expect, needs_extra
from aif_jax.service.core import Service
from aif_jax.service.http import App, Handler
from aif_jax.service.models import Models

HEAD_BYTES = 32 << 10
HEAD_SECONDS = 10.0  # from the connection, or from the first byte of a request, to the end of its head
UNREAD_SECONDS = 30.0  # that an answer may wait for its caller to read
AHEAD = 8  # requests of a connection whose answers are not complete
RESERVE = 32  # connections beyond the bound while all others have a call in flight: health is answered on them
NEW_SECONDS = 1.0  # for which a connection without a request yet is kept before those that wait longer, or again
SLICE = 2048  # bytes that the parser gets at a time: so many requests, and no more, come out of it at once


class OnePiece:
    """A transport that sends the head of an answer with its body: one call of the system and one packet in place of two."""

    def __init__(self, transport: Any):
        self._transport, self._head = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Sends data; keeps the head of a final answer until what comes next."""
        if not self._head and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def flush(self) -> None:
        """Sends a head without a body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Closes, once everything is sent."""
        self.flush()
        self._transport.close()


class WithoutOffers:
    """A parser for which a request that offers another protocol is a request like others (RFC 9110, section 7.8).

    Java's client offers HTTP/2 in every request without TLS. httptools' own parser ends such a request at its head, and takes
    its body for the next one: here a second parser gets the head again, without the offer, and what follows it.

    Args:
      connection: its `headers` and `url` are those of the last head.
    """

    def __init__(self, parser: Any, connection: Any):
        with needs_extra("a service needs uvicorn and httptools", "service"):
            import httptools

        self._parser, self._connection, self._httptools = parser, connection, httptools

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        """Reads data, as httptools does."""
        rest: bytes | None = data
        while rest is not None:
            try:
                self._parser.feed_data(rest)
                rest = None
            except self._httptools.HttpParserUpgrade as offer:
                if self.get_method() == b"CONNECT":
                    raise self._httptools.HttpParserError("expected a request to this service, got one for a proxy") from None
                head = [b"%s %s HTTP/%s" % (self.get_method(), self._connection.url, self.get_http_version().encode())]
                for name, value in self._connection.headers:
                    if name == b"connection":
                        kept = [token.strip() for token in value.split(b",")]
                        value = b", ".join(token for token in kept if token.lower() not in (b"upgrade", b"http2-settings"))
                    if name not in (b"upgrade", b"http2-settings"):
                        head.append(b"%s: %s" % (name, value))
                self._parser = self._httptools.HttpRequestParser(self._connection)
                self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
                rest = b"\r\n".join([*head, b"", rest[offer.args[0] :]])


def bounded(base: Any, *, connections: int) -> Any:
    """The class of connections, from uvicorn's `HttpToolsProtocol`, with the budgets of this module.

    Args:
      connections: open at once. With one more the connection that has waited longest for its caller is closed: for a request,
        for the rest of a head or of a body. One whose call is in flight is never closed for another.
    """

    class Connection(base):
        _open = 0  # requests whose head is there and whose answer is not complete
        _reading = "head"  # what comes next: "head", "body", or "" between two requests
        _size = 0  # bytes of the head, or bytes in a row without content of a body
        _left = 0  # bytes of the body that are to come; 0 where its length is not known
        _since = 0.0  # since when the caller is awaited
        _asked = False  # whether a head of a request has come
        _refusal: str | None = None  # the last answer, once the others are sent; "" closes without one
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        # from the transport

        def connection_made(self, transport: Any) -> None:
            super().connection_made(OnePiece(transport))
            self.parser = WithoutOffers(self.parser, self)
            self._held, self._since = bytearray(), self.loop.time()
            self._within(HEAD_SECONDS, self._end)
            if len(self.connections) > connections:
                self._make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self._within(None)
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self._unread or self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def data_received(self, data: bytes) -> None:
            if self._refusal is None:
                self._held += data
                self._parse()

        def _parse(self) -> None:
            """Gives the parser what has come, as far as answers keep up with it."""
            while self._held and self._open < AHEAD and self._refusal is None and not self.transport.is_closing():
                size = max(self._left, SLICE) if self._reading == "body" else SLICE
                part, before = bytes(self._held[:size]), self._reading
                del self._held[:size]
                self._size += len(part)
                super().data_received(part)
                if self._size > HEAD_BYTES and before == self._reading:
                    self._end(f"expected at most {HEAD_BYTES} bytes before the body, and after it, got more")
            if self._held:
                self.flow.pause_reading()
            if self._reading == "head" and self._refusal is None:
                if self._held or self.flow.read_paused:
                    self._within(None)  # the caller has sent it: the answers before it are awaited
                elif self._timer is None:
                    self._within(HEAD_SECONDS, self._end)

        # from the parser

        def on_message_begin(self) -> None:
            self._reading, self._size = "head", 0
            self._within(HEAD_SECONDS, self._end)
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._reading == "head":  # trailers are not used, and so not kept
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade():
                return  # it comes again without the offer
            self._reading, self._size, self._since = "body", 0, self.loop.time()
            self._left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
            self._open, self._asked = self._open + 1, True
            self._within(None)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._size, self._left = 0, max(0, self._left - len(body))
            super().on_body(body)

        def on_message_complete(self) -> None:
            if self.parser.should_upgrade():
                return
            self._reading, self._size = "", 0
            super().on_message_complete()

        # answers and the end

        def send_400_response(self, msg: str) -> None:
            self._end(msg)

        def on_response_complete(self) -> None:
            self.transport.flush()
            self._open -= 1
            self._since = self.loop.time()
            super().on_response_complete()
            if self.transport.is_closing():
                self._within(UNREAD_SECONDS, self.transport.abort)
            elif self._refusal is not None:
                self._end_if_answered()
            else:
                if not self._open and not self._reading:
                    self._within(self.timeout_keep_alive, self._end)
                self._parse()

        def timeout_keep_alive_handler(self) -> None:
            self._end()

        def _end(self, refusal: str = "") -> None:
            """Reads nothing more; closes, with a refusal or without, when the requests before are answered."""
            if self._refusal is None:
                self._refusal = refusal
                self._held.clear()
                self._within(None)
                self.flow.pause_reading()
                self._end_if_answered()

        def _end_if_answered(self) -> None:
            incomplete = self._reading == "body"  # the last request itself is what the refusal answers
            if self._open > incomplete or self.transport.is_closing():
                return
            if self._refusal and not (incomplete and self.cycle.response_started):
                super().send_400_response(self._refusal)
            self.transport.close()
            self._within(UNREAD_SECONDS, self.transport.abort)

        def _make_room(self) -> None:
            others = [each for each in self.connections if each is not self and not each.transport.is_closing()]
            waiting = [each for each in others if each._open <= (each._reading == "body")]
            # a connection of a moment ago may have its first request in the socket: only if all others are as young
            new = self._since - NEW_SECONDS
            if len(others) >= connections and waiting:
                min(waiting, key=lambda each: (not each._asked and each._since > new, each._since)).transport.abort()
            elif len(others) >= connections + RESERVE:
                self.transport.abort()

        def _within(self, seconds: float | None, then: Any = None) -> None:
            """Does something after some seconds, unless another state comes before that."""
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, then)

    return Connection


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening:
    """Where and how a process listens.

    Attributes:
      host: address to bind; the default is reachable from this machine alone.
      http_port: port of HTTP; 0 takes a free one.
      token: bearer token that calls must bring; None: no token.
      certificate, key: PEM files of TLS; None: no TLS.
      reuse_port: several processes may listen on the ports.
      drain_delay: seconds between the end of readiness and the end of listening, for load balancers to notice.
      drain_timeout: seconds that calls in flight may take after that.
      connections: HTTP connections at once. With one more connection the one that has waited longest for its caller is closed;
        one more call gets 503, and health is answered still.
      keep_alive: seconds after which an idle HTTP connection is closed: longer than a load balancer keeps one, or its calls
        meet connections that are being closed.

    Raises:
      ValueError: a certificate without a key, or the other way round; ports or seconds out of range.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
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
        expect(0 <= self.http_port < 1 << 16, "port", "0 to 65535", self.http_port)
        for name, least in (("drain_delay", 0), ("drain_timeout", 0), ("connections", 1), ("keep_alive", 1)):
            expect(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        expect(self.token != "", "token", "None or some text", "an empty text")


@contextlib.asynccontextmanager
async def listening(
    service: Service, where: Listening, *, routes: Mapping[str, Handler] | None = None
) -> AsyncIterator[dict[str, Any]]:
    """Serves a service that has started; yields the addresses, and drains at the end of the block.

    Raises:
      ImportError: uvicorn is missing; names the extra.
      OSError: the port is taken.
    """
    with needs_extra("a service needs uvicorn and httptools", "service"):
        import uvicorn
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Quiet(uvicorn.Server):
        """Signals are those of the process, which drains."""

        @contextlib.contextmanager
        def capture_signals(self):
            yield

    bound = bind(where.host, where.http_port, reuse=where.reuse_port)
    server = Quiet(
        uvicorn.Config(
            App(service, token=where.token, more=routes, max_requests=where.connections), ws="none", lifespan="off",
            http=bounded(HttpToolsProtocol, connections=where.connections), timeout_keep_alive=where.keep_alive,
            log_config=None, access_log=False, server_header=False, date_header=False, proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(where.drain_timeout)),
            ssl_certfile=where.certificate, ssl_keyfile=where.key,
        )
    )  # fmt: skip
    running = asyncio.get_running_loop().create_task(server.serve(sockets=[bound]))
    try:
        while not server.started:
            if running.done():
                running.result()
                raise OSError(f"{where.host}:{where.http_port}: the HTTP server did not start")
            await asyncio.sleep(0.005)
        scheme = "http" if where.certificate is None else "https"
        yield {"http": f"{scheme}://{_shown(where.host)}:{bound.getsockname()[1]}"}
    finally:
        service.ready, service.draining = False, True
        if not running.done():
            await asyncio.sleep(where.drain_delay)
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        bound.close()


class Frozen:
    """Leaves what a service holds out of garbage collections: a full one of 200,000 objects stops the event loop for 0.1 s.

    For a process that does nothing else, since `gc.freeze` concerns all of it. A version that was replaced is freed by its
    reference counts, frozen or not. If a cycle holds a part of it a whole look later, everything is collected once.

    Attributes:
      collections: how often everything was collected.
    """

    def __init__(self, models: Models):
        self.collections = 0
        self._models, self._publishes = models, -1
        self._serving: list[weakref.ref[Any]] = []
        self._replaced: list[weakref.ref[Any]] = []

    def look(self) -> None:
        """Freezes what is there after a publish, and collects replaced parts that were alive at the last look and still are."""
        models, parts = self._models, []
        for served in models.held:
            parts += [served, served.engine, served.users, served.restored.trained, served.restored.index]
        closing = self._replaced if models.closing else []  # requests in flight hold them
        leaked = [ref for ref in self._replaced if not closing and ref() is not None]
        serving = set(map(id, parts))
        self._replaced = [*closing, *(ref for ref in self._serving if ref() is not None and id(ref()) not in serving)]
        self._serving = [weakref.ref(part) for part in parts if part is not None]
        if leaked:
            self.collections += 1
            gc.unfreeze()
        if leaked or models.publishes != self._publishes:
            self._publishes = models.publishes
            gc.collect()  # visits what came since the last freeze
            gc.freeze()

    @contextlib.asynccontextmanager
    async def looking(self, *, every: float = 5.0) -> AsyncIterator[None]:
        """Looks at once and every so many seconds; at the end of the block nothing is frozen."""

        async def look_on() -> None:
            while True:
                await asyncio.sleep(every)
                self.look()

        self.look()
        task = asyncio.get_running_loop().create_task(look_on())
        try:
            yield
        finally:
            task.cancel()
            gc.unfreeze()


async def run(service: Service, where: Listening, *, routes: Mapping[str, Handler] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Prints one JSON line with its address when it is ready.

    For a process that does nothing else: signals and garbage collections are those of the service, see `Frozen`.
    """
    stop, loop, task = asyncio.Event(), asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def told() -> None:
        if not (stop.is_set() or service.ready or service.draining):
            task.cancel()  # nobody is served yet
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    try:
        async with service, Frozen(service.models).looking(), listening(service, where, routes=routes) as addresses:
            with contextlib.suppress(OSError):  # nobody reads it any more: no reason not to serve
                print(json.dumps({"ready": True, **addresses}) + "\n", end="", flush=True)  # one write: workers share stdout
            logger.info("ready: %s", addresses)
            await stop.wait()
            logger.info("draining")
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        task.uncancel()
        logger.info("ended while it started")
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


class JsonFormatter(logging.Formatter):
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
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("aif_jax").setLevel(level.upper())
    logging.captureWarnings(True)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
