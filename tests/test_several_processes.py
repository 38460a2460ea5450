"""Several processes of one job: one loss, checkpoints, `fit`; 200 steps, kills, checkpoints that go from number to number."""

import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, sharding, train
from tests import process_training as training
from tests.process_training import finish, start
from tests.reliability.sizes import fully

pytestmark = pytest.mark.lane("standing")
STEPS = 6


class Process:
    """The small training in one process of several."""

    def __init__(self, index: int, count: int):
        self.index, self.mesh = index, sharding.row_mesh()
        self.model, self.feed, self.optimizer, self.params = training.world(index, count)

    def place(self) -> train.TrainState:
        """A fresh state, spread over the processes."""
        return sharding.place_state(train.init_state(self.params, self.optimizer), self.mesh)

    def batches(self, number: int, *, empty: int | None = None) -> Iterator[Any]:
        """The first batches, spread; the share that the second process has of one of them is empty."""
        for at, fed in enumerate(itertools.islice(self.feed.batches(), number)):
            where = fed.batch.where & (self.index != 1 or at != empty)
            yield dataclasses.replace(fed, batch=sharding.place_batch(dataclasses.replace(fed.batch, where=where), self.mesh))

    def run(self, batches: Iterator[Any], **options: Any) -> train.TrainState:
        return train.loop(self.place(), training.step_of(self.model, self.optimizer), batches, progress=False, **options)

    def like(self) -> dict[str, Any]:
        """What a checkpoint is read into."""
        return {"params": self.place().params, "opt_state": self.place().opt_state}


def check(folder: Path, index: int, count: int) -> None:
    """Trains, saves and reads in one of two processes, and writes what it was told."""
    process, said = Process(index, count), {"losses": []}
    state = process.run(process.batches(STEPS), log_every=1, on_log=lambda _, values: said["losses"].append(values["loss"]))
    said["empty in one"] = int(process.run(process.batches(3, empty=1)).step)
    with aif.Checkpoints(folder / "run") as run_folder:
        run_folder.save_async(3, state.params, process.model.config, opt_state=state.opt_state, position={"step": 3})
        read = run_folder.restore(like=process.like(), config=process.model.config)
        leaves = zip(*(jax.tree.leaves((each.params, each.opt_state)) for each in (read, state)), strict=True)
        for one, other in leaves:
            np.testing.assert_array_equal(one.addressable_data(0), other.addressable_data(0))
        said["version"] = read.version
        try:
            run_folder.save_async(3, state.params, process.model.config)
        except Exception as error:
            said["again"] = [type(error).__name__, str(error)]
        said["whole"] = list(run_folder.restore().params["embedding"]["item"].shape)  # by each on its own
    single = checkpoint.load(folder / "single", like={"params": process.place().params})
    said["from one"] = [list(single.params["embedding"]["item"].shape), single.version]
    (folder / f"said-{index}.json").write_text(json.dumps(said))


def fit(folder: Path, index: int, count: int, epochs: int = 1) -> None:
    """Calls `aif.fit` on the files of `write_files`."""
    data = aif.read(folder / "events.csv", items=folder / "items.csv", columns=aif.Columns(), progress=False)
    sizes = dict(width=4, short_length=3, long_length=4, towers=(), head=aif.heads.Mlp((4,)), sequence=False)
    model = aif.build(aif.presets.two_tower(data.schema, **sizes))
    aif.fit(model, data, aif.FitConfig(batch_size=64, epochs=epochs), out=folder / f"run-{count}", progress=False)


