"""The HTTP front, a plain ASGI application: JSON to /v1/rank, /v1/score, /v1/prepare; metrics, the page."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from aif_jax.checks import Fields, expect, expect_types
from aif_jax.service.calls import MAX_VALUES, BadCall, Failure, parse, problem_of
from aif_jax.service.core import Service, explain
from aif_jax.serving import EngineClosed
from aif_jax.serving.callables import QUIET
from aif_jax.serving.metrics import Part, prometheus_text


def service_text(service: Service) -> str:
    """Return a service's metrics as Prometheus text, those of engines by version; only versions that serve have ages."""
    models = service.models
    counters = {"publishes": models.publishes, "publish_failures": models.failures}
    for observer in service.observers:
        counters |= getattr(observer, "counters", {})
    flags = {"ready": service.unready is None, "problem": models.problem is not None}
    parts: list[Part] = [({"version": held.version[:12], "folder": held.name}, held.engine.metrics()) for held in models.held]
    parts += [({"method": method, "code": code}, {"counters": {"calls": n}}) for (method, code), n in service.calls.items()]
    for held in models.status():
        labels = {"version": held["version"][:12], "folder": held["folder"]}
        ages = {} if held["share"] is None else {"model_age_seconds": held["age"], "index_age_seconds": held["index_age"]}
        parts.append((labels, {"gauges": ages | {"model_share": held["share"] or 0.0, "model_items": held["items"]}}))
        for part, at in (held["index_positions"] or {}).items():
            parts.append((labels | {"partition": str(part)}, {"gauges": {"index_position": at}}))
    parts.append(({}, {} if models.reads is None else models.reads.values()))
    return prometheus_text({"counters": counters, "gauges": flags}, *parts)


