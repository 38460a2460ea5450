"""Training in two and four processes: 200 steps, a kill, checkpoints that go from number to number."""

import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from tests import process_training as training
from tests.test_several_processes import PAIR, finish, fit_code, start, write_files

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
assert read.params["embedding"]["item"].shape == (84, 4)
with Checkpoints(folder / f"{count}") as saved:
    saved.save(5, read.params, model.config, opt_state=read.opt_state)
"""


def test_two_hundred_steps_and_a_kill():
    difference, same = training.measure()
    assert difference <= 1e-6 and same


def test_fit_goes_on(tmp_path: Path):
    """One of two processes is killed by SIGKILL; the same call again ends bit for bit as one that was left alone."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name)
    finish(start(tmp_path / "whole", fit_code(4), 2))
    whole, killed = (aif.Checkpoints(tmp_path / name / "run-2") for name in ("whole", "killed"))
    last, started = whole.latest, start(tmp_path / "killed", fit_code(4), 2)
    try:
        while not killed.steps and started[1].poll() is None:
            time.sleep(0.01)
        os.kill(started[1].pid, signal.SIGKILL)
        assert started[0].wait(200) != 0
    finally:
        training.stop(started)
    assert last is not None and max(killed.steps) < last  # it had not ended
    finish(start(tmp_path / "killed", fit_code(4), 2))
    one, other = (runs.restore(last) for runs in (whole, killed))
    assert one.version == other.version and one.step == other.step == last


def test_two_to_four_to_one(tmp_path: Path):
    finish(start(tmp_path, PAIR + SAVE, 2))
    finish(start(tmp_path, PAIR + PASS_ON, 4))
    two, four = (aif.checkpoint.load(tmp_path / name / "5") for name in ("two", "4"))
    assert two.version == four.version != ""
    jax.tree.map(np.testing.assert_array_equal, two.params, four.params)
