"""Replicas on Ray Serve, in a process of their own: Ray's imports warn."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

RUN = "import json; from tests.ray_replicas import measure; print(json.dumps(measure()))"


@pytest.mark.lane("engines")
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra 'ray'")
def test_affinity():
    """Users find their states as often as is possible, half as often by Ray's own router, also after a replica died."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["affinity_hit_share_gap"] < 2 and got["default_hit_share"] < got["ideal_hit_share"] - 0.1
    assert got["hit_share_after_death"] == 1 and got["mixed_answers"] == 0
