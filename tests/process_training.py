"""A small training; and what starts a function in several processes of one job, each by `-m tests.process_training`."""

import importlib
import itertools
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import blocks, sharding, train
from aif_jax.data import NegativeSampler, Pipeline, item_counts, sampled_negatives, to_device
from aif_jax.data.split import sample_positions
from aif_jax.sharding.processes import end_at_once
from aif_jax.train.loop import JsonLines
from aif_jax.train.training import init_params
from experiments.datasets.synthetic import synthetic_world
from tests.conftest import ROOT, child_environment


def start(work: Callable[..., object], folder: Path, count: int, *numbers: int) -> list[subprocess.Popen]:
    """Starts `work(folder, index, count, *numbers)`, a function of a module, in `count` processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "tests.process_training", work.__module__, work.__name__, str(folder), address, str(count)]
    options = dict(cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [subprocess.Popen([*words, *map(str, (index, *numbers))], **options) for index in range(count)]


def finish(started: list[subprocess.Popen]) -> None:
    """Waits until all have ended; AssertionError with what they said where one has failed."""
    try:
        outputs = [process.communicate(timeout=280)[0] for process in started]
    finally:
        stop(started)
    assert [process.returncode for process in started] == [0] * len(started), "\n\n".join(outputs)


def stop(started: list[subprocess.Popen]) -> None:
    """Kills those that run: a process of `jax.distributed` ignores SIGTERM until its next step."""
    for process in started:
        process.kill()
        process.wait()


def losses(folder: Path) -> np.ndarray:
    """The loss of every step that `run` has logged, float64 [steps]."""
    file = folder / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return np.array([json.loads(line)["loss"] for line in lines if line.endswith("\n")])


def world(process_index: int, process_count: int) -> tuple[aif.PreRanker, Pipeline, Any, Any]:
    """A small model, its data as batches, an optimizer and fresh parameters; 81 items, which two processes do not divide."""
    data = synthetic_world(0, users=40, items=80, topics=12, categories=8, events_per_user=40, lag=8, content_dim=12).dataset
    sizes: dict[str, Any] = dict(width=4, short_length=3, long_length=12, towers=(), head=aif.heads.Mlp((8,)), sequence=False)
    model = aif.build(aif.Config(schema=data.schema, blocks=(blocks.Bea(bridges=2),), **sizes))
    positions = sample_positions(data.log, min_history=1)
    source = sampled_negatives(data, sampler=NegativeSampler(item_counts(data, positions)), negatives=3)
    feed = Pipeline(
        dataset=data, positions=positions, source=source, config=model.config, batch_size=64, epochs=30, seed=1,
        process_index=process_index, process_count=process_count,
    )  # fmt: skip
    return model, feed, train.default_optimizer(200), init_params(model, data, seed=0)


def step_of(model: aif.PreRanker, optimizer: Any) -> Callable[..., Any]:
    """The training step of that world."""
    return train.make_step(model, optimizer, loss=train.losses.listwise_softmax, sparse=("item",))


def go_on(made: tuple[aif.PreRanker, Pipeline, Any, Any], checkpoints: aif.Checkpoints, steps: int, **options: Any) -> Any:
    """Trains a world from its newest checkpoint to so many steps; saves every nine, and returns the state."""
    model, feed, optimizer, params = made
    mesh = sharding.row_mesh()
    state = sharding.place_state(train.init_state(params, optimizer), mesh)
    state, cursor = train.resume(state, checkpoints, config=model.config)
    with to_device(feed.batches(cursor), place=lambda batch: sharding.place_batch(batch, mesh)) as batches:
        rest, saving = itertools.islice(batches, steps - int(state.step)), train.Saving(checkpoints, model.config, every=9)
        return train.loop(state, step_of(model, optimizer), rest, log_every=1, save=saving, progress=False, **options)


def run(folder: Path, index: int, count: int, steps: int) -> None:
    """Trains in a folder, from wherever it is; logs every step, and writes the state's leaves of this process at the end."""
    with aif.Checkpoints(folder / "run") as checkpoints:
        state = go_on(world(index, count), checkpoints, steps, log=JsonLines(folder / "log.jsonl"))
    np.savez(folder / f"end-{index}.npz", *[np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(state)])


if __name__ == "__main__":
    module, name, folder, address, *numbers = sys.argv[1:]
    count, index, *more = map(int, numbers)
    if count > 1:
        jax.distributed.initialize(address, count, index)
    with end_at_once():
        getattr(importlib.import_module(module), name)(Path(folder), index, count, *more)
