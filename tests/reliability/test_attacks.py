"""Hostile callers, through each proxy of docs/deploy and without: bounded, while good calls are answered and memory is flat."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from aif_jax.service import http as http_front
from aif_jax.service.inference import MODEL
from aif_jax.service.process import Listening
from tests import proxies
from tests.client import Client
from tests.reliability.sizes import FULL, SMOKE, Sizes, fully, resident
from tests.service_world import IDS, SERVING, Running, Slow, connected, exports, running, until

pytestmark = pytest.mark.lane("standing")
TOKEN = "open sesame"
CALL = {"user": "ann", "record": {"user": "ann"}, "events": {}, "candidates": IDS, "k": 3}
LIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n"
KEY = f"authorization: Bearer {TOKEN}\r\n".encode()
FLAT = 64 << 20  # bytes that the process may grow by under an attack, whatever the attack sends
OTHER = "127.0.0.2"  # address of a caller who attacks nobody
FASTER = {
    "haproxy": {
        "timeout http-request 10s": "timeout http-request 1s", "wait-for-body time 10s": "wait-for-body time 1s",
        "timeout client 30s": "timeout client 1s", "timeout http-keep-alive 60s": "timeout http-keep-alive 1s",
    },
    "nginx": {"_timeout 10s;": "_timeout 1s;", "send_timeout 30s;": "send_timeout 1s; keepalive_timeout 1s;"},
}  # fmt: skip
"""What a proxy's file says in tens of seconds, in one."""
CROWD = {"haproxy": {"gt 1000 }": "gt 20 }"}, "nginx": {"callers 1000;": "callers 20;"}}
BUSY = {"haproxy": {"maxconn 512": "maxconn 2"}, "nginx": {"max_conns=512": "max_conns=2"}}


class Fronted(NamedTuple):
    """A service, and the address of the proxy in front of it, or its own."""

    service: Running
    address: str

    def connect(self, said: bytes = b"") -> socket.socket:
        return connected(self.address, said)

    def good(self) -> None:
        """Health of the service, and at the address a call from elsewhere, are answered."""
        with self.service.client() as client:
            assert client.request("GET", "/health/ready")[0] == 200
        assert self.call() == 200

    def call(self, address: str = OTHER) -> int:
        """Status of a call from an address of this machine."""
        body = json.dumps(CALL | {"candidates": IDS.tolist()})
        headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
        host = self.address.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(host, timeout=60, source_address=(address, 0))) as connection:
            connection.request("POST", "/v1/rank", body, headers)
            return connection.getresponse().status


@contextlib.contextmanager
def service(*, limits: dict | None = None, **options) -> Iterator[Fronted]:
    """A service with a token whose deadlines are short."""
    where = Listening(port=0, **limits or {"body_seconds": 0.5})
    with running(exports().root / "one", where=where, token=TOKEN, **options) as made:
        yield Fronted(made, made.addresses["http"])


@contextlib.contextmanager
def fronted(name: proxies.Proxy, folder: Path, *changes: dict[str, dict[str, str]], **options) -> Iterator[Fronted]:
    """The same behind a proxy, with some changes of its file by its name."""
    changed = {old: new for change in (FASTER, *changes) for old, new in change[name].items()}
    with service(**options) as made, proxies.proxy(name, [made.address], folder, changes=changed) as (address, _):
        yield made._replace(address=address)


@pytest.fixture(params=["haproxy", "nginx"])
def name(request) -> proxies.Proxy:
    proxies.find(request.param)
    return request.param


def read_all(caller: socket.socket) -> bytes:
    """Everything until the connection is closed, which it must be."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := caller.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def flood(caller: socket.socket, part: bytes, most: int) -> int:
    """Sends a part again and again until the connection ends, or so many bytes; returns how many bytes were taken."""
    sent = 0
    caller.settimeout(10)
    with contextlib.suppress(OSError):  # closed, or nothing reads it
        while sent < most:
            caller.sendall(part)
            sent += len(part)
    return sent


def drip(going: dict[socket.socket, bytes], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Sends each connection a byte of its own from time to time, until it is closed; every one must be within a minute."""
    for place in range(600):
        for caller, said in list(going.items()):
            try:
                caller.sendall(said[place % len(said) :][:1])
            except ConnectionError:
                going.pop(caller)
                caller.close()
        if not going:
            return
        time.sleep(0.1)
        meanwhile()
    raise AssertionError(f"{len(going)} connections are still there, with the drips {set(going.values())}")