def write_files(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    users, ids = rng.integers(0, 30, 900), rng.integers(100, 161, 900)
    events = [f"{user},{item},{1_700_000_000 + 60 * at}" for at, (user, item) in enumerate(zip(users, ids, strict=True))]
    (folder / "events.csv").write_text("user,item,time\n" + "\n".join(events) + "\n")
    (folder / "items.csv").write_text("item,category\n" + "".join(f"{item},c{item % 7}\n" for item in range(100, 161)))
    return folder


def test_two_processes_are_one_job(tmp_path):
    """They have the loss of one, with an empty share too, and write one checkpoint, which one and each of them read whole."""
    model, *_, params = training.world(0, 1)
    checkpoint.save(tmp_path / "single", aif.Trained(model, params))
    finish(start(check, tmp_path, 2))
    (alone := tmp_path / "alone").mkdir()
    training.run(alone, 0, 1, STEPS)
    read = checkpoint.load(tmp_path / "run" / "3", config=model.config)
    version, table = aif.fingerprint(read.params, model.config), read.params["embedding"]["item"]
    assert read.version == version and table.shape == (81, 4) and [path.name for path in (tmp_path / "run").iterdir()] == ["3"]
    assert not np.array_equal(table, params["embedding"]["item"])  # it was trained
    for index in range(2):
        told = json.loads((tmp_path / f"said-{index}.json").read_text())
        np.testing.assert_allclose(told["losses"], training.losses(alone), rtol=1e-6)
        assert len(told["losses"]) == STEPS and told["empty in one"] == 3
        assert told["whole"] == [81, 4] and told["version"] == version
        assert told["from one"] == [[81, 4], aif.fingerprint(params, model.config)]
        assert told["again"][0] == "FileExistsError" and "/3: expected a new step, got 3" in told["again"][1]


def test_fit_in_two_processes_ends_as_in_one(tmp_path):
    """With the same parameters, up to the order of sums, and a checkpoint that one process serves."""
    write_files(tmp_path)
    for count in (2, 1):
        finish(start(fit, tmp_path, count))
    two, one = (aif.Run.load(tmp_path / f"run-{count}") for count in (2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), two.params, one.params)
    assert two.metrics == pytest.approx(one.metrics, rel=1e-4)
    assert len(aif.ItemIndex.build(two.trained, tmp_path / "items.csv", progress=False)) == 61


def kill_second(started: list, at_work: Any) -> None:
    """Kills the second of two processes as soon as `at_work()`, and waits until the first has failed by itself."""
    try:
        while not at_work():
            assert [process.poll() for process in started] == [None, None], "expected a run that is killed, it ended before"
            time.sleep(0.01)
        os.kill(started[1].pid, signal.SIGKILL)
        assert started[0].wait(200) != 0
    finally:
        training.stop(started)
        for process in started:
            process.stdout.close()


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Of one process, of two, and of two that are killed."""
    made = [tmp_path / name for name in ("one", "whole", "killed")]
    for folder in made:
        folder.mkdir()
    return made


@fully
def test_two_hundred_steps_and_a_kill(folders):
    """Two processes have the loss of one; killed half way and started again they end bit for bit as those left alone."""
    one, whole, killed = folders
    for folder, count in ((one, 1), (whole, 2)):
        finish(start(training.run, folder, count, 200))
    kill_second(start(training.run, killed, 2, 200), lambda: len(training.losses(killed)) >= 100)
    finish(start(training.run, killed, 2, 200))
    assert len(training.losses(one)) == 200
    np.testing.assert_allclose(training.losses(whole), training.losses(one), rtol=1e-6)
    np.testing.assert_array_equal(training.losses(killed), training.losses(whole))
    for index in range(2):
        ends = (dict(np.load(folder / f"end-{index}.npz")) for folder in (whole, killed))
        jax.tree.map(np.testing.assert_array_equal, *ends)


@fully
def test_fit_goes_on(folders):
    """One of two processes is killed by SIGKILL; the same call again ends bit for bit as one that was left alone."""
    whole, killed = map(write_files, folders[1:])
    finish(start(fit, whole, 2, 4))
    runs, of_killed = (aif.Checkpoints(folder / "run-2") for folder in (whole, killed))
    last = runs.latest
    kill_second(start(fit, killed, 2, 4), lambda: of_killed.steps)
    assert last is not None and max(of_killed.steps) < last  # it had not ended
    finish(start(fit, killed, 2, 4))
    one, other = (each.restore(last) for each in (runs, of_killed))
    assert one.version == other.version and one.step == other.step == last


def save(folder: Path, index: int, count: int) -> None:
    """Trains five steps and saves them."""
    process = Process(index, count)
    state = process.run(process.batches(5))
    with aif.Checkpoints(folder / "trained") as saved:
        saved.save_async(5, state.params, process.model.config, opt_state=state.opt_state)


def pass_on(folder: Path, index: int, count: int) -> None:
    """Reads what `save` has written, and saves it."""
    process = Process(index, count)
    with aif.Checkpoints(folder / "trained") as saved:
        read = saved.restore(like=process.like(), config=process.model.config)
    table = read.params["embedding"]["item"]
    assert len(table.sharding.device_set) == count == 4, (table.shape, table.sharding)
    with aif.Checkpoints(folder / "passed on") as saved:
        saved.save_async(5, read.params, process.model.config, opt_state=read.opt_state)


@fully
def test_two_to_four_to_one(tmp_path):
    finish(start(save, tmp_path, 2))
    finish(start(pass_on, tmp_path, 4))
    two, four = (checkpoint.load(tmp_path / name / "5") for name in ("trained", "passed on"))
    assert two.version == four.version != ""
    jax.tree.map(np.testing.assert_array_equal, two.params, four.params)
