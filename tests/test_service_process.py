"""The command `serve` as a process: ready after warm-up, drained on SIGTERM, logs; a client in another language."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aif_jax import cli
from aif_jax.connectors import SnapshotStore
from aif_jax.export import RestoredModel
from aif_jax.service.core import Service
from aif_jax.service.current import ExportEntry, publish
from aif_jax.service.models import Models
from aif_jax.service.process import Listening, run
from aif_jax.serving import AsyncPreRanker
from tests.client import Client, ServiceError
from tests.conftest import ROOT, child_environment
from tests.service_world import ANN, EVENTS, IDS, NOW, connected, exports, read_log, running

pytestmark = pytest.mark.lane("standing")


@contextlib.contextmanager
def serving(*words):
    """Starts `aif-jax serve`; yields the process and its addresses."""
    command = [sys.executable, "-m", "aif_jax", "serve", *map(str, words), "--port", "0"]
    command += ["--serving.buckets", "64", "--serving.max-k", "8"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=child_environment(), **pipes) as process:
        try:
            if not (line := process.stdout.readline()):
                raise AssertionError(process.communicate(timeout=60)[1])
            yield process, json.loads(line)
        finally:
            process.kill()


def test_a_process_serves_by_its_flags_and_drains_on_sigterm(tmp_path):
    """Flags are heeded, a fetched index serves, and after SIGTERM each call is answered or its connection refused."""
    world = exports()
    world.index["one"].save(tmp_path / "made", positions={3: 14})
    SnapshotStore(tmp_path / "store").publish(tmp_path / "made")
    assert cli.main(["snapshots", "fetch", str(tmp_path / "store"), str(tmp_path / "index")]) == 0
    words = [world.root / "one", "--index", tmp_path / "index", "--log", tmp_path / "log", "--drain-delay", 0.3]
    words += ["--features", "tests.test_service_log:Source"]
    with serving(*words) as (process, addresses):
        with Client(addresses["http"]) as client:
            answer = client.rank(**ANN, candidates=IDS, k=3)
            assert not answer["degraded"] and answer["stages"]["user"] > 0
            assert not client.rank(user="bob", candidates=IDS, k=3)["degraded"]  # by the feature source
            text = client.request("GET", "/metrics")[2].decode()
            assert "aif_index_position{" in text and 'partition="3"' in text and "aif_index_age_seconds{" in text
        with connected(addresses["http"], b"no HTTP\r\n\r\n") as caller:
            assert b" 400 " in caller.recv(1 << 16)
        answered, errors, stop = [], [], threading.Event()

        def load():
            with Client(addresses["http"]) as client:
                while not stop.is_set():
                    try:
                        answered.append(client.rank(**ANN, candidates=IDS, k=3)["ids"].tolist())
                    except (OSError, ServiceError) as error:
                        return errors.append(error)
                    except Exception as error:  # a connection that was closed between two calls
                        return errors.append(OSError(str(error)))

        with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as end:
            end.callback(stop.set)
            for _ in range(4):
                pool.submit(load)
            while len(answered) < 40:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        log = process.stderr.read()
    assert len({tuple(ids) for ids in answered}) == 1
    assert all(isinstance(error, OSError) or error.code == "UNAVAILABLE" for error in errors), errors
    assert " INFO aif_jax.service.process: draining\n" in log
    (warning,) = [line for line in log.splitlines() if " INFO " not in line]
    assert warning.endswith(" WARNING uvicorn.error: Invalid HTTP request received.")
    assert len(list(read_log(tmp_path / "log"))) >= len(answered)


@pytest.fixture
def compiles(monkeypatch):
    """What a test that may compile nothing must not call."""
    monkeypatch.setattr(RestoredModel, "check_golden", lambda *given: pytest.fail("golden outputs were computed"))
    monkeypatch.setattr(AsyncPreRanker, "__aenter__", lambda *given: pytest.fail("an engine was warmed up"))


@pytest.mark.usefixtures("compiles")
def test_a_port_that_is_taken_is_found_before_anything_is_compiled(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", str(exports().root / "one"), "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("package", ["uvicorn", "httptools", "orjson", "uvloop", "pyarrow"])
def test_a_missing_package_is_found_before_anything_is_compiled(package, tmp_path, monkeypatch, capsys):
    folder = str(exports().root / "one")
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["serve", folder, "--port", "0", "--log", str(tmp_path / "log")]) == 2
    assert f'pip install "aif_jax[{"data" if package == "pyarrow" else "service"}]"' in capsys.readouterr().err


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("damaged", ["params.safetensors", "encoder.safetensors", "index.safetensors", "manifest.json"])
def test_a_model_that_cannot_be_read_is_found_before_anything_is_compiled(damaged, tmp_path, capsys):
    """Also where it is the second of two, of which the first is fine."""
    exports().copied(tmp_path)
    publish(tmp_path, [ExportEntry("one"), ExportEntry("two", share=0.5)])
    file = tmp_path / "two" / damaged
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert str(tmp_path / "two") in capsys.readouterr().err


def test_a_signal_during_the_start_ends_it(monkeypatch, capsys):
    async def start(models):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)  # compiles

    monkeypatch.setattr(Models, "start", start)
    asyncio.run(asyncio.wait_for(run(Service(Models(exports().root / "one")), Listening(port=0)), 30))
    assert "ready" not in capsys.readouterr().out


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize(("words", "code", "message"), [
    (["none"], 2, "expected an exported folder"),
    (["."], 2, "got neither"),
    (["s3://bucket/models"], 2, "expected a folder, or the URL of a store, file:///PATH on disk, and --mirror"),
    (["FOLDER", "--mirror", "here"], 2, "expected a folder, or the URL of a store, file:///PATH on disk, and --mirror"),
    (["s3://nobody/model", "--mirror", "here"], 1, "s3://nobody/model: cannot be read or written: "),
    (["file:///nowhere/at/all", "--mirror", "here"], 2, "expected a store with a current snapshot"),
    (["FOLDER", "--serving.buckets"], 2, "ServingConfig.buckets"),
    (["FOLDER", "--serving.colour", "1"], 2, "Unknown option: --serving.colour"),
    (["FOLDER", "--log", "log", "--log-share", "2"], 2, "log_share: expected 0 to 1, got 2"),
    (["FOLDER", "--log-share", "0.5"], 2, "--log-share: expected --log DIR"),
    (["FOLDER", "--features", "json:nothing"], 2, "expected MODULE:NAME"),
    (["FOLDER", "--features", "json"], 2, "--features: json: expected MODULE:NAME of a feature source"),
    (["FOLDER", "--max-bytes", "0"], 2, "max_bytes: expected more than 0"),
    (["FOLDER", "--host", ""], 2, "host: expected an address"), (["FOLDER", "--drain-delay", "inf"], 2, "a finite number"),
    (["FOLDER", "--token-file", "EMPTY"], 2, "got an empty file"), (["FOLDER", "--token-file", "TWO"], 2, "or several words"),
])  # fmt: skip
def test_exit_codes_before_anything_is_compiled(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").touch()
    Path("TWO").write_text("old\nnew\n")
    nowhere = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": "http://127.0.0.1:9", "MAX_ATTEMPTS": "1"}
    for name, value in nowhere.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    folder = str(exports().root / "one")
    assert cli.main(["serve", *(folder if word == "FOLDER" else word for word in words), "--port", "0"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("javac") is None, reason="needs java and javac")
def test_a_client_in_java(tmp_path):
    """Java's own client, told to speak HTTP/1.1: with its offer of HTTP/2 the service would not find the body."""
    with running(exports().root / "one") as served, served.client() as client:
        command = ["java", ROOT / "docs" / "clients" / "java" / "RankHttp.java", served.addresses["http"]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        expected = client.rank(user="ann", events=EVENTS, now=NOW, candidates=[17, 1017, 2017, 3017], k=2)
    answers = [json.loads(line.removeprefix("200 ")) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert answer["ids"] == expected["ids"].tolist()
        assert answer["scores"] == pytest.approx(expected["scores"].tolist(), rel=1e-4)
