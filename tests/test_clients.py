"""Clients in other languages: the files that the pages show, run against a service."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.service_world import EVENTS, NOW, exports, running

pytestmark = pytest.mark.lane("standing")


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
