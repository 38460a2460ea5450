"""Clients in other languages: the files that the pages show, run against a service."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service_world import EVENTS, NOW, exports, running

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ROOT / "docs" / "clients"


@pytest.fixture(scope="module")
def served():
    with running(exports().root / "one") as service:
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


def test_a_client_in_java(served, tmp_path):
    """Java's own client, told to speak HTTP/1.1: with its offer of HTTP/2 the service would not find the body."""
    tools("java", "javac")
    printed = call("java", CLIENTS / "java" / "RankHttp.java", served.addresses["http"], folder=tmp_path)
    answers = [json.loads(line.removeprefix("200 ")) for line in printed.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        expect_answer(served, "\n".join(f"{id} {score}" for id, score in zip(answer["ids"], answer["scores"], strict=True)))