def test_a_call_ends_with_its_caller(name, tmp_path):
    source = Slow()
    with service(source=source) as made, proxies.proxy(name, [made.address], tmp_path) as (address, _):
        with connected(address, POST + KEY + b'content-length: 42\r\n\r\n{"user": "ann", "candidates": [17], "k":1}'):
            until(lambda: source.started)
        until(lambda: source.cancelled and made.service.service.calls["rank", "CANCELLED"])


def test_nginx_gives_up_a_replica_that_takes_calls_and_answers_none(tmp_path):
    proxies.find("nginx")
    with service() as made, socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = [f"http://127.0.0.1:{silent.getsockname()[1]}", made.address]
        with proxies.proxy("nginx", addresses, tmp_path, affinity=False) as (address, _):
            start, front = time.monotonic(), made._replace(address=address)
            assert [front.call() for _ in range(3)] == [200] * 3 and time.monotonic() - start < 30


LINE = b"x-%s: %s\r\n" % (b"n" * 20, b"v" * 4000)
CHUNK = b"fa0\r\n" + b"v" * 4000 + b"\r\n"
BODIES = {
    "a body without a token": (CHUNKED + b"\r\n", CHUNK),
    "a body": (CHUNKED + KEY + b"\r\n", CHUNK),
    "a body of a terabyte": (POST + KEY + b"content-length: 1000000000000\r\n\r\n", b"v" * 4000),
    "a body that nobody reads": (CHUNKED.replace(b"/v1/rank", b"/none") + KEY + b"\r\n", CHUNK),
}
FLOODS = BODIES | {
    "trailers": (CHUNKED + KEY + b"\r\n0\r\n", LINE),
    "one endless trailer": (CHUNKED + KEY + b"\r\n2\r\n{}\r\n0\r\nx-endless: ", b"v" * 4000),
    "a head": (LIVE, LINE),
    "one endless header": (LIVE + b"x-endless: ", b"v" * 4000),
    "a path": (b"GET /", b"v" * 4000),
}


def floods_of(name: proxies.Proxy) -> dict[str, tuple[bytes, bytes]]:
    """Floods that a proxy ends; nginx reads trailers on, keeps none of them, and tells no replica."""
    return {what: said for what, said in FLOODS.items() if name == "haproxy" or "trailer" not in what}


def floods(made: Fronted, of: dict[str, tuple[bytes, bytes]], sizes: Sizes) -> None:
    """Endless heads, trailers and bodies: each ends after a bounded number of bytes, in flat memory."""
    before = resident()
    for what, (first, part) in of.items():
        with made.connect(first) as caller:
            sent = flood(caller, part, sizes.flood_bytes)
            assert sent < sizes.flood_bytes, f"{what}: {sent} bytes were taken"
        assert resident() < before + FLAT, what


def test_a_proxy_without_a_replica_ends_bodies_of_any_length(name, tmp_path):
    """By its own file: HAProxy's numbers wrap at 2^32, and it reads on after an early answer."""
    with proxies.proxy(name, ["http://127.0.0.1:9"], tmp_path, changes=FASTER[name]) as (address, _):
        for length in (2**31 - 1, 2**31, 2**32 + 1, 10**12, 10**30):
            with connected(address, POST + KEY + b"content-length: %d\r\n\r\n" % length) as caller:
                assert flood(caller, b"v" * 4000, SMOKE.flood_bytes) < SMOKE.flood_bytes, length


def test_floods_end_in_flat_memory_and_a_body_that_is_too_large_is_refused(name, tmp_path):
    with fronted(name, tmp_path) as made:
        floods(made, floods_of(name), SMOKE)
        made.good()
        with made.connect(POST + KEY + b"content-length: %d\r\n\r\n{" % ((16 << 20) + 1)) as caller:
            assert b" 413 " in read_all(caller)
        made.good()


