"""Two processes of one job: one loss, checkpoints, `fit`. 200 steps and kills: `reliability/test_processes.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import Run, Trained, checkpoint
from tests import process_training as training
from tests.conftest import ROOT, child_environment
from tests.light import flags

PAIR = """
import dataclasses, itertools, json, sys
from pathlib import Path
folder, count, address, index = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
import jax
jax.distributed.initialize(address, count, index)
import numpy as np
from aif_jax import checkpoint, sharding, train
from aif_jax.checkpoint import Checkpoints
from tests import process_training as training

model, feed, optimizer, params = training.world(index, count)
mesh = sharding.row_mesh()
place = lambda: sharding.place_state(train.init_state(params, optimizer), mesh)
step = train.make_step(model, optimizer, loss=train.losses.listwise_softmax, sparse=("item",))
said = {}

def batches(number):
    for fed in itertools.islice(feed.batches(), number):
        yield dataclasses.replace(fed, batch=sharding.place_batch(fed.batch, mesh))

run = lambda feed, state=None, **options: train.loop(state or place(), step, feed, progress=False, **options)

def empty_share():
    for at, fed in enumerate(batches(3)):
        yield dataclasses.replace(fed, problem="empty") if index == 1 and at == 1 else fed

"""
STEPS = 6
CHECKS = (
    f"STEPS = {STEPS}"
    + """
said["losses"] = []
state = run(batches(STEPS), log_every=1, on_log=lambda number, values: said["losses"].append(values["loss"]))
said["empty in one"] = int(run(empty_share()).step)

with Checkpoints(folder / "run") as run_folder:
    run_folder.save(3, state.params, model.config, opt_state=state.opt_state, position={"step": 3})
    like = {"params": place().params, "opt_state": place().opt_state}
    read = run_folder.restore(like=like, config=model.config)
    same = lambda a, b: [np.testing.assert_array_equal(x.addressable_data(0), y.addressable_data(0))
                         for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    same([read.params, read.opt_state], [state.params, state.opt_state])
    said["version"] = read.version
    try:
        run_folder.save(3, state.params, model.config)
    except Exception as error:
        said["again"] = [type(error).__name__, str(error)]
    whole = run_folder.restore()  # by each on its own
    said["whole"] = list(whole.params["embedding"]["item"].shape)
single = checkpoint.load(folder / "single", like={"params": place().params})
said["from one"] = [list(single.params["embedding"]["item"].shape), single.version]
(folder / f"said-{index}.json").write_text(json.dumps(said))
"""
)


def start(folder: Path, code: str, count: int) -> list[subprocess.Popen]:
    words = [sys.executable, "-c", code, str(folder), str(count)]
    options = dict(cwd=ROOT, env=child_environment(flags=flags()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return training.start(words, count, **options)


def finish(started: list[subprocess.Popen], timeout: float = 280) -> None:
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        training.stop(started)
    assert [process.returncode for process in started] == [0] * len(started), "\n\n".join(outputs)


FIT = """
import sys
from pathlib import Path
folder, count, address, index = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
import jax
if count > 1:
    jax.distributed.initialize(address, count, index)
import aif_jax as aif

data = aif.read(folder / "events.csv", items=folder / "items.csv", columns=aif.Columns(), progress=False)
sizes = dict(width=4, short_length=3, long_length=4, towers=(), head=aif.heads.Mlp((4,)), sequence=False)
model = aif.build(aif.presets.two_tower(data.schema, **sizes))
aif.fit(model, data, aif.FitConfig(batch_size=64, EPOCHS), out=folder / f"run-{count}", progress=False)
"""


def fit_code(epochs: int = 1) -> str:
    """What each process does: `fit` on the files of `write_files`."""
    return FIT.replace("EPOCHS", f"epochs={epochs}")


def write_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    users, ids = rng.integers(0, 30, 900), rng.integers(100, 161, 900)
    events = [f"{user},{item},{1_700_000_000 + 60 * at}" for at, (user, item) in enumerate(zip(users, ids, strict=True))]
    (folder / "events.csv").write_text("user,item,time\n" + "\n".join(events) + "\n")
    (folder / "items.csv").write_text("item,category\n" + "".join(f"{item},c{item % 7}\n" for item in range(100, 161)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of two processes, and what each of them was told."""
    folder = tmp_path_factory.mktemp("pair")
    model, *_, params = training.world(0, 1)
    checkpoint.save(folder / "single", Trained(model, params))
    finish(start(folder, PAIR + CHECKS, 2))
    return folder, [json.loads((folder / f"said-{index}.json").read_text()) for index in range(2)], params, model.config


def test_every_process_is_told_of_a_step_that_is_there(pair):
    _, said, *_ = pair
    assert [told["again"][0] for told in said] == ["FileExistsError"] * 2
    assert all("/3: expected a new step, got 3" in told["again"][1] for told in said)


def test_a_share_without_a_candidate_is_trained_on(pair):
    _, said, *_ = pair
    assert [told["empty in one"] for told in said] == [3, 3]


def test_processes_write_one_checkpoint(pair):
    """Read whole by one process and by each of several, with the version of what it holds."""
    folder, said, params, config = pair
    read = checkpoint.load(folder / "run" / "3", config=config)
    table = read.params["embedding"]["item"]
    assert table.shape == (81, 4) and [told["whole"] for told in said] == [[81, 4]] * 2
    version = aif.fingerprint(read.params, config)
    assert read.version == version and [told["version"] for told in said] == [version] * 2
    assert not np.array_equal(table, params["embedding"]["item"])  # it was trained
    assert [told["from one"] for told in said] == [[[81, 4], aif.fingerprint(params, config)]] * 2
    assert [path.name for path in (folder / "run").iterdir()] == ["3"]


def test_the_curve_of_one(pair, tmp_path):
    _, said, *_ = pair
    training.run(tmp_path, STEPS, 1, "", 0)
    for told in said:
        np.testing.assert_allclose(told["losses"], training.losses(tmp_path), rtol=1e-6)
        assert len(told["losses"]) == STEPS


def test_fit_in_two_processes_ends_as_in_one(tmp_path):
    """With the same parameters, up to the order of sums, and a checkpoint that one process serves."""
    write_files(tmp_path)
    for count in (2, 1):
        finish(start(tmp_path, fit_code(), count))
    two, one = (Run.load(tmp_path / f"run-{count}") for count in (2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), two.params, one.params)
    assert two.metrics == pytest.approx(one.metrics, rel=1e-4)
    assert len(aif.ItemIndex.build(two.trained, tmp_path / "items.csv", progress=False)) == 61
