"""Training in two and four processes: 200 steps, a kill, checkpoints that go from number to number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aif_jax import checkpoint
from aif_jax.checkpoint import Checkpoints
from experiments.scale_out import training
from tests.conftest import child_environment
from tests.test_several_processes import PAIR, files, finish, start

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(1800)]

SAVE = """
state = run(batches(5), max_skipped=0)
with Checkpoints(folder / "two") as saved:
    saved.save(5, state.params, model.config, opt_state=state.opt_state)
"""
PASS_ON = """
with Checkpoints(folder / "two") as saved:
    like = {"params": place().params, "opt_state": place().opt_state}
    read = saved.restore(like=like, config=model.config)
assert read.params["embedding"]["item"].shape == (84, 4) and read.version == ""
with Checkpoints(folder / f"{count}") as saved:
    saved.save(5, read.params, model.config, opt_state=read.opt_state)
"""


def test_two_hundred_steps_and_a_kill():
    figures = training.measure(smoke=False)
    assert figures["two_process_loss_max_rel"] <= 1e-6
    assert figures["restart_bit_identical"]


def test_the_command_line_goes_on(tmp_path: Path):
    """One of two processes is killed by SIGKILL; the same command again ends bit for bit as one that was left alone."""
    words = [*files(tmp_path), "--epochs", "4", "--processes", "2", "--out"]
    environment = child_environment(writes=False)

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "aif_jax", *words, str(tmp_path / name)]

    def run(name: str) -> int:
        return subprocess.run(command(name), env=environment, timeout=600).returncode

    assert run("whole") == 0
    last = max(Checkpoints(tmp_path / "whole").steps)
    with subprocess.Popen(command("killed"), env=environment) as parent:
        while not (steps := Checkpoints(tmp_path / "killed").steps) and parent.poll() is None:
            time.sleep(0.01)
        assert parent.poll() is None and max(steps) < last
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert parent.wait(60) != 0
    assert max(Checkpoints(tmp_path / "killed").steps) < last  # it had not ended
    assert run("killed") == 0
    whole, again = (checkpoint.load(tmp_path / name / str(last)) for name in ("whole", "killed"))
    assert whole.version == again.version and whole.step == again.step == last


def test_two_to_four_to_one(tmp_path: Path):
    finish(start(tmp_path, PAIR + SAVE, 2))
    finish(start(tmp_path, PAIR + PASS_ON, 4))
    two, four = (checkpoint.load(tmp_path / name / "5") for name in ("two", "4"))
    assert two.version == four.version != ""
    jax.tree.map(np.testing.assert_array_equal, two.params, four.params)
    assert len(list((tmp_path / "4" / "5").glob("part-*"))) == 4
