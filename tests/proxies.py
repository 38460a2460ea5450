"""The proxy of docs/scale.md before replicas; its file is what runs here."""

import contextlib
import csv
import io
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.servers import connects, free_port, running

DEPLOY = Path(__file__).resolve().parent.parent / "docs" / "deploy"
Proxy = Literal["haproxy", "nginx"]
FILES: dict[Proxy, str] = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
"""What docs/scale.md recommends."""


def proxy_text(name: Proxy) -> str:
    """The configuration of a proxy that the page links to."""
    return (DEPLOY / FILES[name]).read_text(encoding="utf-8")


def proxy_config(name: Proxy, addresses: Sequence[str], *, port: int, stats: int, affinity: bool = True) -> str:
    """That configuration with the addresses of this machine; without `affinity`, calls go round robin."""
    text, hosts = proxy_text(name), [address.removeprefix("http://") for address in addresses]
    if name == "haproxy":
        lines = [line for line in text.splitlines() if not re.match(r"\s+server ", line)]
        (server,) = (line for line in text.splitlines() if re.match(r"\s+server replica-1 ", line))
        lines += [
            server.replace("replica-1:8080", host).replace("replica-1 ", f"replica-{place} ")
            for place, host in enumerate(hosts)
        ]
        text = "\n".join(lines) + "\n"
        text = _once(text, "bind :8000", f"bind 127.0.0.1:{port}")
        text = _once(text, "bind 127.0.0.1:8404", f"bind 127.0.0.1:{stats}")
        return text if affinity else _once(text, "balance hdr(x-aif-user)", "balance roundrobin")
    (server,) = (line for line in text.splitlines() if "server replica-1:8080" in line)
    text = re.sub(r"^\s+server replica-\d+:.*\n", "", text, flags=re.M)
    servers = "\n".join(server.replace("replica-1:8080", host) for host in hosts)
    hashed = "    hash $http_x_aif_user consistent;\n"
    text = _once(text, hashed, f"{hashed if affinity else ''}{servers}\n")
    text = _once(text, "listen 8000", f"listen 127.0.0.1:{port}")
    before = f"daemon off; master_process off; pid nginx-{port}.pid; error_log stderr; events {{ worker_connections 4096; }}"
    return f"{before}\nhttp {{ access_log off;\n{text}}}\n"


@contextlib.contextmanager
def proxy(
    name: Proxy, addresses: Sequence[str], folder: Path, *, affinity: bool = True, changes: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """Runs a proxy until the end of the block; yields its address, and that of its counters (HAProxy alone has them).

    `changes` are texts of its configuration and what a test has in their place.
    """
    program = find(name)
    port, stats = free_port(), free_port()
    file = folder / f"{name}-{port}.cfg"
    text = proxy_config(name, addresses, port=port, stats=stats, affinity=affinity)
    for old, new in (changes or {}).items():
        if old not in text:
            raise ValueError(f"{name}: expected {old!r} in its configuration, got none")
        text = text.replace(old, new)
    file.write_text(text)
    command = [program, "-f", str(file)] if name == "haproxy" else [program, "-c", str(file), "-p", str(folder)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / f"{name}-{port}.log").open("w+"))
        try:
            stack.enter_context(running(command, lambda: connects(port), log=log))
        except OSError as error:
            log.seek(0)
            raise RuntimeError(f"{name} did not start:\n{log.read()}") from error
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{stats}"


def find(name: Proxy) -> str:
    """The program of a proxy; Debian has it where only root's path leads. Skips the test where there is none."""
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    return program or pytest.skip(f"needs the program {name} (Debian: apt-get install {name})")


def counters(stats: str) -> dict[str, dict[str, Any]]:
    """What HAProxy counts, by server of the backend: `status`, and among others `wretr`, `wredis` (calls that were sent again,
    to another server), `stot` (calls), `econ` (connections that failed).
    """
    with urllib.request.urlopen(f"{stats}/stats;csv", timeout=10) as response:
        text = response.read().decode().removeprefix("# ")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["pxname"] == "replicas"]
    return {row["svname"]: {name: int(value) if value.isdigit() else value for name, value in row.items()} for row in rows}


def await_up(stats: str, wanted: int) -> None:
    """Waits until HAProxy's checks find that many servers up."""
    until = time.monotonic() + 60
    while sum(str(row["status"]).startswith("UP") for name, row in counters(stats).items() if name != "BACKEND") != wanted:
        if time.monotonic() > until:
            raise RuntimeError(f"expected {wanted} replicas up, got {counters(stats)}")
        time.sleep(0.05)


def _once(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{DEPLOY.name}: expected {old!r} once, got it {text.count(old)} times")
    return text.replace(old, new)