def test_slow_heads_and_bodies_end(name, tmp_path):
    """Silent connections, a byte from time to time of a head, a part of a body: each ends by itself, good calls go on."""
    with fronted(name, tmp_path) as made, contextlib.ExitStack() as stack:
        half = POST + KEY + b"content-length: 500\r\n\r\n{"
        stalled = [stack.enter_context(made.connect(said)) for said in (half, CHUNKED + KEY + b"\r\n5\r\n{", LIVE + b"\r\n")]
        dripping = [(stack.enter_context(made.connect(said)), b"x: y\r\n") for said in (LIVE, CHUNKED)]
        if name == "haproxy":  # nginx awaits each part of a body anew, and a replica gets none of it
            told = half.replace(b"500", b"100")  # HAProxy answers after a second, and reads on to the end that was told
            dripping.append((stack.enter_context(made.connect(told)), b"x"))
        drip(dict(dripping), made.good)
        for caller in stalled:
            assert len(read_all(caller)) < 1000


def test_an_answer_that_nobody_reads_ends_its_connection(name, tmp_path):
    with fronted(name, tmp_path) as made, socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = made.address.removeprefix("http://").split(":")
        caller.connect((host, int(port)))
        caller.settimeout(2)
        asked = b"GET /page.js HTTP/1.1\r\nhost: x\r\n\r\n" * 3000  # 28 MB of answers for 100 kB
        with contextlib.suppress(OSError):
            caller.sendall(asked)
        time.sleep(3)
        made.good()
        caller.settimeout(30)
        assert read_all(caller).count(b"HTTP/1.1 200") < 3000


def test_a_crowd_of_connections_of_one_address_keeps_no_other_out(name, tmp_path):
    """More silent connections, and more with half a head or half a body, than an address may have."""
    with fronted(name, tmp_path, CROWD) as made:
        for said in (b"", LIVE, POST + KEY + b"content-length: 500\r\n\r\n{", LIVE + b"\r\n"):
            with contextlib.ExitStack() as stack:
                for _ in range(200):
                    with contextlib.suppress(ConnectionError):
                        stack.enter_context(made.connect(said))
                made.good()


class Held:
    """A feature source that answers when it is released."""

    def __init__(self) -> None:
        self.release, self.started = threading.Event(), threading.Semaphore(0)

    async def get(self, user):
        self.started.release()
        while not self.release.is_set():
            await asyncio.sleep(0.01)


PATIENT = dataclasses.replace(SERVING, callable_timeout=60.0, budget=60.0)


@contextlib.contextmanager
def held(made: Fronted, source: Held, *users: str) -> Iterator[list[socket.socket]]:
    """Connections with a call of each user whose features the source has to give, and has not given yet."""
    with contextlib.ExitStack() as stack:
        stack.callback(source.release.set)
        callers = []
        for user in users:
            body = json.dumps({"user": user, "candidates": IDS.tolist(), "k": 3}).encode()
            head = POST + KEY + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            callers.append(stack.enter_context(made.connect(head + body)))
            assert source.started.acquire(timeout=60)
        yield callers


def test_more_calls_than_a_replica_takes_are_refused_and_health_is_answered(name, tmp_path):
    source = Held()
    with fronted(name, tmp_path, BUSY, source=source, config=PATIENT) as made, held(made, source, "ann", "ben") as callers:
        assert made.call() in (502, 503)
        with made.service.client() as client:
            assert client.request("GET", "/health/ready")[0] == 200
        source.release.set()
        for caller in callers:
            read_all(caller)
        assert made.call() == 200


OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"


def test_what_a_request_offers_or_hides_is_no_request(name, tmp_path):
    """An offer of HTTP/2 is answered by HTTP/1.1; two lengths of one body are refused; a body is never taken for a request."""
    body = json.dumps(CALL | {"candidates": IDS.tolist()}).encode()
    hidden = b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + KEY + b"\r\n"
    with fronted(name, tmp_path) as made:
        for content, status in ((body, b"200"), (hidden, b"400")):
            with made.connect(POST + KEY + OFFER + b"content-length: %d\r\n\r\n" % len(content) + content) as caller:
                answers = read_all(caller)
            assert answers.startswith(b"HTTP/1.1 %s " % status) and answers.count(b"HTTP/1.1") == 1, answers
        twice = POST + KEY + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        with made.connect(twice + hidden) as caller:
            assert b"aif_" not in read_all(caller)
        made.good()


