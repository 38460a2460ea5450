"""Callers of a service over HTTP that each wait for their answer, in a process that `service_load` starts.

Callers are threads with plain sockets: they take a third to two thirds of the processor time of asyncio's clients, which
matters where clients and service share the cores.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


class Load(NamedTuple):
    """What callers saw together."""

    rps: float  # requests a second
    client_ms: float  # processor time of the callers' process for one request
    requests: int


@contextlib.contextmanager
def caller(address: str, calls: list[bytes]) -> Iterator[Callable[[int], bytes]]:
    """Lend `caller(user)`, the raw answer to one ranking, over a connection that stays open; calls are packed, by user."""
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/rank HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: "
    whole = [f"{head}{len(call)}\r\n\r\n".encode() + call for call in calls]
    with socket.create_connection((host, int(port))) as connection, connection.makefile("rb") as answers:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def line() -> bytes:
            if not (read := answers.readline()):
                raise ConnectionError("the service closed the connection")
            return read

        def rank(user: int) -> bytes:
            connection.sendall(whole[user])
            status, *lines = iter(line, b"\r\n")
            length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
            body = answers.read(length)
            if b" 200 " not in status:
                raise RuntimeError(f"{status.decode()}: {body[:200]!r}")
            return body

        yield rank


def load(address: str, calls: Path, *, callers: int, seconds: float) -> Load:
    """Load of a process with so many callers; `calls` is a JSON file of packed calls."""
    command = [sys.executable, "-m", "experiments.callers", address, str(calls), str(callers), str(seconds)]
    return Load(*json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def closed_loop(address: str, calls: list[bytes], callers: int, seconds: float) -> Load:
    """Return callers in threads, each of which sends its next call when it has the answer to the last one."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(callers) as threads:
        ranks = [stack.enter_context(caller(address, calls)) for _ in range(callers)]
        for rank, user in itertools.product(ranks, range(len(calls))):
            rank(user)  # states are cached from here on
        start, cpu = time.perf_counter(), time.process_time()

        def run(number: int) -> int:
            count = 0
            while time.perf_counter() < start + seconds:
                ranks[number]((number + count) % len(calls))
                count += 1
            return count

        requests = sum(threads.map(run, range(callers)))
        return Load(requests / (time.perf_counter() - start), 1e3 * (time.process_time() - cpu) / max(requests, 1), requests)


if __name__ == "__main__":
    address, file, callers, seconds = sys.argv[1:]
    packed = [call.encode() for call in json.loads(Path(file).read_text(encoding="utf-8"))]
    print(json.dumps(closed_loop(address, packed, int(callers), float(seconds))))
