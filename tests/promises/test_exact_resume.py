"""Exact resume: a run that is killed, at any moment and more than once, ends with the parameters of one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aif_jax.train.loop import JsonLines
from tests.conftest import child_environment

STEPS = 60
RUN = f"""
import sys, time
from pathlib import Path
import jax
import numpy as np
import aif_jax as aif
from aif_jax import blocks, train
from aif_jax.checkpoint import Checkpoints
from aif_jax.data.candidates import sampled_negatives
from aif_jax.data.pipeline import Pipeline, to_device
from aif_jax.data.split import sample_positions
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.train.loop import JsonLines
from aif_jax.train import losses
from experiments.datasets.synthetic import synthetic_world
from tests import demo

folder = Path(sys.argv[1])
dataset = synthetic_world(0, users=40, items=80, topics=12, categories=8, events_per_user=40, lag=8, content_dim=12).dataset
sizes = dict(width=4, short_length=3, towers=(), head=aif.heads.Mlp((8,)), sequence=False)  # compiles fast
config = demo.config(schema=dataset.schema, blocks=(blocks.Bea(bridges=2),), **sizes)
model = aif.build(config)
positions = sample_positions(dataset.log, min_history=1)
sampler = NegativeSampler(item_counts(dataset, positions))
feed = Pipeline(
    dataset=dataset, positions=positions, candidates=sampled_negatives(dataset, sampler=sampler, negatives=3), config=config,
    batch_size=64, epochs=3, buckets=(8,), window=5, seed=1,
)
optimizer = train.default_optimizer({STEPS}, learning_rate=3e-3, weight_decay=1e-5)
params = demo.init(model, items=dataset.catalogue)
state = train.init_state(params, optimizer)
step = train.make_step(model, optimizer, loss=losses.listwise_softmax + 0.1 * losses.pointwise_bce)

def slowly(batches):  # leaves the parent time to choose its moment
    for fed, _ in zip(batches, range({STEPS} - int(state.step)), strict=False):
        time.sleep(0.01)
        yield fed

with Checkpoints(folder / "run") as checkpoints:
    state, cursor = train.resume(state, checkpoints, config=config)
    with to_device(slowly(feed.batches(cursor))) as batches:
        log = JsonLines(folder / "log.jsonl")
        state = train.loop(
            state, step, batches, save=train.Saving(checkpoints, config, dataset.encoder, every=7), log_every=1,
            writers=[log], progress=False,
        )
np.savez(folder / "end.npz", *[np.asarray(leaf) for leaf in jax.tree.leaves(state)])
"""


def start(folder: Path, *, killed: bool = False) -> subprocess.Popen:
    command, environment = [sys.executable, "-c", RUN, str(folder)], child_environment(writes=not killed)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> None:
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, output.decode()


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in JsonLines(folder / "log.jsonl").rows()]


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.reliability)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))
    rng = np.random.default_rng()
    moments = np.sort(rng.choice(np.arange(2, STEPS - 10), kills, replace=False))
    for moment in moments:
        process = start(killed, killed=True)
        while process.poll() is None and max(steps(killed), default=0) < moment:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        assert process.poll() is None, f"ended before it was killed: {process.communicate()[0].decode()}"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert not (killed / "end.npz").exists()
    finish(start(killed))
    assert steps(killed) == steps(whole) == list(range(1, STEPS + 1)), moments
    seen = [[row["loss"] for row in JsonLines(folder / "log.jsonl").rows()] for folder in (whole, killed)]
    assert seen[0] == seen[1], moments
    ends = [np.load(folder / "end.npz") for folder in (whole, killed)]
    assert ends[0].files == ends[1].files and len(ends[0].files) > 30
    for name in ends[0].files:
        np.testing.assert_array_equal(ends[0][name], ends[1][name], err_msg=f"killed at about steps {moments}")