@pytest.fixture
def short(monkeypatch):
    """A service without a proxy that waits for nobody for long."""
    monkeypatch.setattr(http_front, "LINGER", 0.2)
    with service() as made:
        yield made


def drips(made: Fronted, sizes: Sizes) -> None:
    """A byte of a body from time to time: every connection ends by itself."""
    chunks, other = b"1\r\nx\r\n", CHUNKED.replace(b"/v1/rank", b"/none")
    kinds = (
        (CHUNKED + b"\r\n", chunks), (CHUNKED + KEY + b"\r\n", chunks), (other + KEY + b"\r\n", chunks),
        (CHUNKED.replace(b"POST", b"PATCH") + KEY + b"\r\n", chunks),
        (LIVE.replace(b"GET", b"POST") + KEY + b"content-length: 99999\r\n\r\n", b"x"),
        (LIVE + b"content-length: 99999\r\n\r\n", b"x"),
    )  # fmt: skip
    drip({made.connect(first): drip for first, drip in kinds for _ in range(max(1, sizes.drips // len(kinds)))})
    made.good()


def test_the_service_bounds_bodies_in_bytes_and_seconds(short):
    """A caller reads the refusal of a large body: a connection that is closed while bytes come would take the answer back."""
    floods(short, BODIES, SMOKE)
    short.good()
    drips(short, SMOKE)
    with Client(short.address, token="wrong") as client:
        for _ in range(5):
            status, _, _ = client.request("POST", "/v1/rank", bytes(4 << 20), {"content-type": "application/json"})
            assert status == 401


def test_more_calls_than_the_service_takes_get_503_and_health_is_answered(monkeypatch):
    """Calls in flight are never ended for another."""
    monkeypatch.setattr(http_front, "MAX_REQUESTS", 3)
    source = Held()
    with service(source=source, config=PATIENT) as made, held(made, source, "ann", "ben", "cat") as callers:
        with made.service.client() as client:
            status, answer = client.post("/v1/rank", CALL)
            assert status == 503 and "expected at most 3 requests at once" in answer["error"]["message"]
            assert client.request("GET", "/health/live")[0] == 200
        source.release.set()
        assert all(read_all(caller).startswith(b"HTTP/1.1 200") for caller in callers)


def test_an_answer_before_the_end_of_a_body_says_that_it_closes(monkeypatch):
    monkeypatch.setattr(http_front, "LINGER", 0.2)
    with service(limits={"max_bytes": 1000, "body_seconds": 0.3}) as made:
        for method, path, key, length, status in (
            ("POST", "/v1/rank", b"", 500, 401),
            ("POST", "/none", KEY, 500, 404),
            ("PATCH", "/v1/rank", KEY, 500, 405),
            ("POST", "/v1/rank", KEY, 5000, 413),
            ("POST", "/v1/rank", KEY, 500, 408),
            ("GET", "/health/live", b"", 500, 200),
        ):
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n".encode()
            with made.connect(head + key + b"\r\nhalf") as caller:
                answer = read_all(caller)
            assert answer.startswith(b"HTTP/1.1 %d " % status) and b"\r\nconnection: close\r\n" in answer, answer
        with made.connect(CHUNKED.replace(b"/v1/rank", b"/v2/models/%s/infer" % MODEL.encode()) + KEY + b"\r\n") as caller:
            caller.sendall(b"2\r\n{}\r\n0\r\n\r\n")
            assert b" 400 " in caller.recv(1 << 16)
            caller.sendall(LIVE + b"connection: close\r\n\r\n")  # a whole body leaves the connection open
            assert b'{"live":true}' in read_all(caller)


@fully
def test_every_attack_at_full_size(name, tmp_path, short):
    with fronted(name, tmp_path) as made:
        floods(made, floods_of(name), FULL)
        made.good()
    floods(short, BODIES, FULL)
    drips(short, FULL)
