"""`follow` on the service's own log: runs of joined samples become deltas, each sample trained on once, whatever is killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import cli, export
from aif_jax.checks import EncodingMismatch
from aif_jax.connectors import SnapshotStore
from aif_jax.data.cascade import open_samples
from aif_jax.export import Delta
from aif_jax.jobs import join_outcomes
from aif_jax.readers.read import read_samples
from aif_jax.refreshing import GateConfig, follow
from aif_jax.refreshing.continuous import name_of
from aif_jax.refreshing.job import Job
from aif_jax.refreshing.run import KEPT
from aif_jax.train.tasks import Cascaded, Impressions, NextItem
from tests.demo import same
from tests.follow_world import batches
from tests.light import lightly_compiled
from tests.outcomes_world import NOW, TABLE, outcomes, record, world, write_log
from tests.reliability import refresher

WINDOWS = {"click": 600}
BOUNDS = GateConfig(users=2, gauc=1.0, hit_rate=1.0, log_loss=5.0, calibration=1.0, overlap=0.0, slowdown=1000.0)
TASK = Impressions(candidates=4, threshold=2)
RUNS, EACH = 3, 60
"""Runs of the join, and requests, one a minute, between them."""


TASKS = (TASK, ()), (Cascaded(exposed=4, ranked=0, pre_ranked=0, retrieved=2), ("click",))


class Served:
    """A store, the samples of three runs of the join, and the model behind both."""

    def __init__(self, folder: Path, task: Any, objectives: tuple[str, ...]):
        self.folder, (self.trained, self.data) = folder, world(objectives)
        records = [record(self.trained, self.data, place) for place in range(RUNS * EACH)]
        log = write_log(folder / "log", records)
        rows = outcomes(*((each.id, each.ids[place % 3], int(each.time) + 5, "click") for place, each in enumerate(records)))
        cuts = [None, *(NOW + 60 * EACH * number + 600 for number in range(1, RUNS)), NOW + 100_000]
        for number, (since, until) in enumerate(itertools.pairwise(cuts)):
            out = folder / "samples" / f"run {number}"
            join_outcomes(log, rows, out, encoder=self.trained.encoder, windows=WINDOWS, since=since, until=until)
        index = aif.ItemIndex.build(self.trained, self.data.catalogue, progress=False)
        export.save(folder / "export", self.trained, index, platforms=("cpu",), stablehlo=False)
        kept = {"until": NOW + 60 * 5, "newest": NOW, "task": {"name": type(task).__name__, **dataclasses.asdict(task)}}
        (folder / "export" / KEPT).write_text(json.dumps(kept))
        SnapshotStore(folder / "store").publish(folder / "export")


@pytest.fixture(scope="module", params=TASKS, ids=["impressions", "cascaded"])
def served(request, tmp_path_factory):
    with lightly_compiled(keep=True):
        yield Served(tmp_path_factory.mktemp("served"), *request.param)


@pytest.fixture
def root(served, tmp_path) -> Path:
    """A copy of store and samples."""
    for name in ("store", "samples"):
        shutil.copytree(served.folder / name, tmp_path / name)
    return tmp_path


def run(root: Path, served: Served, **changes: Any) -> Any:
    """Goes on until nothing is left to do."""
    calls = itertools.count()
    options: dict[str, Any] = dict(out=root / "store", every=0.0, batch_size=8, learning_rate=0.02, gate=BOUNDS, held_out=0.2)
    options |= {"k": None, "progress": False, "stop": lambda: next(calls) > 12} | changes
    return follow(root / "samples", served.data, **options)


def deltas(root: Path) -> list[Delta]:
    store = SnapshotStore(root / "store" / "deltas")
    made = [Delta.load(store.fetch(root / f"fetched {number}", name)) for number, name in enumerate(store.names())]
    return sorted(made, key=lambda delta: delta.number)


def used(root: Path) -> list[int]:
    """Numbers of the samples that the sealed micro-batches trained on."""
    return [number for batch in batches(root / "store.follow" / "job") for number in batch["used"].tolist()]


def test_joined_samples_become_deltas(root, served):
    """A run that comes later is taken then; the newest samples of one run are trained on with the next."""
    shutil.move(root / "samples" / "run 2", root / "later")
    one = run(root, served)
    assert one.published == 1 and one.trained % 8 == 0 and one.waiting > 0
    shutil.move(root / "later", root / "samples" / "run 2")
    two = run(root, served)
    assert two.published == 2 and two.trained > one.trained
    numbers, total = used(root), sum(len(open_samples(folder)[1]["positions"]) for folder in (root / "samples").iterdir())
    assert len(set(numbers)) == len(numbers) == two.trained < total and max(numbers) > 2 * EACH
    first, second = deltas(root)
    assert (first.base, second.base, second.version) == (served.trained.version, first.version, two.version)
    index = aif.ItemIndex.build(served.trained, served.data.catalogue, progress=False)
    parts: Any = (served.trained, index)
    for delta in (first, second):
        parts = delta.apply(*parts)[:2]
    rebuilt = aif.Trained(served.trained.model, parts[0].params, served.trained.encoder)
    index = aif.ItemIndex.build(rebuilt, served.data.catalogue, progress=False)
    assert same(parts[1].stored(), index.stored())


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_each_sample_is_trained_on_once_whatever_is_killed(root, served, monkeypatch):
    """Before and after each step is sealed; the deltas are those of a process that nothing killed."""
    shutil.copytree(root, root / "whole")
    whole, sealed_one = run(root / "whole", served, batches=1), root / "store.follow" / "job" / name_of(1) / "step.json"

    def kill() -> None:
        raise Killed

    points = [("batch 000001", False), ("batch 000001", True), ("publish 000001", False), ("current", True)]
    for step, after in [("current", False), *points, ("publish 000001", True)]:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Job, "step", refresher.killing(step, after, kill))
            run(root, served, batches=1 - sealed_one.exists())
    assert run(root, served, batches=0) == whole and whole.published == 1
    assert used(root) == used(root / "whole") and [d.version for d in deltas(root)] == [
        d.version for d in deltas(root / "whole")
    ]


def test_the_command_follows_a_folder_of_samples(root, served, tmp_path, capsys):
    data = served.data
    raw = {"user": data.users.raw[data.log.user - 1].tolist(), "item": data.items.raw[data.log.item - 1].tolist()}
    table = {**raw, "time": data.log.time.tolist(), "event": ["view" if action == 1 else "buy" for action in data.log.action]}
    for name, columns in (("events", table), ("items", TABLE)):
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    words = ["refresh", "--follow", root / "samples", "--events", tmp_path / "events.csv", "--items", tmp_path / "items.csv"]
    words += ["--out", root / "store", "--every", "0s", "--batches", "1", "--batch-size", "8", "--quiet", "--json"]
    words += [
        "--gate",
        *(f"{field}={getattr(BOUNDS, field)}" for field in ("users", "gauc", "log_loss", "calibration", "slowdown")),
    ]
    assert cli.main(list(map(str, words))) == 0
    assert json.loads(capsys.readouterr().out)["published"] == 1


def test_what_does_not_fit_is_named(root, served):
    for changes, message in (
        ({"task": NextItem()}, "follow task: expected one whose samples are requests, got NextItem"),
        ({"k": 5}, "k: expected None for (Impressions|Cascaded), which ranks lists, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(root, served, **changes)
    shutil.copytree(root / "samples" / "run 1", root / "samples" / "run 1 again")
    expected = (
        "samples: expected each request in one run, got one at .* in .*run 1 and .*run 1 again .60 in all.; give join_out"
    )
    with pytest.raises(ValueError, match=expected):
        read_samples([root / "samples" / "run 1", root / "samples" / "run 1 again"], served.data)
    file = root / "samples" / "run 0" / "samples.json"
    file.write_text(file.read_text().replace(served.trained.encoding, "0" * 64))
    with pytest.raises(EncodingMismatch):
        run(root, served)
    with pytest.raises(ValueError, match="run 0: expected the encoder, outcomes and candidates of .*run 1, got others; join"):
        read_samples([root / "samples" / "run 1", root / "samples" / "run 0"], served.data)


def test_runs_are_read_as_one_join_of_all(served, tmp_path):
    log, trained = served.folder / "log", served.trained
    rows = outcomes(("request 3", 10, NOW + 190, "click"))
    cuts = [None, NOW + 3000, NOW + 6000, NOW + 100_000]
    for number, (since, until) in enumerate(itertools.pairwise(cuts)):
        span = dict(since=since, until=until)
        summary = join_outcomes(log, rows, tmp_path / str(number), encoder=trained.encoder, windows=WINDOWS, **span)
        assert summary.samples + sum(summary.left_out.values()) == summary.requests
    join_outcomes(log, rows, tmp_path / "all", encoder=trained.encoder, windows=WINDOWS, until=cuts[-1])
    parts, whole = (
        read_samples([tmp_path / str(n) for n in (2, 0, 1)], served.data),
        read_samples(tmp_path / "all", served.data),
    )
    assert parts.users == whole.users
    for name in ("user", "item", "action", "time", "offsets"):
        assert np.array_equal(getattr(parts.log, name), getattr(whole.log, name)), name
    a, b = (dataclasses.asdict(data.cascade) for data in (parts, whole))
    assert same(
        {name: a[name] for name in ("positions", "rows", "stage")}, {name: b[name] for name in ("positions", "rows", "stage")}
    )
    assert same(parts.served.features, whole.served.features) and same(parts.cascade.labels, whole.cascade.labels)
