"""Hostile callers without a token, over loopback: floods of heads and trailers, drips, idle and unread connections, pipelines.

Each attack is bounded, and next to it health and good calls are answered and memory stays flat.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aif_jax.service import http, process, processes
from aif_jax.service.calls import Limits
from aif_jax.service.client import Client
from aif_jax.service.core import Policy
from aif_jax.service.inference import MODEL
from aif_jax.service.process import Listening
from tests.reliability.sizes import FULL, SMOKE, Sizes
from tests.service_world import IDS, SERVING, Running, exports, posted, running

TOKEN = "open sesame"
CALL = {"user": "ann", "record": {"user": "ann"}, "events": {}, "candidates": IDS, "k": 3}
LIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
KEY = f"authorization: Bearer {TOKEN}\r\n".encode()
FLAT = 64 << 20  # bytes that the process may grow by under an attack, whatever the attack sends


@contextlib.contextmanager
def service(monkeypatch, *, limits: Limits | None = None, **where) -> Iterator[Running]:
    """A service with a token whose deadlines are short."""
    for name in ("HEAD_SECONDS", "UNREAD_SECONDS"):
        monkeypatch.setattr(process, name, 0.5)
    monkeypatch.setattr(http, "LINGER", 0.2)
    listening = Listening(http_port=0, token=TOKEN, **where)
    policy = Policy(limits=limits or Limits(body_seconds=0.5))
    with running(exports().root / "one", where=listening, policy=policy, routes=processes.routes) as made:
        yield made


def read_all(caller: socket.socket) -> bytes:
    """Everything until the service closes the connection, which it must."""
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


def good(made: Running) -> None:
    """Health and a call are answered."""
    with made.client() as client:
        assert client.request("GET", "/health/live")[0] == 200
        assert len(client.rank(**CALL)["ids"]) == 3


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def floods(made: Running, sizes: Sizes) -> None:
    """Endless heads, trailers, chunk extensions and bodies: each ends after a bounded number of bytes, in flat memory."""
    line = b"x-%s: %s\r\n" % (b"n" * 20, b"v" * 4000)
    posts = {
        "trailers without a token": (CHUNKED + b"\r\n0\r\n", line),
        "trailers": (CHUNKED + KEY + b"\r\n0\r\n", line),
        "one endless trailer": (CHUNKED + KEY + b"\r\n2\r\n{}\r\n0\r\nx-endless: ", b"v" * 4000),
        "a chunk extension": (CHUNKED + KEY + b"\r\n2;name=", b"v" * 4000),
        "a head": (LIVE, line),
        "one endless header": (LIVE + b"x-endless: ", b"v" * 4000),
        "a path": (b"GET /", b"v" * 4000),
        "empty lines": (b"", b"\r\n" * 2000),
        "empty lines between requests": (LIVE + b"\r\n", b"\r\n" * 2000),
        "a body without a token": (CHUNKED + b"\r\n", b"fa0\r\n" + b"v" * 4000 + b"\r\n"),
        "a body that nobody reads": (
            CHUNKED.replace(b"/v1/rank", b"/none") + KEY + b"\r\n",
            b"fa0\r\n" + b"v" * 4000 + b"\r\n",
        ),
    }
    before = resident()
    for name, (first, part) in posts.items():
        with made.connect(first) as caller:
            sent = flood(caller, part, sizes.flood_bytes)
            assert sent < sizes.flood_bytes, f"{name}: {sent} bytes were taken"
        assert resident() < before + FLAT, name
    good(made)


def drips(made: Running, sizes: Sizes) -> None:
    """A byte from time to time, in a head, in a body and after an answer, all of it valid: every connection ends by itself."""
    chunks, other = b"1\r\nx\r\n", CHUNKED.replace(b"/v1/rank", b"/none")
    kinds = (
        (CHUNKED + b"\r\n", chunks), (CHUNKED + KEY + b"\r\n", chunks), (other + KEY + b"\r\n", chunks),
        (CHUNKED.replace(b"POST", b"PATCH") + KEY + b"\r\n", chunks), (CHUNKED + b"\r\n0\r\n", b"x: y\r\n"),
        (CHUNKED + KEY + b"\r\n2\r\n{}\r\n0\r\n", b"x: y\r\n"), (LIVE, b"x: y\r\n"), (b"", b"\r\n"), (LIVE + b"\r\n", b"\r\n"),
        (LIVE.replace(b"GET", b"POST") + KEY + b"content-length: 99999\r\n\r\n", b"x"),
        (LIVE + b"content-length: 99999\r\n\r\n", b"x"),
    )  # fmt: skip
    going = {made.connect(first): drip for first, drip in kinds for _ in range(max(1, sizes.drips // len(kinds)))}
    for place in range(600):  # a minute
        for caller, drip in list(going.items()):
            try:
                caller.sendall(drip[place % len(drip) :][:1])
            except ConnectionError:
                going.pop(caller)
                caller.close()
        if not going:
            break
        time.sleep(0.1)
    assert not going, f"{len(going)} connections are still there, with the drips {set(going.values())}"
    good(made)


def crowd(made: Running, sizes: Sizes, most: int) -> None:
    """More silent connections, and more with half a head or half a body, than may be open: health and calls are answered."""
    half = CHUNKED + KEY + b"\r\n5\r\n{"
    for said in (b"", LIVE, half, LIVE + b"\r\n"):
        with contextlib.ExitStack() as stack:
            callers = [stack.enter_context(made.connect(said)) for _ in range(most + sizes.crowd)]
            good(made)
            if said != LIVE + b"\r\n":
                for caller in callers[: sizes.crowd]:  # closed, the oldest first
                    read_all(caller)
                continue
            assert b" 200 " in callers[-1].recv(64)
            callers[-1].sendall(LIVE + b"\r\n")
            assert b"live" in callers[-1].recv(1 << 16)  # the youngest is kept


def pipelines(made: Running, sizes: Sizes) -> None:
    """Many requests at once: all are answered, in order, whatever comes after the last whole one."""
    count = sizes.pipelined
    paths = [(b"/health/live", 200), (b"/none", 404), (b"/v1/rank", 405), (b"/health/ready", 200)]
    asked = b"".join(b"GET %s HTTP/1.1\r\nhost: x\r\n%s\r\n" % (paths[n * n % 4][0], KEY) for n in range(count))
    wanted = [paths[n * n % 4][1] for n in range(count)]
    for rest, last in ((LIVE, []), (b"GET /x HTTP/9.9\r\n\r\n", [400]), (CHUNKED + KEY + b"\r\nzz\r\n", [400])):
        with made.connect() as caller:
            sender = threading.Thread(target=caller.sendall, args=(asked + rest,))
            sender.start()
            answers = read_all(caller)
            sender.join()
        statuses = [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [*wanted, *last], rest


def test_floods_end_in_flat_memory(monkeypatch):
    with service(monkeypatch) as made:
        floods(made, SMOKE)


def test_drips_end(monkeypatch):
    with service(monkeypatch, keep_alive=1) as made:
        drips(made, SMOKE)


def test_a_crowd_of_connections_keeps_nobody_out(monkeypatch):
    with service(monkeypatch, connections=8, limits=Limits(body_seconds=60)) as made:
        monkeypatch.setattr(process, "HEAD_SECONDS", 60)
        crowd(made, SMOKE, 8)


def test_pipelined_requests_are_answered_in_order(monkeypatch):
    with service(monkeypatch) as made:
        pipelines(made, SMOKE)


def test_more_calls_than_connections_get_503_and_health_is_answered():
    """Calls in flight are never ended for another; health has connections in reserve."""
    release, started = threading.Event(), threading.Semaphore(0)

    class Held:
        async def get(self, user):
            started.release()
            while not release.is_set():
                await asyncio.sleep(0.01)

    config = dataclasses.replace(SERVING, callable_timeout=60.0, budget=60.0)
    with running(exports().root / "one", where=Listening(http_port=0, connections=3), source=Held(), config=config) as made:
        with contextlib.ExitStack() as stack:
            stack.callback(release.set)
            callers = []
            for user in ("ann", "ben", "cat"):
                body = json.dumps({"user": user, "candidates": IDS.tolist(), "k": 3}).encode()
                head = b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
                said = head + b"content-length: %d\r\n\r\n" % len(body) + body
                callers.append(stack.enter_context(made.connect(said)))
                assert started.acquire(timeout=60)
            with made.client() as client:
                status, answer = posted(client, "/v1/rank", body)
                assert status == 503 and "expected at most 3 requests at once" in answer["error"]["message"]
                assert client.request("GET", "/health/live")[0] == 200
            release.set()
            assert all(read_all(caller).startswith(b"HTTP/1.1 200") for caller in callers)


def test_answers_that_nobody_reads_are_dropped(monkeypatch):
    monkeypatch.setattr(process, "UNREAD_SECONDS", 0.3)
    lost, bounded = threading.Event(), process.bounded

    def watched(base, **settings):
        class Watched(bounded(base, **settings)):
            def connection_lost(self, exc):
                lost.set()
                super().connection_lost(exc)

        return Watched

    monkeypatch.setattr(process, "bounded", watched)
    with service(monkeypatch) as made:
        caller = made.connect()
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.sendall(b"GET /page.js HTTP/1.1\r\nhost: x\r\n\r\n" * 800)  # 8 MB of answers for 27 kB
        assert lost.wait(60)
        caller.close()
        good(made)


def test_an_answer_before_the_end_of_a_body_says_that_it_closes(monkeypatch):
    with service(monkeypatch, limits=Limits(body_bytes=1000, body_seconds=0.3)) as made:
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
            caller.sendall(
                b"2\r\n{}\r\n0\r\nauthorization: Bearer x\r\nx-checksum: 7\r\n\r\n"
            )  # trailers, which are no headers
            assert b" 400 " in caller.recv(1 << 16)
            caller.sendall(LIVE + b"connection: close\r\n\r\n")  # a whole body leaves the connection open
            assert b'{"live":true}' in read_all(caller)


def test_a_caller_reads_the_refusal_of_a_large_body(monkeypatch):
    """A connection that is closed while bytes come would take the answer back."""
    with service(monkeypatch) as made, Client(made.addresses["http"], token="wrong") as client:
        for _ in range(5):
            status, _, _ = client.request("POST", "/v1/rank", bytes(4 << 20), {"content-type": "application/json"})
            assert status == 401


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_every_attack_at_full_size(monkeypatch):
    with service(monkeypatch, keep_alive=1) as made:
        floods(made, FULL)
        drips(made, FULL)
        pipelines(made, FULL)
    with service(monkeypatch, limits=Limits(body_seconds=60)) as made:
        monkeypatch.setattr(process, "HEAD_SECONDS", 60)
        crowd(made, FULL, Listening().connections)
