"""A small training in one or two processes, started here as `python -m tests.process_training`, killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 200
SAVE_EVERY = 9


def measure(steps: int = STEPS) -> tuple[float, bool]:
    """The largest relative difference of the loss of two processes to one, and whether a killed run ends with the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        one, two, killed = (Path(folder) / name for name in ("one", "two", "killed"))
        finish(begin(one, 1, steps))
        finish(begin(two, 2, steps))
        kill(killed, steps, at=steps // 2)
        finish(begin(killed, 2, steps))
        expected, got = losses(one), losses(two)
        if len(expected) != steps:
            raise RuntimeError(f"expected {steps} steps, got {len(expected)}")
        same = bool((losses(killed) == got).all()) and all(equal(two, killed, process) for process in range(2))
    return float(np.max(np.abs(got - expected) / np.abs(expected))), same


def begin(folder: Path, count: int, steps: int) -> list[Any]:
    """Starts a run in `count` processes; it goes on with what is in the folder."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "tests.process_training", str(folder), str(steps), str(count)]
    return start(words, count)


def start(words: list[str], count: int, **options: Any) -> list[subprocess.Popen]:
    """Starts a command `count` times, with the address of process 0 and the number of the process as its last words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [subprocess.Popen([*words, address, str(index)], **options) for index in range(count)]


def finish(started: list[subprocess.Popen]) -> None:
    """Waits for a run; RuntimeError where it failed, once all are gone."""
    try:
        while any(process.poll() is None for process in started) and not any(process.returncode for process in started):
            time.sleep(0.05)
    finally:
        stop(started)
    if any(process.returncode for process in started):
        raise RuntimeError(f"a run ended with exit codes {[process.returncode for process in started]}")


def stop(started: list[subprocess.Popen]) -> None:
    """Kills those that run: a process of `jax.distributed` ignores SIGTERM until its next step."""
    for process in started:
        process.kill()
        process.wait()


def kill(folder: Path, steps: int, *, at: int) -> None:
    """Starts two processes, kills the second after that many steps, and waits until the first has ended by itself."""
    started = begin(folder, 2, steps)
    try:
        while len(losses(folder)) < at:
            if any(process.poll() is not None for process in started):
                raise RuntimeError("expected a run that is killed, it ended before")
            time.sleep(0.01)
        os.kill(started[1].pid, signal.SIGKILL)
        code = started[0].wait(timeout=200)
        if code == 0:
            raise RuntimeError("expected that the other process fails, it ended well")
    finally:
        stop(started)


def losses(folder: Path) -> np.ndarray:
    """The loss of every step that is logged, float64 [steps]."""
    file = folder / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return np.array([json.loads(line)["loss"] for line in lines if line.endswith("\n")])


def equal(one: Path, other: Path, process: int) -> bool:
    """Whether a process of two runs ended with the same bits."""
    a, b = (np.load(folder / f"end-{process}.npz") for folder in (one, other))
    return a.files == b.files and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a.files)


def world(process_index: int, process_count: int) -> tuple[Any, Any, Any, Any]:
    """A small model, its data as batches, an optimizer and fresh parameters; 81 items, which two processes do not divide."""
    import aif_jax as aif
    from aif_jax import blocks, train
    from aif_jax.data import NegativeSampler, Pipeline, item_counts, sampled_negatives
    from aif_jax.data.split import sample_positions
    from aif_jax.train.training import init_params
    from experiments.datasets.synthetic import synthetic_world

    data = synthetic_world(0, users=40, items=80, topics=12, categories=8, events_per_user=40, lag=8, content_dim=12).dataset
    sizes: dict[str, Any] = dict(width=4, short_length=3, long_length=12, towers=(), head=aif.heads.Mlp((8,)), sequence=False)
    model = aif.build(aif.Config(schema=data.schema, blocks=(blocks.Bea(bridges=2),), **sizes))
    positions = sample_positions(data.log, min_history=1)
    source = sampled_negatives(data, sampler=NegativeSampler(item_counts(data, positions)), negatives=3)
    feed = Pipeline(
        dataset=data, positions=positions, source=source, config=model.config, batch_size=64, epochs=30, seed=1,
        process_index=process_index, process_count=process_count,
    )  # fmt: skip
    return model, feed, train.default_optimizer(STEPS), init_params(model, data, seed=0)


def run(folder: Path, steps: int, count: int, address: str, index: int) -> None:
    """What one process does."""
    import itertools

    import jax

    if count > 1:
        jax.distributed.initialize(address, count, index)
    from aif_jax import sharding, train
    from aif_jax.checkpoint import Checkpoints
    from aif_jax.data import to_device
    from aif_jax.train.loop import JsonLines

    model, feed, optimizer, params = world(index, count)
    mesh = sharding.row_mesh()
    state = sharding.place_state(train.init_state(params, optimizer), mesh)
    sparse = ("item",)
    step = train.make_step(model, optimizer, loss=train.losses.listwise_softmax, sparse=sparse)
    with Checkpoints(folder / "run") as checkpoints:
        state, cursor = train.resume(state, checkpoints, config=model.config)
        rest = steps - int(state.step)
        with to_device(feed.batches(cursor), place=lambda batch: sharding.place_batch(batch, mesh)) as batches:
            saving, log = train.Saving(checkpoints, model.config, every=SAVE_EVERY), JsonLines(folder / "log.jsonl")
            rest = itertools.islice(batches, rest)
            state = train.loop(state, step, rest, log_every=1, save=saving, log=log, progress=False)
    np.savez(folder / f"end-{index}.npz", *[np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(state)])


if __name__ == "__main__":
    from aif_jax.sharding.processes import end_at_once

    with end_at_once():
        run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