logger = logging.getLogger(__name__)
JSON = "application/json"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
PAGE = {"/": ("index.html", "html"), "/page.js": ("page.js", "javascript"), "/page.css": ("page.css", "css")}
OPEN = {"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", *PAGE}
"""Paths that need no token: load balancers ask them, and the page, which asks for the token, says nothing by itself."""
POLICY = b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
PAGE_HEADERS = (b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff")
MAX_REQUESTS = 1024  # in flight; one more gets 503, unless its path needs no token
LINGER = 1.0  # seconds for a caller to read an answer that came before the end of its body


class Response(NamedTuple):
    """What goes back."""

    body: bytes
    kind: str = JSON
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()


READ, CALL = "GET, HEAD", "POST"
CALLS = ("rank", "score", "prepare", "explain", "infer")  # at the end of a path
Headers = dict[bytes, bytes]
Route = tuple[str, Callable[..., Any]]
"""Methods of a path, as the header `allow` has them, and what answers: () -> Response, or async Headers, body -> Response."""
V2 = "/v2"
"""Paths below it have errors without codes, `{"error": "..."}`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening(Fields):
    """Where a service listens, and to what.

    Attributes:
      host: address to bind; the default is reachable from this machine alone.
      port: port of HTTP; 0 takes a free one.
      max_bytes: bytes of one call.
      body_seconds: seconds from the head of a call to the end of its body.
      max_candidates: the most candidates, the most excluded ids and the most events (these never over 65,536) of one call; in
        tensors (/v2) the texts of all inputs together may be twice as many.
      drain_delay: seconds between the end of readiness and the end of listening, for load balancers to notice; calls in flight
        may take `ServingConfig.drain_timeout` after that, in whole seconds, at least 1.
      keep_alive: seconds after which an idle HTTP connection is closed: longer than a load balancer keeps one, or its calls
        meet connections that are being closed.

    Raises:
      ValueError: a port, a bound or seconds out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    max_bytes: int = 16 << 20
    body_seconds: float = 10.0
    max_candidates: int = MAX_VALUES
    drain_delay: float = 0.0
    keep_alive: int = 75

    def __post_init__(self):
        expect_types(self)
        self.expect(self.host != "", "host", "an address; 0.0.0.0 for all of IPv4")
        self.expect(0 <= self.port < 1 << 16, "port", "0 to 65535")
        self.expect(0 <= self.drain_delay < math.inf, "drain_delay", "a finite number of at least 0")
        for name in ("max_bytes", "body_seconds", "max_candidates", "keep_alive"):
            self.expect(getattr(self, name) > 0, name, "more than 0")


class App:
    """The ASGI application of a service.

    Args:
      service: that answers.
      find: returns the route of a path that is none of the usual ones, or raises Failure.
      where: bounds of a call.
      token: bearer token that calls must bring; None: no token.
    """

    def __init__(self, service: Service, find: Callable[[str], Route], where: Listening, token: str | None):
        expect(token != "", "token", "None or some text", "an empty text")
        self._service, self._find, self._where, self._flying, self._logged = service, find, where, 0, dict[type, float]()
        self._token = None if token is None else token.encode()
        service.calls.update(dict.fromkeys(((name, "INTERNAL") for name in CALLS), 0))  # which alerts watch from the start
        self._routes: dict[str, Route] = {f"/v1/{name}": (CALL, functools.partial(self._called, name)) for name in CALLS[:-1]}
        for root in ("", V2):
            self._routes[f"{root}/health/live"] = READ, lambda: Response(encode({"live": True}))
            self._routes[f"{root}/health/ready"] = READ, self._ready
        self._routes["/metrics"] = READ, lambda: Response(service_text(service).encode(), TEXT)
        self._routes["/status.json"] = READ, self._status
        for path, (name, kind) in PAGE.items():
            body = (Path(__file__).parent / "page" / name).read_bytes()
            page = Response(body, f"text/{kind}; charset=utf-8", headers=PAGE_HEADERS)
            self._routes[path] = READ, lambda page=page: page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one HTTP request. An answer that leaves a part of the body unread ends the connection."""
        path, headers = scope["path"], dict(scope["headers"])
        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers  # a body comes
        self._flying += 1
        try:
            try:
                allowed, handler = self._route(scope["method"], path, headers)
                if allowed == READ:
                    response = handler()
                else:
                    body, unread = await self._body(headers, receive), False
                    response = await _unless_left(handler(headers, body), receive)
                code = "OK"
            except (Exception, asyncio.CancelledError) as error:
                ended = isinstance(error, asyncio.CancelledError)  # by uvicorn's shutdown: the body is not read either
                unread = unread and not ended
                problem = problem_of(EngineClosed("no answer before the service ended") if ended else error)
                if problem.code == "INTERNAL" and time.monotonic() - self._logged.get(type(error), -QUIET) >= QUIET:
                    self._logged[type(error)] = time.monotonic()  # the service is at fault: the counter has every one
                    logger.error("a call failed: %s", error, exc_info=error)
                code, response = problem.code, refusal(problem, path)
            if (method := path.rstrip("/").rpartition("/")[2]) in CALLS:
                self._service.calls[method, code] += 1
            shown = [(b"content-type", response.kind.encode()), (b"content-length", str(len(response.body)).encode())]
            shown += [*response.headers, *([(b"connection", b"close")] if unread else [])]
            await send({"type": "http.response.start", "status": response.status, "headers": shown})
            await send({"type": "http.response.body", "body": response.body, "more_body": unread})
            if unread:  # closed with bytes unread, a connection is reset, and an answer that was not read yet is lost
                room = self._where.max_bytes
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER):
                        while room > 0 and (message := await receive()).get("more_body"):
                            room -= len(message["body"])
                await send({"type": "http.response.body"})
        finally:
            self._flying -= 1

    def _route(self, method: str, path: str, headers: Headers) -> Route:
        """Return what answers a request. Raises Failure for one that is not welcome, or finds nothing."""
        if path not in OPEN and self._flying > MAX_REQUESTS:
            raise Failure("UNAVAILABLE", 503, f"expected at most {MAX_REQUESTS} requests at once", retry_after=1.0)
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        knows = self._token is None or (kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token))
        if path not in OPEN and not knows:
            text = "expected the header 'authorization: Bearer TOKEN' with the token of this service"
            raise Failure("UNAUTHENTICATED", 401, text, headers=((b"www-authenticate", b"Bearer"),))
        allowed, handler = self._routes.get(path) or self._find(path)
        if method not in allowed.split(", "):
            text = f"{path}: expected {allowed}, got {method}"
            raise Failure("UNIMPLEMENTED", 405, text, headers=((b"allow", allowed.encode()),))
        return allowed, handler

    async def _body(self, headers: Headers, receive: Any) -> bytes:
        """Return the body; Failure where it is too large, or does not come in time."""
        most, seconds = self._where.max_bytes, self._where.body_seconds
        body, size, more = bytearray(), int(headers.get(b"content-length", 0)), True
        if (coding := headers.get(b"content-encoding", b"identity")).lower() != b"identity":
            raise BadCall("content-encoding", f"expected a body as it is, got {coding[:80]!r}")
        try:
            async with asyncio.timeout(seconds):
                while more and size <= most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Failure("CANCELLED", 499, "the caller left")
                    body += message.get("body", b"")
                    size, more = max(size, len(body)), message.get("more_body", False)
        except TimeoutError:
            raise Failure("DEADLINE_EXCEEDED", 408, f"body: expected its end within {seconds} s", "body") from None
        if size > most:
            raise Failure("INVALID_ARGUMENT", 413, f"body: expected at most {most} bytes", "body")
        return bytes(body)

    async def _called(self, method: str, headers: Headers, body: bytes) -> Response:
        """Return the answer to a call of a method."""
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        if kind != JSON:
            raise BadCall("content-type", f"expected {JSON}, got {kind[:80]!r}")
        call = parse(parse_json(body), self._where.max_candidates, size=len(body))
        if method == "explain":
            return Response(encode(await explain(self._service, call)))
        return Response(encode((await self._service.answer(method, call)).fields()))

    def _ready(self) -> Response:
        reason = self._service.unready
        return Response(encode({"ready": reason is None, "reason": reason}), status=200 if reason is None else 503)

    def _status(self) -> Response:
        service, latest, codes = self._service, self._service.latest, Counter()
        for (_, code), count in service.calls.items():
            codes[code] += count
        status = {"ready": service.unready is None, "reason": service.unready, "problem": service.models.problem}
        timeline = latest and {"version": latest[0], "spans": list(map(list, latest[1].spans))}
        return Response(encode(status | {"models": service.models.status(), "codes": +codes, "timeline": timeline}))


async def _unless_left(work: Awaitable[Response], receive: Any) -> Response:
    """Await a response; cancel the work if the caller leaves first."""

    async def watch() -> None:
        await receive()  # the body was read, so nothing comes until the caller leaves
        leaving.reschedule(0)  # a moment in the past: cancels the work now

    leaving = asyncio.timeout(None)
    try:
        async with leaving:
            watching = asyncio.create_task(watch())
            try:
                return await work
            finally:
                watching.cancel()
    except TimeoutError:
        if leaving.expired():
            raise Failure("CANCELLED", 499, "the caller left") from None
        raise


def refusal(problem: Failure, path: str) -> Response:
    """Return how an error is answered."""
    headers = problem.headers
    if problem.retry_after is not None:  # HTTP has whole seconds
        headers += ((b"retry-after", str(max(1, round(problem.retry_after))).encode()),)
    body = {"error": problem.message} if path.startswith(V2) else problem.to_json()
    return Response(encode(body), status=problem.status, headers=headers)


def encode(value: Any) -> bytes:
    """Return plain values and arrays of an answer as JSON; null for what JSON cannot say, such as NaN."""
    import orjson

    return orjson.dumps(value, lambda texts: texts.tolist(), orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def parse_json(raw: bytes) -> dict[str, Any]:
    """Return a JSON object, integers beyond 64 bits as floats; BadCall for anything else, such as text that is no Unicode."""
    import orjson

    try:
        value = orjson.loads(raw)
    except ValueError as error:
        raise BadCall("body", f"expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadCall("body", f"expected a JSON object, got {type(value).__name__}")
    return value
