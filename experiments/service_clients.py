"""Clients of a service: callers that each wait for their answer, in processes that `service_load` starts.

Callers are threads with plain sockets: they take a third to two thirds of the processor time of asyncio's clients, which
matters where clients and service share the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

Caller = Callable[[int], bytes]
"""`caller(user)` is the raw answer to one ranking."""


class Load(NamedTuple):
    """What client processes saw together."""

    rps: float  # requests a second
    client_ms: float  # processor time of a client for one request
    requests: int


@contextlib.contextmanager
def caller(address: str, calls: list[bytes]) -> Iterator[Caller]:
    """One caller with a connection that stays open; calls are packed, by user."""
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/rank HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: "
    whole = [f"{head}{len(call)}\r\n\r\n".encode() + call for call in calls]
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def more() -> bytes:
            data = connection.recv(1 << 16)
            if not data:
                raise ConnectionError("the service closed the connection")
            return data

        def rank(user: int) -> bytes:
            connection.sendall(whole[user])
            data = more()
            while (end := data.find(b"\r\n\r\n")) < 0:
                data += more()
            lines, body = data[:end].lower().split(b"\r\n"), data[end + 4 :]
            length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            while len(body) < length:
                body += more()
            if b" 200 " not in lines[0]:
                raise RuntimeError(f"{lines[0].decode()}: {body[:200]!r}")
            return body

        yield rank


def packed(folder: Path) -> list[bytes]:
    """The calls, by user."""
    return [(folder / str(user)).read_bytes() for user in range(len(list(folder.iterdir())))]


def load(address: str, calls: Path, *, callers: int, seconds: float) -> Load:
    """Load of a client process with so many callers."""
    words = ["--callers", str(callers), "--seconds", str(seconds), address, str(calls)]
    command = [sys.executable, "-m", "experiments.service_clients", *words]
    return Load(*json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def main() -> None:
    """One client process; prints its `Load` as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("calls", type=Path, help="folder of packed calls")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    print(json.dumps(closed_loop(parser.parse_args())))


def closed_loop(options: Any) -> Load:
    """Callers in threads, each of which sends its next call when it has the answer to the last one."""
    calls, counts = packed(options.calls), [0] * options.callers
    ready = threading.Barrier(options.callers + 1)
    start = cpu = end = 0.0

    def run(number: int) -> None:
        try:
            with caller(options.address, calls) as rank:
                for user in range(len(calls)):
                    rank(user)  # states are cached from here on
                ready.wait()
                ready.wait()
                while time.perf_counter() < end:
                    rank((number + counts[number]) % len(calls))
                    counts[number] += 1
        except BaseException:
            ready.abort()
            raise

    with ThreadPoolExecutor(options.callers) as threads:
        running = [threads.submit(run, number) for number in range(options.callers)]
        with contextlib.suppress(threading.BrokenBarrierError):
            ready.wait()
            start, cpu = time.perf_counter(), time.process_time()
            end = start + options.seconds
            ready.wait()
    if failures := [error for future in running if (error := future.exception())]:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    requests = sum(counts)
    return Load(requests / (time.perf_counter() - start), 1e3 * (time.process_time() - cpu) / max(requests, 1), requests)


if __name__ == "__main__":
    main()
