"""Clients in other languages, compiled from the files that the pages show and run against a service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aif_jax.service import processes
from aif_jax.service.process import Listening
from tests.service_world import EVENTS, NOW, exports, running

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, STUBS = ROOT / "docs" / "clients", ROOT / "aif_jax" / "service" / "stubs"
DEBIAN = Path("/usr/share/gocode")  # where Debian puts packages of Go


@pytest.fixture(scope="module")
def served():
    """A service with HTTP and gRPC."""
    where = Listening(http_port=0, grpc_port=0)
    with running(exports().root / "one", where=where, routes=processes.routes, grpc=processes.start_grpc) as service:
        yield service


def tools(*names: str) -> None:
    """Skips where a tool is missing, and says which."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def call(*words: object, folder: Path, **environment: str) -> str:
    """What a command prints; an AssertionError with its errors if it fails."""
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, capture_output=True, text=True, timeout=240,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expect_answer(served, printed: str) -> None:
    """The ids and scores of the client are those of a call from Python."""
    with served.client() as client:
        answer = client.rank(user="ann", events=EVENTS, now=NOW, candidates=[17, 1017, 2017, 3017], k=2)
    lines = [line.split() for line in printed.splitlines()]
    assert [int(line[0]) for line in lines] == answer["ids"].tolist()
    assert [float(line[1]) for line in lines] == pytest.approx(answer["scores"].tolist(), rel=1e-4)


def test_a_client_in_cpp(served, tmp_path):
    tools("g++", "protoc", "grpc_cpp_plugin", "pkg-config")
    if subprocess.run(["pkg-config", "--exists", "grpc++"]).returncode:
        pytest.skip("needs libgrpc++-dev")
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_cpp_plugin')}"
    call("protoc", "-I", STUBS, f"--cpp_out={tmp_path}", f"--grpc_out={tmp_path}", plugin, "preranking.proto", folder=tmp_path)
    libraries = call("pkg-config", "--libs", "grpc++", "protobuf", folder=tmp_path).split()
    files = [CLIENTS / "cpp" / "rank.cc", "preranking.pb.cc", "preranking.grpc.pb.cc"]
    call("g++", "-std=c++17", "-O0", "-I.", *files, *libraries, "-labsl_synchronization", "-o", "rank", folder=tmp_path)
    expect_answer(served, call("./rank", served.addresses["grpc"], folder=tmp_path))


def test_a_client_in_go(served, tmp_path):
    tools("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    if not (DEBIAN / "src" / "google.golang.org" / "grpc").is_dir():
        pytest.skip("needs golang-google-grpc-dev")
    page = (ROOT / "docs" / "other_languages.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(G=.*?)^```", page, re.S | re.M)
    for name in ("docs", "aif_jax"):  # the block runs in a clone
        (tmp_path / name).symlink_to(ROOT / name)
    words = "set -eu\n" + block.replace("127.0.0.1:8081", served.addresses["grpc"])
    expect_answer(served, call("bash", "-c", words, folder=tmp_path, GOFLAGS="-p=2"))


def test_a_client_in_java(served, tmp_path):
    tools("javac", "java", "protoc", "grpc_java_plugin")
    page = (ROOT / "docs" / "other_languages.md").read_text(encoding="utf-8")
    classpath = re.search(r"^J=/usr/share/java; export CLASSPATH=.*$", page, re.M)
    assert classpath is not None
    jars = call("bash", "-c", f"{classpath[0]}; echo $CLASSPATH", folder=tmp_path).strip()
    if missing := [jar for jar in jars.split(":") if not Path(jar).exists()]:
        pytest.skip(f"needs libgrpc-java: {', '.join(missing)}")
    plugin = f"--plugin=protoc-gen-grpc-java={shutil.which('grpc_java_plugin')}"
    outputs = [f"--java_out={tmp_path}", f"--grpc-java_out={tmp_path}"]
    call("protoc", "-I", STUBS, *outputs, plugin, "preranking.proto", folder=tmp_path)
    stubs = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("aif_jax/v1/*.java"))
    call("javac", "-proc:none", "-d", ".", CLIENTS / "java" / "Rank.java", *stubs, folder=tmp_path, CLASSPATH=jars)
    expect_answer(served, call("java", "Rank", served.addresses["grpc"], folder=tmp_path, CLASSPATH=jars))


def test_a_client_in_java_over_http(served, tmp_path):
    """Java's own client offers HTTP/2 with every request, which a server may ignore."""
    tools("java", "javac")
    printed = call("java", CLIENTS / "java" / "RankHttp.java", served.addresses["http"], folder=tmp_path)
    answers = [json.loads(line.removeprefix("200 ")) for line in printed.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        expect_answer(served, "\n".join(f"{id} {score}" for id, score in zip(answer["ids"], answer["scores"], strict=True)))
